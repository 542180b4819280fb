//! The data path: where the pieces of a request go, and who owns a block meanwhile.
//!
//! A piece over written blocks goes straight to its place. The first write of a block, whole or in
//! part, *owns* the block until it counts as written; pieces for an owned block queue behind it, and
//! nothing else waits. A group is a run of owned blocks that goes to storage at once: neighbours that
//! arrive in one batch join one group, so that the edge block they share is written once, aligned.

use super::relocate::Moving;
use super::{Disk, Pending};
use crate::bugs::{self, Bug};
use crate::map::{Mapping, State};
use crate::pool::PHASES;
use crate::request::RequestError;
use crate::space::{Place, Wish};
use crate::storage::{Done, Op, RequestId, SECTOR, Segment, Storage, StorageError};
use exd_format::{Entry, Preallocation};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// A group takes no more pieces than this (an I/O vector has its limits) ...
const PIECES_MAX: usize = 128;
/// ... and no more bytes.
const GROUP_BYTES_MAX: u64 = 1 << 20;

/// Blocks smaller than this are kept together in pieces of it: see [`Disk::first_blocks`].
const GRANULE: u64 = PHASES * SECTOR;

/// Lookups look so far ahead: the fast path is shown more than a request asked for.
const LOOKUP_BLOCKS_MAX: u64 = 1 << 40;

/// More separate ranges of open space than this are not made by discarding.
const OPEN_RANGES_MAX: usize = 1 << 20;

/// What a part of a request wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WorkKind {
    Read,
    Write,
    Zero {
        unmap: bool,
    },
    Discard,
    /// Cut off by shrinking: given up whatever was promised about space.
    Cut,
    /// Moved where that makes it contiguous.
    Move,
}

/// A part of a request, in bytes of the virtual disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Work {
    pub(crate) id: RequestId,
    pub(crate) kind: WorkKind,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Work {
    fn part(self, start: u64, end: u64) -> Work {
        Work { start, end, ..self }
    }
}

/// How a group's blocks get their place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// They have none yet.
    New,
    /// They have one that holds no data (unwritten, or zero with a place).
    InPlace,
    /// They are written, and storage wants larger units than the guest gave.
    Rewrite,
    /// They are written, and get a new place.
    Move,
}

/// Part of a group: bytes of the virtual disk that a request writes.
#[derive(Clone, Copy, Debug)]
struct Piece {
    id: RequestId,
    zero: bool,
    start: u64,
    end: u64,
}

/// A run of a group's blocks with a place of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) place: Place,
}

/// A side of a read-modify-write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Edge {
    Head,
    Tail,
}

/// Blocks owned by one write.
pub(crate) struct Group {
    first: u64,
    pub(super) end: u64,
    pub(super) class: Class,
    /// Place of the first block, if the class has one.
    place: u64,
    pieces: Vec<Piece>,
    issued: bool,
    pub(super) runs: Vec<Run>,
    pub(super) operations: u32,
    pub(super) error: Option<RequestError>,
    waiters: VecDeque<Work>,
    /// Entries put aside for its runs.
    reserved: u64,
    head: Option<Arc<[u8]>>,
    tail: Option<Arc<[u8]>>,
    /// Its entries have taken effect: its places were zero, so that nobody can tell when its data lands.
    committed: bool,
    /// The end of its last block is not padded, and that block is not owned any more: the number of its I/O.
    open_end: Option<u64>,
    /// Of a group that moves data.
    pub(super) moving: Option<Moving>,
}

impl Group {
    /// A group that gives blocks `first .. end` new places.
    pub(super) fn moving(first: u64, end: u64, reserved: u64, moving: Moving) -> Group {
        Group {
            first,
            end,
            class: Class::Move,
            place: 0,
            pieces: Vec::new(),
            issued: false,
            runs: Vec::new(),
            operations: 0,
            error: None,
            waiters: VecDeque::new(),
            reserved,
            head: None,
            tail: None,
            committed: false,
            open_end: None,
            moving: Some(moving),
        }
    }

    /// The end of the blocks it owns.
    fn owned_end(&self) -> u64 {
        self.end - u64::from(self.open_end.is_some())
    }
}

impl Disk {
    /// Does a part of a request, which counts as one piece under way, as far as it goes.
    pub(crate) fn dispatch(&mut self, st: &mut dyn Storage, work: Work) {
        match work.kind {
            WorkKind::Read => self.dispatch_read(st, work),
            WorkKind::Write => self.dispatch_write(st, work),
            WorkKind::Move => self.dispatch_move(st, work),
            WorkKind::Zero { .. } | WorkKind::Discard | WorkKind::Cut => {
                self.dispatch_clear(st, work);
            }
        }
        self.piece_done(work.id, Ok(()));
    }

