//! Defragmentation: data that lies scattered over the image file is moved together.
//!
//! A move owns its blocks like a first write. Whoever wants to write them queues behind it (the fast
//! path does not find them); reads go on at the old place. Once everything that was writing there has ended, the data is read, written
//! to its new place, and only when it is durable there, a record exchanges the places: UNMAP of the
//! old and MAP of the new one are a group, so that neither a crash nor a death of the process can
//! separate them.

use super::data::{Class, Group, Work};
use super::durability::LOG_MARGIN;
use super::{Disk, EIO, Pending};
use crate::bugs::{self, Bug};
use crate::map::State;
use crate::request::RequestError;
use crate::storage::{Done, Op, SECTOR, Segment, Storage, StorageError};
use exd_format::{Entry, Preallocation};
use std::sync::Arc;

/// A move takes no more than this at a time.
const MOVE_BYTES_MAX: u64 = 1 << 20;
/// Scattered pieces of one move: each costs two entries, which must fit into a record together.
const SOURCES_MAX: usize = 32;
/// New places of one move; where free space is scattered too, less is moved at a time.
const RUNS_MAX: usize = 4;
/// Pieces that are this long on average, in bytes, are long enough: reading them one by one costs
/// no more than reading them at once.
const LONG_ENOUGH: u64 = 256 << 10;

/// Blocks that lie one behind the other.
#[derive(Clone, Copy, Debug)]
struct Source {
    first: u64,
    blocks: u64,
    place: u64,
}

/// What a group that moves data needs besides its blocks.
pub(super) struct Moving {
    /// The request, and what of it comes after this move.
    work: Work,
    sources: Vec<Source>,
    /// I/O numbered below this may still change the old place.
    io: u64,
    data: Vec<Option<Arc<[u8]>>>,
}

impl Disk {
    /// Moves the first scattered run of the work's range; the rest follows when that has ended.
    pub(super) fn dispatch_move(&mut self, st: &mut dyn Storage, work: Work) {
        // The space of a preallocated image is not given up, and so not exchanged either.
        if self.superblock.preallocation != Preallocation::Off {
            return;
        }
        let block_size = self.block_size;
        let most = self.sources_max();
        let mut block = work.start / block_size;
        let end = work.end.div_ceil(block_size);
        while block < end {
            if let Some((group, _)) = self.owner_of(block) {
                let start = work.start.max(block * block_size);
                return self.queue_behind(group, Work { start, ..work });
            }
            let window_end = (block * block_size / MOVE_BYTES_MAX + 1) * MOVE_BYTES_MAX;
            let limit = self.unowned_limit(block, window_end.min(end * block_size));
            let limit = limit.div_ceil(block_size);
            let mut sources: Vec<Source> = Vec::new();
            let mut at = block;
            while at < limit {
                let (mapping, blocks) = match self.map.lookup(at, limit - at) {
                    Ok(found) => found,
                    Err(fault) => {
                        let start = work.start.max(block * block_size);
                        return self.park(st, fault, Some(Work { start, ..work }));
                    }
                };
                if mapping.state != State::Written {
                    if sources.is_empty() {
                        at += blocks;
                        block = at;
                        continue;
                    }
                    break;
                }
                let full = sources.len() == most;
                match sources.last_mut() {
                    Some(last)
                        if last.place + last.blocks * self.sectors_per_block == mapping.place =>
                    {
                        last.blocks += blocks;
                    }
                    _ if full => break,
                    _ => sources.push(Source { first: at, blocks, place: mapping.place }),
                }
                at += blocks;
            }
            let bytes = (at - block) * block_size;
            if sources.len() < 2 || bytes / sources.len() as u64 >= LONG_ENOUGH {
                block = at.max(block + 1);
                continue;
            }
            if !self.has_room(st) || self.log_room() < entries(&sources) {
                let start = work.start.max(block * block_size);
                self.sync_due = true;
                return self.stall(Work { start, ..work });
            }
            return self.stage_move(block, at, sources, work);
        }
    }

    /// The completion log holds all entries of a move, whatever its size.
    fn sources_max(&self) -> usize {
        let slots = self.log.as_ref().map_or(u64::MAX, |log| log.slots() - LOG_MARGIN);
        (slots / 4).saturating_sub(RUNS_MAX as u64).clamp(2, SOURCES_MAX as u64) as usize
    }

    fn stage_move(&mut self, first: u64, end: u64, sources: Vec<Source>, work: Work) {
        let id = self.next_group;
        self.next_group += 1;
        let reserved = entries(&sources);
        self.reserved += reserved;
        self.owned.insert(first, id);
        self.staged.push(id);
        self.piece_started(work.id);
        if !bugs::on(Bug::FastShowsMoving) {
            self.hide_blocks_from_fast(first..end);
        }
        let data = vec![None; sources.len()];
        let moving = Moving { work, sources, io: self.next_io, data };
        self.groups.insert(id, Group::moving(first, end, reserved, moving));
    }

    /// Where a group's blocks end if it gets no more places than it has; `None` if it may have more.
    pub(super) fn move_ends_at(&self, id: u64, next: u64) -> Option<u64> {
        let group = self.groups.get(&id)?;
        (group.class == Class::Move && group.runs.len() >= RUNS_MAX).then_some(next)
    }

    fn moves_wait_for_io(&self) -> Option<u64> {
        let moving = |id| self.groups.get(id)?.moving.as_ref();
        self.moves.iter().filter_map(moving).map(|moving| moving.io).max()
    }

