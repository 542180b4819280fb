//! From what is in the file to what the image is: choice of superblock, replay of the journal and of
//! the completion log. Reads only; the same for opening, for read-only opening and for `check`.

use crate::apply;
use crate::blocking_io as io;
use crate::bugs::{self, Bug};
use crate::error::{Error, ErrorKind};
use crate::journal::{Tail, locate};
use crate::map::Overlay;
use crate::ranges::RangeSet;
use crate::space::Space;
use crate::storage::{SECTOR, Storage};
use exd_format::{
    COMPLETION_LOG_HEADER_SIZE, COMPLETION_SLOT_SIZE, Choice, CompletionLogHeader, CompletionSlot,
    Entry, EntryKind, Expected, FLAG_SYNC_FAILED, LogSlot, RECORD_MAX, SUPERBLOCK_SIZE, Slot,
    SpaceKind, SpaceList, State, Superblock,
};

/// An image as its metadata describes it.
pub(crate) struct Recovered {
    pub(crate) superblock: Superblock,
    /// Both slots hold it.
    pub(crate) both_slots: bool,
    /// Changes since the checkpoint.
    pub(crate) overlay: Overlay,
    pub(crate) space: Space,
    /// Where the journal ends.
    pub(crate) tail: Tail,
    /// Last completion, in the journal or the completion log.
    pub(crate) cseq: u64,
    pub(crate) records: u64,
    /// Completions taken from the completion log.
    pub(crate) logged: u64,
    /// Space that the checkpoint's list shows as open and no replayed entry speaks of: nothing
    /// recovery may still need is there, whatever becomes of the journal.
    pub(crate) untouched: RangeSet,
    /// Space that records opened and no later entry speaks of.
    pub(crate) windows: RangeSet,
    /// Bytes of the ring that hold the records replayed.
    pub(crate) ring_used: u64,
    /// What was taken from the completion log.
    pub(crate) log_entries: Vec<Entry>,
}

/// Reads both superblocks and chooses.
pub(crate) fn read_superblock(st: &mut dyn Storage) -> Result<(Superblock, bool), Error> {
    let mut slots = Vec::new();
    for slot in 0..2 {
        let offset = Superblock::slot_address(slot);
        let bytes = io::read(st, offset, SUPERBLOCK_SIZE as u64, "the superblock")?;
        slots.push(Superblock::decode(&bytes, slot, None));
    }
    let second = slots.pop().expect("two slots");
    let first = slots.pop().expect("two slots");
    match exd_format::choose(first, second) {
        Choice::Use { superblock, both, .. } => Ok((*superblock, both)),
        Choice::Unsupported { features } => Err(Error {
            context: format!("the image needs unsupported features: {}", features.join(", ")),
            kind: ErrorKind::Unsupported(features),
            offset: None,
        }),
        Choice::Corrupt(error) => Err(Error::decode(error, 0)),
        Choice::NotExd => {
            Err(Error { kind: ErrorKind::NotExd, context: "not an EXD image".into(), offset: None })
        }
    }
}

/// What the superblock tells about an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Number of the last checkpoint.
    pub generation: u64,
}

/// Reads the superblock alone. Works without the lock: of an image in use it is some recent state, or
/// an error while the superblock is being written.
pub fn peek(st: &mut dyn Storage) -> Result<Identity, Error> {
    let (superblock, _) = read_superblock(st)?;
    Ok(Identity {
        uuid: superblock.uuid,
        virtual_size: superblock.virtual_size,
        block_size: 1 << superblock.block_bits,
        generation: superblock.generation,
    })
}

/// Where the superblock says that the completion log is, with the image's identity; the path is empty if
/// there was none. Works without the lock, as [`peek`] does.
pub fn peek_log(st: &mut dyn Storage) -> Result<([u8; 16], String), Error> {
    let (superblock, _) = read_superblock(st)?;
    Ok((superblock.uuid, superblock.completion_log_path))
}