    fn buffer_offset(&self, id: RequestId, at: u64) -> u64 {
        use crate::request::Request;
        match self.active.get(&id).map(|active| active.request) {
            Some(Request::Read { offset, .. } | Request::Write { offset, .. }) => at - offset,
            _ => 0,
        }
    }

    fn dispatch_read(&mut self, st: &mut dyn Storage, work: Work) {
        let block_size = self.block_size;
        let mut at = work.start;
        while at < work.end {
            let block = at / block_size;
            let blocks = work.end.div_ceil(block_size) - block;
            let (mapping, run) = match self.map.lookup(block, LOOKUP_BLOCKS_MAX) {
                Ok(found) => found,
                Err(fault) => return self.park(st, fault, Some(work.part(at, work.end))),
            };
            self.show_to_fast(block, run, mapping);
            let end = work.end.min((block + run.min(blocks)) * block_size);
            let buffer_offset = self.buffer_offset(work.id, at);
            if mapping.state == State::Written {
                let offset = mapping.place * SECTOR + (at - block * block_size);
                let io = self.begin_io();
                self.piece_started(work.id);
                let op = Op::ReadRequest { offset, request: work.id, buffer_offset, len: end - at };
                self.start(st, op, Pending::Read { id: work.id, io });
            } else {
                st.zero_request(work.id, buffer_offset, end - at);
            }
            at = end;
        }
    }

    fn dispatch_write(&mut self, st: &mut dyn Storage, work: Work) {
        let block_size = self.block_size;
        let mut at = work.start;
        while at < work.end {
            let block = at / block_size;
            if let Some((group, owned_end)) = self.owner_of(block) {
                let end = work.end.min(owned_end * block_size);
                if !self.join(group, work.part(at, end)) {
                    self.queue_behind(group, work.part(at, end));
                }
                at = end;
                continue;
            }
            let limit = self.unowned_limit(block, work.end);
            let blocks = limit.div_ceil(block_size) - block;
            let (mapping, run) = match self.map.lookup(block, LOOKUP_BLOCKS_MAX) {
                Ok(found) => found,
                Err(fault) => return self.park(st, fault, Some(work.part(at, work.end))),
            };
            let end = limit.min((block + run.min(blocks)) * block_size);
            self.show_to_fast(block, run, mapping);
            if mapping.state == State::Written {
                self.overwrite(st, work.part(at, end), mapping.place, false);
            } else if self.has_room(st) {
                let part = work.part(at, end);
                let blocks = self.first_blocks(&part, mapping, block + run);
                self.stage(part, blocks, mapping, false);
            } else {
                return self.stall(work.part(at, work.end));
            }
            at = end;
        }
    }

    /// Zeroes, discards, and what shrinking cuts off.
    fn dispatch_clear(&mut self, st: &mut dyn Storage, work: Work) {
        let block_size = self.block_size;
        // The part of the last block past the end of the disk belongs to nobody.
        let reaches_end = work.end == self.virtual_size;
        let whole_end = if reaches_end { work.end.next_multiple_of(block_size) } else { work.end };
        // A few small blocks are written with zeroes: their place would be lost to their neighbours.
        let in_place = block_size < GRANULE && self.is_short(&work) && !reaches_end;
        let mut at = work.start;
        while at < work.end {
            let block = at / block_size;
            if let Some((group, owned_end)) = self.owner_of(block) {
                let end = work.end.min(owned_end * block_size);
                self.queue_behind(group, work.part(at, end));
                at = end;
                continue;
            }
            let limit = self.unowned_limit(block, work.end);
            let covered = at.is_multiple_of(block_size) && whole_end >= (block + 1) * block_size;
            let blocks = if covered { limit.div_ceil(block_size) - block } else { 1 };
            let (mapping, len) = match self.map.lookup(block, blocks) {
                Ok(found) => found,
                Err(fault) => return self.park(st, fault, Some(work.part(at, work.end))),
            };
            // Not into a last block that is covered only in part.
            let len = if covered { len.min(whole_end / block_size - block) } else { len };
            let end = limit.min((block + len) * block_size);
            if covered && !in_place {
                if !self.has_room(st) {
                    return self.stall(work.part(at, work.end));
                }
                self.clear_blocks(st, work.kind, block, len, mapping);
            } else if mapping.state == State::Written && (covered || work.kind != WorkKind::Discard)
            {
                self.overwrite(st, work.part(at, end), mapping.place, true);
            }
            at = end;
        }
    }

