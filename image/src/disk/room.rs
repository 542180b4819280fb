//! Room for the checkpoint that begins a session.
//!
//! Its nodes and its list go into space that the checkpoint before it lists as open, the list in one
//! piece. Each checkpoint leaves a run for that (`Checkpoint::list_room`). Where it is missing or too
//! short, there are two ways to make some, and each leaves a valid image at any time:
//!
//! * a superblock that differs from the old one in its list only: needs a run for the old list;
//! * a record in the journal that was found, which opens a window: needs a slot of the ring.

use super::Disk;
use super::lifecycle::commit_superblock;
use crate::blocking_io as io;
use crate::bugs;
use crate::error::{Error, ErrorKind};
use crate::journal::{Journal, Tail, locate};
use crate::ranges::RangeSet;
use crate::recovery::Recovered;
use crate::space::Space;
use crate::storage::{SECTOR, Storage, StorageError};
use exd_format::{Entry, METADATA_ALIGN, RECORD_MAX, SpaceKind, SpaceList, State, Superblock};
use std::ops::Range;

/// So often the host is asked for other room when it has no space for the longest ranges.
const ROUNDS_MAX: usize = 16;

/// Sectors that metadata is aligned to.
const ALIGN: u64 = METADATA_ALIGN / SECTOR;

impl Disk {
    /// Space for the first checkpoint, at least `needed` bytes of it, with a run for the list.
    pub(super) fn room_to_begin(
        &mut self,
        st: &mut dyn Storage,
        recovered: &mut Recovered,
        needed: u64,
    ) -> Result<RangeSet, Error> {
        let way = bugs::way_to_begin(self.superblock.generation);
        let mut meta = self.usable(&recovered.untouched);
        if way == 0 && self.is_enough(&meta, needed) {
            return Ok(meta);
        }
        if way <= 1 && self.open_by_list(st, &mut meta, needed)? {
            return Ok(meta);
        }
        self.settle_journal(st, recovered)?;
        for range in self.usable(&recovered.windows).iter() {
            meta.insert(range);
        }
        if way == 3 || !self.is_enough(&meta, needed) {
            meta.insert(self.open_by_record(st, recovered, needed)?);
        }
        Ok(meta)
    }

    /// As much of the room as a session begins with, in space that the host has for it: on a full host there is
    /// what closing has kept allocated, among holes.
    pub(super) fn room_on_host(
        &self,
        st: &mut dyn Storage,
        mut room: RangeSet,
        needed: u64,
    ) -> RangeSet {
        let most = ((4 * needed).max(1 << 20) / SECTOR).next_multiple_of(ALIGN);
        for _ in 0..ROUNDS_MAX {
            let mut meta = room.clone();
            meta.keep_longest(most);
            let mut is_allocated = |range: &Range<u64>| {
                io::allocate(st, range.start * SECTOR..range.end * SECTOR).is_ok()
            };
            let holes: Vec<_> = meta.iter().filter(|range| !is_allocated(range)).collect();
            holes.iter().for_each(|hole| room.remove(hole.clone()));
            // Without enough, or with a host that cannot allocate at all, what is there has to do.
            if holes.is_empty() || !self.is_enough(&room, needed) {
                return meta;
            }
        }
        room.keep_longest(most);
        room
    }

    /// The parts of `open` that can hold a node.
    fn usable(&self, open: &RangeSet) -> RangeSet {
        let node = self.superblock.geometry().node_size() / SECTOR;
        let mut usable = RangeSet::new();
        for range in open.iter() {
            let start = range.start.next_multiple_of(ALIGN);
            let end = range.end / ALIGN * ALIGN;
            if start + node <= end {
                usable.insert(start..end);
            }
        }
        usable
    }

    fn is_enough(&self, meta: &RangeSet, needed: u64) -> bool {
        let run = meta.longest().map_or(0, |range| range.end - range.start);
        meta.total() * SECTOR >= needed && run * SECTOR >= self.list_length()
    }

    /// Opens never used space by a superblock that differs from the old one in its list only. False if
    /// there is no run for that list, or no such space.
    fn open_by_list(
        &mut self,
        st: &mut dyn Storage,
        meta: &mut RangeSet,
        needed: u64,
    ) -> Result<bool, Error> {
        let start = self.space.data_end.next_multiple_of(ALIGN);
        let range = start..start + (needed / SECTOR).next_multiple_of(ALIGN);
        if range.end > self.space.end() {
            return Ok(false);
        }
        let old = self.superblock.clone();
        let (mut open, mut zero) = read_list(st, &old)?;
        let old_list = old.space_list.address / SECTOR
            ..(old.space_list.address + old.space_list.length) / SECTOR;
        open.insert(range.clone());
        open.insert(old_list.clone());
        let mut length = SpaceList::length_for(open.count() + zero.count() + 1);
        let mut place = meta.take(length / SECTOR, ALIGN);
        if place.is_none() {
            // Zeroes may be forgotten.
            zero = RangeSet::new();
            length = SpaceList::length_for(open.count() + 1);
            place = meta.take(length / SECTOR, ALIGN);
        }
        let Some(sector) = place else { return Ok(false) };
        open.remove(sector..sector + length / SECTOR);
        let list = SpaceList {
            generation: old.generation + 1,
            address: sector * SECTOR,
            uuid: old.uuid,
            ranges: Space::listing(&open, &zero),
        };
        let bytes = list.encode(Some(length));
        io::write(st, list.address, &bytes, "the space list")?;
        io::sync(st)?;
        let mut superblock = Superblock {
            generation: old.generation + 1,
            space_list: list.pointer(&bytes),
            data_end: old.data_end.max(range.end * SECTOR),
            ..old
        };
        superblock.drop_autoclear();
        commit_superblock(st, &superblock)?;
        self.superblock = superblock;
        self.space.open_window(range.clone());
        self.space.map(sector..sector + length / SECTOR);
        self.space.free(old_list.clone());
        meta.insert(range);
        meta.insert(old_list);
        Ok(true)
    }