/// Reads everything but the tree.
pub(crate) fn recover(st: &mut dyn Storage) -> Result<Recovered, Error> {
    let (superblock, both_slots) = read_superblock(st)?;
    let geometry = superblock.geometry();
    let per_block = (1u64 << superblock.block_bits) / SECTOR;
    let mut space = Space::new(per_block, superblock.data_end / SECTOR);
    let pointer = &superblock.space_list;
    if !pointer.is_none() {
        if pointer.length > exd_format::SPACE_LIST_MAX {
            return Err(Error::corrupt(pointer.address, "space list of impossible length"));
        }
        let bytes = io::read(st, pointer.address, pointer.length, "the space list")?;
        let list = SpaceList::decode(&bytes, pointer, &geometry)
            .map_err(|error| Error::decode(error, pointer.address))?;
        for range in list.ranges {
            let sectors = range.start..range.start + range.sectors;
            match range.kind {
                SpaceKind::Open | SpaceKind::Bitmaps => space.open.insert(sectors),
                SpaceKind::Zero => space.zero.insert(sectors),
            }
        }
    }
    check_lists(&superblock, &space)?;
    let mut recovered = Recovered {
        tail: Tail {
            position: superblock.journal_tail,
            sequence: superblock.tail_sequence,
            chain: superblock.tail_chain,
        },
        cseq: superblock.applied,
        untouched: space.open.clone(),
        windows: RangeSet::new(),
        ring_used: 0,
        log_entries: Vec::new(),
        superblock,
        both_slots,
        overlay: Overlay::new(per_block),
        space,
        records: 0,
        logged: 0,
    };
    if recovered.superblock.state == State::InUse {
        recovered.replay_journal(st)?;
        recovered.replay_log(st)?;
        check_lists(&recovered.superblock, &recovered.space)?;
    }
    Ok(recovered)
}

/// Free space that something owns would be overwritten by the next checkpoint.
fn check_lists(superblock: &Superblock, space: &Space) -> Result<(), Error> {
    let node_size = superblock.geometry().node_size();
    let areas =
        [superblock.space_list, superblock.snapshots, superblock.bitmaps, superblock.encryption];
    let mut owned: Vec<(u64, u64)> = vec![(0, exd_format::FIXED_AREA)];
    owned.extend(superblock.segments.iter().map(|segment| (segment.offset, segment.length)));
    owned.extend(areas.iter().map(|area| (area.address, area.length)));
    if !superblock.root.is_none() {
        owned.push((superblock.root.address, node_size));
    }
    for (start, len) in owned {
        let sectors = start / SECTOR..start.saturating_add(len).div_ceil(SECTOR);
        let free = space.open.within(sectors.clone()).chain(space.zero.within(sectors)).next();
        if let Some(range) = free {
            return Err(Error::corrupt(
                range.start * SECTOR,
                "space is called free that the superblock's structures own",
            ));
        }
    }
    Ok(())
}

impl Recovered {
    fn apply(&mut self, entry: &Entry) {
        let per_block = (1u64 << self.superblock.block_bits) / SECTOR;
        let sectors = apply::sectors_of(entry, per_block);
        self.untouched.remove(sectors.clone());
        self.windows.remove(sectors);
        apply::apply(entry, &mut self.overlay, &mut self.space, per_block);
    }