    /// Clears whole blocks with one mapping.
    fn clear_blocks(
        &mut self,
        st: &mut dyn Storage,
        kind: WorkKind,
        block: u64,
        blocks: u64,
        mapping: Mapping,
    ) {
        // Where the host cannot punch, freed ranges pile up in the space list: past a bound the place
        // is kept instead.
        let keep = kind != WorkKind::Cut
            && (self.superblock.preallocation != Preallocation::Off
                || self.space.open.count() > OPEN_RANGES_MAX);
        let unmap = !matches!(kind, WorkKind::Zero { unmap: false });
        let birth = self.superblock.birth;
        let mut done = 0;
        while done < blocks {
            let length = u32::try_from(blocks - done).unwrap_or(u32::MAX);
            let first = block + done;
            let place = mapping.advanced(done * self.sectors_per_block).place;
            let entry = match mapping.state {
                State::Hole => None,
                State::Unwritten if keep || !unmap => None,
                State::Unwritten => Some(Entry::unmap(first, place, length)),
                State::Written if keep => Some(Entry::reserve(first, place, length, birth).keep()),
                State::Written if unmap => Some(Entry::unmap(first, place, length)),
                State::Written => Some(Entry::zero(first, place, length, birth).keep()),
                State::Zero if place != 0 && (keep || !unmap) => None,
                State::Zero if unmap => Some(Entry::unmap(first, place, length)),
                State::Zero => None,
            };
            if let Some(entry) = entry {
                self.commit(st, entry, 0);
            }
            done += u64::from(length);
        }
    }

    /// Writes over written blocks.
    fn overwrite(&mut self, st: &mut dyn Storage, work: Work, place: u64, zero: bool) {
        if self.geometry.alignment > SECTOR {
            let mapping = Mapping { state: State::Written, place, birth: 0 };
            return self.stage(work, self.blocks_of(&work), mapping, zero);
        }
        self.stats.overwrites += 1;
        let len = work.end - work.start;
        let segment = if zero {
            Segment::Zero(len)
        } else {
            let offset = self.buffer_offset(work.id, work.start);
            Segment::Request { request: work.id, offset, len }
        };
        let offset = place * SECTOR + work.start % self.block_size;
        let io = self.begin_io();
        self.piece_started(work.id);
        let op = Op::Write { offset, segments: vec![segment] };
        self.start(st, op, Pending::Overwrite { id: work.id, io });
    }

    // --- Ownership. ---

    /// The group that owns `block`, and the end of its blocks.
    pub(super) fn owner_of(&self, block: u64) -> Option<(u64, u64)> {
        if bugs::on(Bug::SkipBlockOwnership) {
            return None;
        }
        let (_, &id) = self.owned.range(..=block).next_back()?;
        let end = self.groups.get(&id)?.owned_end();
        (block < end).then_some((id, end))
    }

    /// `end`, or the start of the next owned block before it.
    pub(super) fn unowned_limit(&self, block: u64, end: u64) -> u64 {
        if bugs::on(Bug::SkipBlockOwnership) {
            return end;
        }
        let next = self.owned.range(block + 1..).next();
        next.map_or(end, |(&first, _)| end.min(first * self.block_size))
    }

    pub(super) fn queue_behind(&mut self, group: u64, work: Work) {
        self.stats.edge_waits += 1;
        self.piece_started(work.id);
        self.groups.get_mut(&group).expect("the owner exists").waiters.push_back(work);
    }

    /// Adds a piece to a group that is still staged, if it begins where the group's data ends or
    /// behind it.
    fn join(&mut self, group: u64, work: Work) -> bool {
        let group = self.groups.get_mut(&group).expect("the owner exists");
        let fits = !group.issued
            && group.class != Class::Rewrite
            && group.waiters.is_empty()
            && group.pieces.len() < PIECES_MAX
            && group.pieces.last().is_some_and(|last| last.end <= work.start);
        if fits {
            group.pieces.push(Piece { id: work.id, zero: false, start: work.start, end: work.end });
            self.stats.merges += 1;
            self.piece_started(work.id);
        }
        fits
    }

    /// The blocks that a piece lies in.
    fn blocks_of(&self, work: &Work) -> Range<u64> {
        work.start / self.block_size..work.end.div_ceil(self.block_size)
    }

    /// The request that a piece is of is shorter than what small blocks are kept together in. A piece of a longer
    /// one does not count: its neighbours are the request's.
    fn is_short(&self, work: &Work) -> bool {
        use crate::request::Request;
        match self.active.get(&work.id).map(|active| active.request) {
            Some(
                Request::Write { len, .. }
                | Request::WriteZeroes { len, .. }
                | Request::Discard { len, .. },
            ) => len < GRANULE,
            _ => false,
        }
    }