    /// Starts the reads of moves that have the old place for themselves.
    pub(super) fn advance_moves(&mut self, st: &mut dyn Storage) {
        if let Some(io) = self.moves_wait_for_io() {
            self.turn_fast_epochs(io);
        }
        let drained = self.drained_io();
        for id in std::mem::take(&mut self.moves) {
            let group = self.groups.get_mut(&id).expect("issued");
            let end = group.end;
            let moving = group.moving.as_mut().expect("it moves data");
            if moving.io > drained && !bugs::on(Bug::MoveBeforeDrain) {
                self.moves.push(id);
                continue;
            }
            moving.sources.retain_mut(|source| {
                source.blocks = source.blocks.min(end.saturating_sub(source.first));
                source.blocks > 0
            });
            moving.data.truncate(moving.sources.len());
            let sources = moving.sources.clone();
            group.operations = sources.len() as u32;
            for (index, source) in sources.into_iter().enumerate() {
                let (offset, len) = (source.place * SECTOR, source.blocks * self.block_size);
                let pending = Pending::MoveRead { group: id, source: index };
                self.start(st, Op::ReadBytes { offset, len }, pending);
            }
        }
    }

    pub(super) fn move_read_ended(
        &mut self,
        st: &mut dyn Storage,
        id: u64,
        source: usize,
        result: Result<Done, StorageError>,
    ) {
        let block_size = self.block_size;
        let group = self.groups.get_mut(&id).expect("its operation was under way");
        let moving = group.moving.as_mut().expect("it moves data");
        let len = moving.sources[source].blocks * block_size;
        match result {
            Ok(Done::Bytes(bytes)) if bytes.len() as u64 == len => {
                moving.data[source] = Some(bytes.into());
            }
            Ok(_) => group.error = Some(StorageError::Io(EIO).into()),
            Err(error) => group.error = Some(error.into()),
        }
        group.operations -= 1;
        if group.operations > 0 {
            return;
        }
        if self.failed {
            // What has not been copied must not count as moved.
            group.error.get_or_insert(RequestError::Failed);
        }
        if group.error.is_some() {
            return self.finish_group(st, id);
        }
        self.write_moved(st, id);
    }

    fn write_moved(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get_mut(&id).expect("issued");
        let moving = group.moving.as_ref().expect("it moves data");
        let mut writes = Vec::with_capacity(group.runs.len());
        for run in &group.runs {
            let run_end = run.first + run.place.blocks;
            let mut segments = Vec::new();
            for (source, data) in moving.sources.iter().zip(&moving.data) {
                let from = run.first.max(source.first);
                let to = run_end.min(source.first + source.blocks);
                if from < to {
                    let data = data.as_ref().expect("all reads ended well");
                    let at = ((from - source.first) * self.block_size) as usize;
                    let len = ((to - from) * self.block_size) as usize;
                    segments.push(Segment::Bytes(data[at..at + len].into()));
                }
            }
            if run.place.pad > 0 {
                segments.push(Segment::Zero(run.place.pad * SECTOR));
            }
            writes.push((run.place.sector * SECTOR, segments));
        }
        group.operations = writes.len() as u32;
        for (offset, segments) in writes {
            self.start(st, Op::Write { offset, segments }, Pending::GroupWrite { group: id });
        }
    }

    /// The new places count from now on.
    pub(super) fn commit_move(&mut self, st: &mut dyn Storage, id: u64) {
        let group = self.groups.get_mut(&id).expect("issued");
        let runs = group.runs.clone();
        let moving = group.moving.as_ref().expect("it moves data");
        let sources = moving.sources.clone();
        let birth = self.superblock.birth;
        // The old data is durable: its copy must be, too, before a record may name it.
        let mark = if bugs::on(Bug::MoveWithoutOrder) { 0 } else { self.landed };
        for run in runs {
            let run_end = run.first + run.place.blocks;
            for source in &sources {
                let from = run.first.max(source.first);
                let to = run_end.min(source.first + source.blocks);
                if from >= to {
                    continue;
                }
                let length = (to - from) as u32;
                let old = source.place + (from - source.first) * self.sectors_per_block;
                let new = run.place.sector + (from - run.first) * self.sectors_per_block;
                let gone = Entry::unmap(from, old, length);
                let gone = if bugs::on(Bug::MoveInHalves) { gone } else { gone.more() };
                self.commit(st, gone, mark);
                self.commit(st, Entry::map(from, new, length, birth), mark);
                self.stats.moved_bytes += u64::from(length) * self.block_size;
            }
        }
    }

    /// A move has ended: the rest of its request goes on.
    pub(super) fn move_ended(&mut self, st: &mut dyn Storage, group: &Group) {
        let Some(moving) = &group.moving else { return };
        let work = moving.work;
        let start = group.end * self.block_size;
        // Whoever wants to freeze or resize need not wait for all of it.
        let wanted = self.freeze.is_none() && self.resizing.is_none();
        if group.error.is_none() && start < work.end && wanted {
            self.piece_started(work.id);
            self.dispatch(st, Work { start, ..work });
        }
        self.piece_done(work.id, group.error.map_or(Ok(()), Err));
    }
}

/// Entries that exchanging the places of the sources takes at most.
fn entries(sources: &[Source]) -> u64 {
    2 * (sources.len() + RUNS_MAX) as u64
}
