//! The extent map: where each block of the virtual disk is.
//!
//! Truth is layered. The *tree* on disk is immutable between checkpoints and loaded on demand. Over
//! it lies the *frozen* overlay, the changes a running checkpoint is writing into the next tree, and
//! over that the *active* overlay, the changes since. Looking up never waits for a checkpoint, and a
//! checkpoint never waits for a change.

mod cache;
mod leaf;
mod leaves;
#[cfg(feature = "measure")]
pub mod measure;
mod merge;
mod overlay;
mod tree;

pub(crate) use cache::NodeCache;
pub(crate) use merge::{Merge, MergeStep};
pub(crate) use overlay::{Overlay, OverlayPieces};
pub(crate) use tree::{Fault, decode_node, lookup_tree};

use exd_format::{Extent, ExtentState, NodePointer};

/// State of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing is known of it: reads as zeroes (or as the backing file).
    Hole,
    /// It has a place that holds no data yet: reads as zeroes (or as the backing file).
    Unwritten,
    /// Its place holds its data.
    Written,
    /// Reads as zeroes, whatever lies below; it may keep a place.
    Zero,
}

/// Where a run of blocks is, seen from its first block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    pub(crate) state: State,
    /// Sector of the image file; 0 = no place.
    pub(crate) place: u64,
    pub(crate) birth: u32,
}

impl Mapping {
    pub(crate) const HOLE: Mapping = Mapping { state: State::Hole, place: 0, birth: 0 };

    /// The same run seen from `sectors` further on.
    pub(crate) fn advanced(self, sectors: u64) -> Mapping {
        if self.place == 0 { self } else { Mapping { place: self.place + sectors, ..self } }
    }

    pub(crate) fn to_extent(self, logical: u64, length: u32) -> Option<Extent> {
        let state = match self.state {
            State::Hole => return None,
            State::Unwritten => ExtentState::Unwritten,
            State::Written => ExtentState::Written,
            State::Zero => ExtentState::Zero,
        };
        Some(Extent { logical, physical: self.place, state, length, birth: self.birth })
    }

    pub(crate) fn of_extent(extent: &Extent) -> Mapping {
        let state = match extent.state {
            ExtentState::Unwritten => State::Unwritten,
            ExtentState::Written => State::Written,
            ExtentState::Zero => State::Zero,
        };
        Mapping { state, place: extent.physical, birth: extent.birth }
    }
}

/// The layered map of one open image.
pub(crate) struct Map {
    pub(crate) root: NodePointer,
    pub(crate) cache: NodeCache,
    pub(crate) active: Overlay,
    pub(crate) frozen: Option<Overlay>,
    /// Sectors in a block.
    sectors_per_block: u64,
}

impl Map {
    pub(crate) fn new(root: NodePointer, cache: NodeCache, sectors_per_block: u64) -> Self {
        Map {
            root,
            cache,
            active: Overlay::new(sectors_per_block),
            frozen: None,
            sectors_per_block,
        }
    }

    /// What is known of `block`, and for how many blocks from it (at most `max`) that holds.
    #[inline]
    pub(crate) fn lookup(&mut self, block: u64, max: u64) -> Result<(Mapping, u64), Fault> {
        if self.active.is_empty() && self.frozen.is_none() {
            return lookup_tree(&mut self.cache, &self.root, block, max, self.sectors_per_block);
        }
        self.lookup_changed(block, max)
    }

    /// As `lookup`, where there are changes.
    #[inline(never)]
    fn lookup_changed(&mut self, block: u64, max: u64) -> Result<(Mapping, u64), Fault> {
        let mut len = max;
        for overlay in [Some(&self.active), self.frozen.as_ref()].into_iter().flatten() {
            match overlay.find(block) {
                Ok((mapping, run)) => return Ok((mapping, run.min(len))),
                Err(gap) => len = len.min(gap),
            }
        }
        lookup_tree(&mut self.cache, &self.root, block, len, self.sectors_per_block)
    }

    /// Starts a checkpoint: the active overlay becomes the frozen one.
    pub(crate) fn freeze(&mut self) {
        assert!(self.frozen.is_none(), "one checkpoint at a time");
        let empty = Overlay::new(self.sectors_per_block);
        self.frozen = Some(std::mem::replace(&mut self.active, empty));
    }

    /// Gives a checkpoint up: its changes are active again, under what changed since.
    pub(crate) fn thaw(&mut self) {
        let Some(mut frozen) = self.frozen.take() else { return };
        for (block, len, mapping) in self.active.iter_from(0) {
            frozen.set(block, len, mapping);
        }
        self.active = frozen;
    }
}