    /// The blocks that a first write takes for a piece: those it lies in, and where blocks are small, those around
    /// it that are nobody's and mapped as it is, up to `run_end`. In a hole these are the 4 KiB around a short
    /// one: each of them would have a place of its own otherwise, far from its neighbours. In allocated space they
    /// are what fills the blocks of the host, which must not see a part of one first.
    fn first_blocks(&mut self, work: &Work, mapping: Mapping, run_end: u64) -> Range<u64> {
        let Range { start: first, end } = self.blocks_of(work);
        let granule = GRANULE / self.block_size;
        let (ahead, behind) = match mapping.state {
            _ if granule <= 1 => return first..end,
            State::Hole if self.is_short(work) => {
                (first % granule, end.next_multiple_of(granule) - end)
            }
            State::Unwritten => {
                let place_end = mapping.place + (end - first) * self.sectors_per_block;
                let in_blocks = |sectors: u64| sectors % PHASES / self.sectors_per_block;
                (in_blocks(mapping.place), in_blocks(PHASES - place_end % PHASES))
            }
            _ => return first..end,
        };
        let disk_end = self.virtual_size.div_ceil(self.block_size);
        let limit = (end + behind).min(run_end).min(disk_end);
        let limit = self.unowned_limit(first, limit * self.block_size) / self.block_size;
        let start = first - ahead.min(first);
        let like_it = |(other, run): (Mapping, u64)| {
            other.state == mapping.state
                && run == ahead
                && other.advanced(ahead * self.sectors_per_block).place == mapping.place
        };
        let free = start + ahead == first
            && ahead > 0
            && self.owner_of(start).is_none()
            && self.owned.range(start..first).next().is_none()
            && self.map.lookup(start, ahead).is_ok_and(like_it);
        (if free { start } else { first })..limit
    }

    /// Takes ownership of blocks for a piece that lies in them and stages its write.
    fn stage(&mut self, work: Work, blocks: Range<u64>, mapping: Mapping, zero: bool) {
        let Range { start: first, end } = blocks;
        let mapping = Mapping {
            place: mapping
                .place
                .saturating_sub((work.start / self.block_size - first) * self.sectors_per_block),
            ..mapping
        };
        let class = match mapping.state {
            State::Written => Class::Rewrite,
            _ if mapping.place == 0 => Class::New,
            _ => Class::InPlace,
        };
        self.piece_started(work.id);
        let piece = Piece { id: work.id, zero, start: work.start, end: work.end };
        if class != Class::Rewrite
            && let Some((_, id)) = self.owned.range(..first).next_back().map(|(a, b)| (*a, *b))
            && let Some(group) = self.groups.get_mut(&id)
            && group.end == first
            && !group.issued
            && group.class == class
            && group.waiters.is_empty()
            && group.pieces.len() < PIECES_MAX
            && (end - group.first) * self.block_size <= GROUP_BYTES_MAX
            && (class == Class::New
                || group.place + (first - group.first) * self.sectors_per_block == mapping.place)
        {
            group.end = end;
            group.pieces.push(piece);
            self.stats.merges += 1;
            return;
        }
        let id = self.next_group;
        self.next_group += 1;
        self.owned.insert(first, id);
        self.staged.push(id);
        self.reserved += RUNS_RESERVED;
        self.groups.insert(
            id,
            Group {
                first,
                end,
                class,
                place: mapping.place,
                pieces: vec![piece],
                issued: false,
                runs: Vec::new(),
                operations: 0,
                error: None,
                waiters: VecDeque::new(),
                reserved: RUNS_RESERVED,
                head: None,
                tail: None,
                committed: false,
                open_end: None,
                moving: None,
            },
        );
    }

    pub(super) fn fail_stalled(&mut self, error: RequestError) {
        for work in std::mem::take(&mut self.stalled) {
            self.piece_done(work.id, Err(error));
        }
    }

    /// Groups that wait for a window get none.
    pub(super) fn fail_starved(&mut self, st: &mut dyn Storage, error: RequestError) {
        for id in std::mem::take(&mut self.starved) {
            self.groups.get_mut(&id).expect("starved").error = Some(error);
            self.finish_group(st, id);
        }
    }