    /// Makes the records that recovery relied on durable, written as they are, and removes what follows
    /// them: records that went by then, because one before them is missing.
    fn settle_journal(
        &mut self,
        st: &mut dyn Storage,
        recovered: &mut Recovered,
    ) -> Result<(), Error> {
        if self.superblock.state == State::Clean {
            return Ok(());
        }
        let segments = self.superblock.segments.clone();
        let total = self.superblock.ring_length();
        let mut position = self.superblock.journal_tail;
        let mut left = recovered.ring_used;
        while left > 0 {
            let (index, within) = locate(&segments, position);
            let len = left.min(segments[index].length - within);
            let offset = segments[index].offset + within;
            let bytes = io::read(st, offset, len, "the journal")?;
            io::write(st, offset, &bytes, "the journal")?;
            position = (position + len) % total;
            left -= len;
        }
        let step = 1u64 << self.superblock.record_bits;
        let bits = self.superblock.record_bits;
        for segment in &segments {
            let bytes = io::read(st, segment.offset, segment.length, "the journal")?;
            for at in (0..segment.length).step_by(step as usize) {
                let end = bytes.len().min(at as usize + RECORD_MAX);
                let (slot, room) = (&bytes[at as usize..end], segment.length - at);
                let offset = segment.offset + at;
                let found = exd_format::examine(slot, offset, &self.superblock.uuid, bits, room);
                if found.is_some_and(|found| {
                    found.epoch == self.superblock.epoch
                        && found.sequence >= recovered.tail.sequence
                }) {
                    io::write_zeroes(st, offset..offset + step, "the journal")?;
                }
            }
        }
        io::sync(st)
    }

    /// Opens space by a record at the end of the journal that was found, behind what the completion log
    /// holds. The journal of a clean image is begun for that.
    fn open_by_record(
        &mut self,
        st: &mut dyn Storage,
        recovered: &mut Recovered,
        needed: u64,
    ) -> Result<Range<u64>, Error> {
        let range = self.space.plan_run(needed / SECTOR).ok_or_else(no_room)?;
        if self.superblock.state == State::Clean {
            self.begin_journal(st, recovered)?;
        }
        let superblock = &self.superblock;
        let tail = recovered.tail;
        let mut journal = Journal::new(
            superblock.uuid,
            superblock.epoch,
            superblock.segments.clone(),
            1 << superblock.record_bits,
            tail,
            recovered.cseq,
        );
        journal.go_on(recovered.ring_used);
        let mut entries = recovered.log_entries.clone();
        entries.push(Entry::window(range.start, range.end - range.start));
        let through = recovered.cseq + 1;
        while !entries.is_empty() {
            let count = journal.append(&entries, through).ok_or_else(no_room)?;
            entries.drain(..count);
        }
        for (_, offset, bytes) in journal.take_unsent() {
            io::write(st, offset, &bytes, "the journal")?;
        }
        io::sync(st)?;
        self.space.open_window(range.clone());
        recovered.cseq = through;
        recovered.tail = journal.head();
        self.cseq = through;
        self.durable_through = through;
        self.journal = self.journal_behind(recovered);
        self.write_holder(st)?;
        Ok(range)
    }

    /// The superblock of a session that has changed nothing yet: its journal can be written to.
    fn begin_journal(
        &mut self,
        st: &mut dyn Storage,
        recovered: &mut Recovered,
    ) -> Result<(), Error> {
        recovered.tail.chain = 0;
        let old = self.superblock.clone();
        let mut superblock = Superblock {
            generation: old.generation + 1,
            state: State::InUse,
            epoch: old.epoch + 1,
            journal_tail: recovered.tail.position,
            tail_sequence: recovered.tail.sequence,
            tail_chain: 0,
            completion_log_path: String::new(),
            ..old
        };
        superblock.drop_autoclear();
        commit_superblock(st, &superblock)?;
        self.superblock = superblock;
        Ok(())
    }

    /// The journal of the session that begins: empty, behind what recovery found.
    fn journal_behind(&self, recovered: &Recovered) -> Journal {
        let superblock = &self.superblock;
        Journal::new(
            superblock.uuid,
            superblock.epoch + 1,
            superblock.segments.clone(),
            1 << superblock.record_bits,
            Tail { chain: 0, ..recovered.tail },
            recovered.cseq,
        )
    }
}

/// The list of a superblock: open ranges, and zeroes.
fn read_list(st: &mut dyn Storage, superblock: &Superblock) -> Result<(RangeSet, RangeSet), Error> {
    let (mut open, mut zero) = (RangeSet::new(), RangeSet::new());
    let pointer = &superblock.space_list;
    if !pointer.is_none() {
        let bytes = io::read(st, pointer.address, pointer.length, "the space list")?;
        let list = SpaceList::decode(&bytes, pointer, &superblock.geometry())
            .map_err(|error| Error::decode(error, pointer.address))?;
        for entry in list.ranges {
            let sectors = entry.start..entry.start + entry.sectors;
            match entry.kind {
                SpaceKind::Zero => zero.insert(sectors),
                _ => open.insert(sectors),
            }
        }
    }
    Ok((open, zero))
}

fn no_room() -> Error {
    Error {
        kind: ErrorKind::Storage(StorageError::NoSpace),
        context: "the image has no room left for recovery".into(),
        offset: None,
    }
}
