//! What an entry does to the map and to space: the same while running and while replaying.

use crate::map::{Mapping, Overlay, State};
use crate::space::Space;
use exd_format::{Entry, EntryKind};
use std::ops::Range;

/// The sectors of the image file an entry speaks of.
pub(crate) fn sectors_of(entry: &Entry, sectors_per_block: u64) -> Range<u64> {
    let sectors = match entry.kind {
        EntryKind::Window | EntryKind::Release => entry.logical,
        _ => u64::from(entry.length) * sectors_per_block,
    };
    entry.physical..entry.physical + sectors
}

/// True if the entry gives up the place it names.
pub(crate) fn frees_place(entry: &Entry) -> bool {
    match entry.kind {
        EntryKind::Unmap => entry.physical != 0,
        EntryKind::Zero => entry.physical != 0 && !entry.keeps(),
        _ => false,
    }
}

/// Applies an entry.
pub(crate) fn apply(entry: &Entry, overlay: &mut Overlay, space: &mut Space, per_block: u64) {
    let sectors = sectors_of(entry, per_block);
    let mapping = |state, place| Mapping { state, place, birth: entry.birth };
    let set = |overlay: &mut Overlay, mapping| {
        overlay.set(entry.logical, u64::from(entry.length), mapping);
    };
    match entry.kind {
        EntryKind::Map => {
            set(overlay, mapping(State::Written, entry.physical));
            space.map(sectors);
        }
        EntryKind::Convert => set(overlay, mapping(State::Written, entry.physical)),
        EntryKind::Reserve => {
            set(overlay, mapping(State::Unwritten, entry.physical));
            if !entry.keeps() {
                space.map(sectors);
            }
        }
        EntryKind::Zero => {
            let place = if entry.keeps() { entry.physical } else { 0 };
            set(overlay, mapping(State::Zero, place));
            if frees_place(entry) {
                space.free(sectors);
            }
        }
        EntryKind::Unmap => {
            set(overlay, Mapping::HOLE);
            if frees_place(entry) {
                space.free(sectors);
            }
        }
        EntryKind::Window => space.open_window(sectors),
        EntryKind::Release => space.release(sectors),
    }
}