    /// Sends staged groups to storage, as far as there are places.
    pub(super) fn issue_staged(&mut self, st: &mut dyn Storage) {
        if self.failed {
            let staged = std::mem::take(&mut self.staged);
            self.starved.extend(staged);
            return self.fail_starved(st, RequestError::Failed);
        }
        let starved = std::mem::take(&mut self.starved);
        let staged = std::mem::take(&mut self.staged);
        for id in starved.into_iter().chain(staged) {
            if !self.starved.is_empty() {
                // First come, first served: what cannot be placed now goes behind.
                self.starved.push_back(id);
                continue;
            }
            match self.place_group(st, id) {
                Ok(true) => self.issue(st, id),
                Ok(false) => self.starved.push_back(id),
                Err(error) => {
                    self.groups.get_mut(&id).expect("staged").error = Some(error);
                    self.finish_group(st, id);
                }
            }
        }
    }

    /// Finds places for a group's blocks; false if it has to wait for a window.
    fn place_group(&mut self, st: &mut dyn Storage, id: u64) -> Result<bool, RequestError> {
        let group = self.groups.get_mut(&id).expect("staged");
        if !matches!(group.class, Class::New | Class::Move) {
            let place = Place::plain(group.place, group.end - group.first);
            group.runs = vec![Run { first: group.first, place }];
            return Ok(true);
        }
        loop {
            let group = self.groups.get(&id).expect("staged");
            let first = group.runs.last().map_or(group.first, |run| run.first + run.place.blocks);
            let missing = group.end - first;
            if missing == 0 {
                return Ok(true);
            }
            let more = group.runs.len() as u64 >= group.reserved;
            if let Some(end) = self.move_ends_at(id, first) {
                self.groups.get_mut(&id).expect("staged").end = end;
                return Ok(true);
            }
            if more && !self.has_room(st) {
                // What it holds must not wait for others: they may wait for what it holds.
                self.cut_group(id, first);
                return Ok(true);
            }
            let wish = self.wish(id, first);
            let place = match self.space.allocate(&wish) {
                Some(place) => {
                    self.small_since_flush += u64::from(wish.small) * place.blocks;
                    place
                }
                None if self.space.window_is_opening()
                    || self.space.pool.is_busy()
                    || self.space.plan_window().is_some() =>
                {
                    return Ok(false);
                }
                None => match self.space.allocate_dirty(missing) {
                    Some(place) => place,
                    None if self.space.awaits_sync() || self.punches > 0 => return Ok(false),
                    // A reserve that has become too large is free space.
                    None if self.leftovers.is_some() => {
                        self.clear_up(st, u64::MAX);
                        continue;
                    }
                    None => return Err(RequestError::Storage(StorageError::NoSpace)),
                },
            };
            let group = self.groups.get_mut(&id).expect("staged");
            group.runs.push(Run { first, place });
            if more {
                group.reserved += 1;
                self.reserved += 1;
            }
        }
    }

    /// What kind of place would suit a group's blocks from `first` on.
    fn wish(&self, id: u64, first: u64) -> Wish {
        let group = &self.groups[&id];
        let unit = PHASES * SECTOR;
        let start = group.first * self.block_size;
        // Data that is moved comes in whole blocks, many of them.
        let (bytes, origin) = match &group.pieces[..] {
            [] => (start..group.end * self.block_size, start),
            [head, ..] => {
                let end = group.pieces.last().map_or(head.end, |tail| tail.end);
                (head.start..end, head.start - self.buffer_offset(head.id, head.start))
            }
        };
        // Where storage takes any sector, the data of a request, which is aligned in memory, is better aligned
        // there than blocks are.
        let free = self.geometry.alignment == SECTOR;
        let from = first * self.block_size;
        let phase = if free { (from % unit + unit - origin % unit) / SECTOR % PHASES } else { 0 };
        let whole = self.block_size.is_multiple_of(unit)
            || bytes.end == group.end * self.block_size
                && (bytes.end - bytes.start).is_multiple_of(unit);
        let small = !group.pieces.is_empty()
            && bytes.end - bytes.start <= self.options.zero_ahead_write_max;
        Wish {
            first,
            blocks: group.end - first,
            phase,
            small,
            prepared: small
                && self.small_since_flush * self.block_size < self.options.zero_ahead_burst,
            goes_on: whole
                && group.class == Class::New
                && first == group.first
                && bytes.start == start
                && origin <= start,
        }
    }

    fn end_of(&self, place: &Place) -> u64 {
        place.sector + place.blocks * self.sectors_per_block
    }