    fn replay_journal(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let segments = self.superblock.segments.clone();
        let total = self.superblock.ring_length();
        let mut ring = Vec::new();
        for segment in &segments {
            ring.push(io::read(st, segment.offset, segment.length, "the journal")?);
        }
        let mut through = 0;
        let mut travelled = 0;
        loop {
            let (index, within) = locate(&segments, self.tail.position);
            let segment = &segments[index];
            let room = segment.length - within;
            let offset = segment.offset + within;
            let bytes = &ring[index][within as usize..];
            let bytes = &bytes[..bytes.len().min(RECORD_MAX)];
            let mut expected = Expected {
                geometry: self.superblock.geometry(),
                epoch: self.superblock.epoch,
                sequence: self.tail.sequence,
                chain: self.tail.chain,
                applied: self.superblock.applied,
                through,
                record_bits: self.superblock.record_bits,
                room,
            };
            if bugs::on(Bug::AcceptEarlierEpoch)
                && let Some(found) = exd_format::examine(
                    bytes,
                    offset,
                    &self.superblock.uuid,
                    self.superblock.record_bits,
                    room,
                )
                && found.epoch < expected.epoch
                && found.sequence == expected.sequence
            {
                expected.epoch = found.epoch;
                expected.chain = u32::from_le_bytes([bytes[68], bytes[69], bytes[70], bytes[71]]);
                expected.through = 0;
                expected.applied = u64::MAX;
            }
            match exd_format::classify(bytes, offset, &expected) {
                Slot::End(_) => break,
                Slot::Corrupt(error) => return Err(Error::decode(error, offset)),
                Slot::Apply { record, crc } => {
                    for (cseq, entry) in record.numbered() {
                        if cseq > self.superblock.applied {
                            self.apply(entry);
                            if entry.kind == EntryKind::Window {
                                self.windows.insert(apply::sectors_of(entry, 1));
                            }
                        }
                    }
                    through = record.through;
                    let length = u64::from(record.length);
                    travelled += length;
                    self.ring_used = travelled;
                    self.records += 1;
                    self.tail = Tail {
                        position: (self.tail.position + length) % total,
                        sequence: record.sequence + 1,
                        chain: crc,
                    };
                    if travelled > total {
                        return Err(Error::corrupt(offset, "the journal runs in a circle"));
                    }
                }
            }
        }
        self.cseq = through.max(self.superblock.applied);
        self.confirm_end(&ring)
    }

    /// Damage in the middle must not pass for the end of the log.
    fn confirm_end(&self, ring: &[Vec<u8>]) -> Result<(), Error> {
        let step = 1usize << self.superblock.record_bits;
        for (segment, bytes) in self.superblock.segments.iter().zip(ring) {
            for at in (0..bytes.len()).step_by(step) {
                let offset = segment.offset + at as u64;
                let room = segment.length - at as u64;
                let slot = &bytes[at..bytes.len().min(at + RECORD_MAX)];
                let found = exd_format::examine(
                    slot,
                    offset,
                    &self.superblock.uuid,
                    self.superblock.record_bits,
                    room,
                );
                if let Some(found) = found
                    && let Some(why) = exd_format::contradicts_end(
                        &found,
                        self.superblock.epoch,
                        self.tail.sequence,
                    )
                {
                    return Err(Error::corrupt(offset, format!("journal: {why}")));
                }
            }
        }
        Ok(())
    }

    fn replay_log(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let uuid = self.superblock.uuid;
        let bytes =
            st.read_log(uuid, &self.superblock.completion_log_path).map_err(|error| Error {
                kind: ErrorKind::Storage(error),
                context: "cannot read the completion log of the session before".into(),
                offset: None,
            })?;
        let Some(bytes) = bytes else { return Ok(()) };
        let Some(head) = bytes.get(..COMPLETION_LOG_HEADER_SIZE) else { return Ok(()) };
        // A log whose creation was cut short, or somebody else's: as if there were none.
        let Ok(header) = CompletionLogHeader::decode(head, &uuid) else { return Ok(()) };
        if header.boot_id != st.boot_id()
            || header.storage != st.identity()
            || header.epoch != self.superblock.epoch
            || header.file_length() > bytes.len() as u64
        {
            return Ok(());
        }
        if header.flags & FLAG_SYNC_FAILED != 0 {
            // The host may have dropped data that completions speak of: in space that was not known
            // to be zero, they would expose what it held before.
            return Ok(());
        }
        let geometry = self.superblock.geometry();
        let mut group = Vec::new();
        for _ in 0..header.slot_count {
            let cseq = self.cseq + group.len() as u64 + 1;
            let offset = header.slot_offset(cseq) as usize;
            let slot = &bytes[offset..offset + COMPLETION_SLOT_SIZE];
            match CompletionSlot::classify(slot, &geometry, header.epoch, cseq) {
                LogSlot::End => break,
                LogSlot::Corrupt(error) => {
                    return Err(Error {
                        kind: ErrorKind::Corrupt,
                        context: format!("completion log, byte {offset}: {error}"),
                        offset: None,
                    });
                }
                LogSlot::Apply(entry) => {
                    group.push(entry);
                    if !entry.has_more() {
                        self.cseq += group.len() as u64;
                        self.logged += group.len() as u64;
                        for entry in std::mem::take(&mut group) {
                            self.apply(&entry);
                            self.log_entries.push(entry);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