    /// Gives up a group's blocks from `block` on; their pieces are taken up again when there is room.
    fn cut_group(&mut self, id: u64, block: u64) {
        let cut = block * self.block_size;
        let group = self.groups.get_mut(&id).expect("staged");
        assert!(group.first < block && block < group.end && group.class == Class::New);
        group.end = block;
        let mut rest = Vec::new();
        let mut split = Vec::new();
        for piece in std::mem::take(&mut group.pieces) {
            let work = |start| Work { id: piece.id, kind: WorkKind::Write, start, end: piece.end };
            if piece.start >= cut {
                rest.push(work(piece.start));
                continue;
            }
            if piece.end > cut {
                split.push(work(cut));
            }
            group.pieces.push(Piece { end: piece.end.min(cut), ..piece });
        }
        let (beyond, waiters) =
            std::mem::take(&mut group.waiters).into_iter().partition(|work| work.start >= cut);
        group.waiters = waiters;
        rest.extend::<VecDeque<Work>>(beyond);
        for work in split {
            self.stall(work);
        }
        self.stalled.extend(rest);
    }

    fn issue(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get_mut(&id).expect("placed");
        group.issued = true;
        if group.class == Class::Move {
            return self.moves.push(id);
        }
        if group.class == Class::Rewrite && self.read_edges(st, id) {
            return;
        }
        self.write_group(st, id);
    }

    /// Starts the reads of a read-modify-write; false if none is needed.
    fn read_edges(&mut self, st: &mut dyn Storage, id: u64) -> bool {
        let align = self.geometry.alignment;
        let group = self.groups.get_mut(&id).expect("issued");
        let piece = group.pieces[0];
        let base = group.place * SECTOR;
        let head = piece.start - group.first * self.block_size;
        let tail = piece.end - group.first * self.block_size;
        let mut reads = Vec::new();
        if !head.is_multiple_of(align) {
            reads.push((Edge::Head, base + head / align * align));
        }
        if !tail.is_multiple_of(align) {
            reads.push((Edge::Tail, base + tail / align * align));
        }
        group.operations = reads.len() as u32;
        let any = !reads.is_empty();
        for (edge, offset) in reads {
            let op = Op::ReadBytes { offset, len: align };
            self.start(st, op, Pending::GroupEdge { group: id, edge });
        }
        any
    }

    pub(super) fn edge_arrived(
        &mut self,
        st: &mut dyn Storage,
        id: u64,
        edge: Edge,
        result: Result<Done, StorageError>,
    ) {
        let align = self.geometry.alignment as usize;
        let group = self.groups.get_mut(&id).expect("its operation was under way");
        let piece = group.pieces[0];
        let within = |at: u64| (at - group.first * self.block_size) as usize % align;
        match result {
            Ok(Done::Bytes(bytes)) if bytes.len() == align => match edge {
                Edge::Head => group.head = Some(bytes[..within(piece.start)].into()),
                Edge::Tail => group.tail = Some(bytes[within(piece.end)..].into()),
            },
            Ok(_) => group.error = Some(StorageError::Io(super::EIO).into()),
            Err(error) => group.error = Some(error.into()),
        }
        group.operations -= 1;
        if group.operations > 0 {
            return;
        }
        if group.error.is_some() {
            self.finish_group(st, id);
        } else {
            self.write_group(st, id);
        }
    }

    fn write_group(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get(&id).expect("issued");
        let mut writes = Vec::with_capacity(group.runs.len());
        let mut open_end = false;
        if group.class == Class::Rewrite {
            self.stats.overwrites += 1;
            let piece = group.pieces[0];
            let mut segments: Vec<Segment> = Vec::new();
            let mut offset = group.place * SECTOR + (piece.start - group.first * self.block_size);
            if let Some(head) = &group.head {
                offset -= head.len() as u64;
                segments.push(Segment::Bytes(Arc::clone(head)));
            }
            segments.push(self.segment(&piece, piece.start, piece.end));
            segments.extend(group.tail.iter().map(|tail| Segment::Bytes(Arc::clone(tail))));
            writes.push((offset, segments));
        } else {
            for run in &group.runs {
                let start = run.first * self.block_size;
                let end = start + run.place.blocks * self.block_size;
                let mut segments = self.padded(&group.pieces, start, end);
                let mut offset = run.place.sector * SECTOR;
                let mut ahead = (run.place.blocks - 1) * self.block_size;
                if !run.place.written {
                    offset -= run.place.lead * SECTOR;
                    ahead += run.place.lead * SECTOR;
                    widen(&mut segments, run.place.lead * SECTOR, run.place.pad * SECTOR);
                }
                self.trim_padding(&run.place, offset, &mut segments);
                open_end = run.place.open_end && end_is_free(&segments, ahead);
                if open_end {
                    // To whoever goes on there, and to no storage.
                    segments.pop();
                }
                if !run.place.written {
                    // In a hole, padding would take space on the host.
                    Segment::trim(&mut offset, &mut segments);
                }
                writes.push((offset, segments));
            }
            self.stats.first_writes += writes.len() as u64;
        }
        self.groups.get_mut(&id).expect("issued").operations = writes.len() as u32;
        for (offset, segments) in writes {
            self.start(st, Op::Write { offset, segments }, Pending::GroupWrite { group: id });
        }
        if self.may_commit_early(id) || bugs::on(Bug::ConvertBeforeData) {
            self.groups.get_mut(&id).expect("issued").committed = true;
            self.commit_group(st, id);
            if open_end && self.geometry.alignment == SECTOR {
                self.leave_end(id);
            }
        }
    }

    /// Gives up the ownership of a group's last block, which counts as written and whose rest nobody pads: a
    /// write there is one beside the group's. Like any other, the group's own has a number now.
    fn leave_end(&mut self, id: u64) {
        let io = self.begin_io();
        if bugs::on(Bug::LeaveUnnumbered) {
            self.running_io.remove(&io);
        }
        let group = self.groups.get_mut(&id).expect("issued");
        group.open_end = Some(io);
        if group.owned_end() == group.first {
            self.owned.remove(&group.first);
        }
    }

    /// The group's entries may take effect with its data on the way: its places read as zeroes until the
    /// data lands, as the blocks did, so that reads, a journal record and a crash may come in between.
    /// The blocks stay owned, and out of the fast path's sight.
    fn may_commit_early(&self, id: u64) -> bool {
        let group = &self.groups[&id];
        group.class == Class::New && group.runs.iter().all(|run| run.place.known_zero)
    }

    /// Marks the padding that a known-zero place does not need: all of it if the host has it written, else
    /// what lies in whole blocks of the host, but for one beside the data whose other part is not ours. The
    /// blocks are owned by the group, so that nobody is in the way of a storage that writes it nevertheless.
    fn trim_padding(&self, place: &Place, offset: u64, segments: &mut Vec<Segment>) {
        if !place.known_zero {
            return;
        }
        let host = if place.written { SECTOR } else { self.geometry.host_block };
        let unit = host.max(self.geometry.alignment);
        let mut start = offset;
        if let [Segment::Zero(len), _, ..] = segments[..]
            && (place.lead == 0 || len > unit)
        {
            start = start.max((offset + len) / unit * unit);
            segments[0] = Segment::Zero(offset + len - start);
            if start > offset {
                segments.insert(0, Segment::Spare(start - offset));
            }
        }
        if let [.., _, Segment::Zero(len)] = segments[..]
            && (place.written || place.pad == 0 || len > unit)
        {
            let end = offset + segments.iter().map(Segment::len).sum::<u64>();
            let cut = end - (end - len).next_multiple_of(unit).min(end);
            let last = segments.len() - 1;
            segments[last] = Segment::Zero(len - cut);
            let beyond = if bugs::on(Bug::SpareBeyondPlace) { unit } else { 0 };
            segments.push(Segment::Spare(cut + beyond));
        }
        segments.retain(|segment| !segment.is_empty());
    }

    fn segment(&self, piece: &Piece, start: u64, end: u64) -> Segment {
        if piece.zero {
            return Segment::Zero(end - start);
        }
        let offset = self.buffer_offset(piece.id, start);
        Segment::Request { request: piece.id, offset, len: end - start }
    }

    /// The data of `start .. end`, zeroes where no piece has any.
    fn padded(&self, pieces: &[Piece], start: u64, end: u64) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut at = start;
        for piece in pieces {
            let (from, to) = (piece.start.max(start), piece.end.min(end));
            if from >= to {
                continue;
            }
            if from > at {
                segments.push(Segment::Zero(from - at));
            }
            segments.push(self.segment(piece, from, to));
            at = to;
        }
        if at < end {
            segments.push(Segment::Zero(end - at));
        }
        segments
    }

    pub(super) fn group_write_ended(
        &mut self,
        st: &mut dyn Storage,
        id: u64,
        result: Result<Done, StorageError>,
    ) {
        let group = self.groups.get_mut(&id).expect("its operation was under way");
        match result {
            Ok(_) => self.landed += 1,
            Err(error) => group.error = Some(error.into()),
        }
        group.operations -= 1;
        if group.operations == 0 {
            self.finish_group(st, id);
        }
    }

    /// The group's blocks count as written from now on.
    fn commit_group(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get(&id).expect("issued");
        if group.class == Class::Move {
            return self.commit_move(st, id);
        }
        for (entry, known_zero) in self.entries_of(group) {
            let ordered = !known_zero && !bugs::on(Bug::SkipOrderedSync);
            let mark = if ordered { self.landed } else { 0 };
            self.commit(st, entry, mark);
        }
    }

    /// What makes the group's blocks written, and whether their places were known to be zero.
    fn entries_of(&self, group: &Group) -> Vec<(Entry, bool)> {
        let birth = self.superblock.birth;
        let entry = |run: &Run| {
            // A run is at most a group's size: far fewer blocks than 2^32.
            let length = run.place.blocks as u32;
            let entry = match group.class {
                Class::New => Entry::map(run.first, run.place.sector, length, birth),
                Class::InPlace => Entry::convert(run.first, run.place.sector, length, birth),
                Class::Rewrite | Class::Move => return None,
            };
            Some((entry, run.place.known_zero))
        };
        group.runs.iter().filter_map(entry).collect()
    }

    /// All of a group's operations have ended: its blocks are free for the next.
    pub(super) fn finish_group(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get(&id).expect("finished once");
        let (failed, committed) = (group.error.is_some(), group.committed);
        if !failed && !committed {
            self.commit_group(st, id);
        }
        let group = self.groups.remove(&id).expect("finished once");
        if let Some(io) = group.open_end {
            self.running_io.remove(&io);
        }
        // One that has left its only block owns nothing any more.
        if group.owned_end() > group.first {
            self.owned.remove(&group.first);
        }
        self.reserved -= group.reserved;
        self.show_group(&group);
        let new = matches!(group.class, Class::New | Class::Move);
        for Run { place, .. } in &group.runs {
            let (start, end) = (place.sector, self.end_of(place));
            if failed && !committed && new {
                // Written to, successfully or not: the place is no longer known to be zero.
                self.space.quarantine(start - place.lead..end + place.pad, 0, 0);
                continue;
            }
            // The blocks keep their places, which hold zeroes or data; what is around them, zeroes at most.
            if place.lead > 0 {
                self.space.quarantine(start - place.lead..start, 0, 0);
            }
            if place.pad > 0 {
                self.space.add_scrap(end..end + place.pad, place.known_zero && !failed);
            }
        }
        for piece in &group.pieces {
            self.piece_done(piece.id, group.error.map_or(Ok(()), Err));
        }
        self.move_ended(st, &group);
        for work in group.waiters {
            self.dispatch(st, work);
        }
    }

    /// The fast path may know of the group's blocks now: its writes could overtake the padding before.
    fn show_group(&self, group: &Group) {
        if group.error.is_none() && group.class != Class::Move {
            for (mut entry, _) in self.entries_of(group) {
                // Of a block that was left before, others may have made something else.
                let end = if bugs::on(Bug::FastShowsLeft) { group.end } else { group.owned_end() };
                entry.length = entry.length.min(end.saturating_sub(entry.logical) as u32);
                self.show_first_write(&entry);
            }
        }
    }

    // --- Room. ---

    pub(super) fn stall(&mut self, work: Work) {
        self.piece_started(work.id);
        self.stalled.push_back(work);
    }

    pub(super) fn retry_stalled(&mut self, st: &mut dyn Storage) {
        for _ in 0..self.stalled.len() {
            if self.failed {
                return self.fail_stalled(RequestError::Failed);
            }
            if !self.has_room(st) {
                return;
            }
            let Some(work) = self.stalled.pop_front() else { return };
            self.dispatch(st, work);
        }
    }
}

/// No zeroes on the way are in the last block of a write, which `ahead` bytes of it are before, and there is
/// something of it left: zeroes between two pieces could be there, and so could those before the first.
fn end_is_free(segments: &[Segment], ahead: u64) -> bool {
    let [written @ .., Segment::Spare(_)] = segments else { return false };
    let data = |segment: &Segment| matches!(segment, Segment::Request { .. });
    let from = usize::from(written.len() > 1 && written[0].len() <= ahead);
    !written.is_empty() && written[from..].iter().all(data)
}

/// Puts zeroes around a write.
fn widen(segments: &mut Vec<Segment>, before: u64, behind: u64) {
    match segments.first_mut() {
        Some(Segment::Zero(len)) => *len += before,
        _ => segments.insert(0, Segment::Zero(before)),
    }
    match segments.last_mut() {
        Some(Segment::Zero(len)) => *len += behind,
        _ => segments.push(Segment::Zero(behind)),
    }
    segments.retain(|segment| !segment.is_empty());
}

/// Entries put aside for a first write to begin with; more as it gets more runs.
const RUNS_RESERVED: u64 = 2;
