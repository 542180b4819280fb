//! The checkpoint: the changes since the last one become a new tree, and the journal is free again.
//!
//! 1. *Freeze*: the active overlay, the space list and the end of the journal as they are now.
//! 2. *Build*: the merged tree goes, node by node, into space that the frozen list shows as open;
//!    then the new list.
//! 3. A sync (the guest's, if there is one) makes them durable, and with them all data they map.
//! 4. The superblock of the new generation is written to one slot, synced, written to the other,
//!    synced.
//! 5. Only now may anything be reused that the old generation needs: its nodes, its list, its part of
//!    the ring.
//!
//! Steps 3 and 4 wait for the guest's flushes and sync on their own only when space is needed.

use super::durability::PendingEntry;
use super::leftovers::Leftovers;
use super::{Disk, Pending};
use crate::bugs::{self, Bug};
use crate::error::Error;
use crate::journal::Tail;
use crate::map::{Merge, MergeStep};
use crate::ranges::RangeSet;
use crate::request::RequestError;
use crate::space::Space;
use crate::storage::{Done, Op, RequestId, SECTOR, Segment, Storage, StorageError};
use exd_format::{
    AreaPointer, Entry, JournalSegment, NodePointer, SEGMENT_ALIGN, SEGMENTS_MAX, SPACE_LIST_MAX,
    SpaceList, State, Superblock,
};
use std::collections::VecDeque;
use std::ops::Range;

/// Node writes under way at once, of up to [`BATCH`] nodes each. Few, since nodes are made when one has
/// ended, and with every one that is made requests wait for the engine.
const WRITES_MAX: usize = 4;
/// The same where requests wait for the checkpoint itself, or there are none.
const WRITES_MAX_AWAITED: usize = 32;
/// Lists' worth of room that a checkpoint puts aside in one piece: its own, and the next one's.
const LIST_ROOM: u64 = 2;
/// The same for the checkpoint that closes the image: the next session begins with what is left.
pub(super) const CLOSED_LISTS: u64 = 4;
/// Changes for which room is put aside beyond those that are there.
const CHANGES_AHEAD: u64 = 32768;
/// On a device of a fixed size the ring grows by no more than this part of it at a time.
const DEVICE_PART: u64 = 64;
/// Nodes made at a time.
const BATCH: usize = 16;
/// Nodes read ahead at a time.
const READ_AHEAD_MAX: u64 = 128;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Nodes are being made and written.
    Build,
    /// All nodes are made; the list is to be written.
    List,
    /// Everything is submitted; waiting for it to land.
    Landing,
    /// Waiting for a sync after `mark`.
    Sync { mark: u64, next: Next },
    /// A superblock slot is being written.
    Writing { slot: u8 },
    /// That failed; to be tried again.
    Retry { slot: u8 },
}

/// What follows a sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    Slot(u8),
    Commit,
}

/// A checkpoint under way.
pub(crate) struct Checkpoint {
    phase: Phase,
    merge: Merge,
    open: RangeSet,
    zero: RangeSet,
    data_end: u64,
    applied: u64,
    tail: Tail,
    virtual_size: u64,
    root: NodePointer,
    list: AreaPointer,
    /// Room for the list, put aside before nodes are made, and behind it room for the next list: what
    /// of it is left when this checkpoint is committed is what recovery begins with.
    list_room: Range<u64>,
    /// Sectors of nodes that the new tree brings, and of those it no longer uses.
    written: RangeSet,
    retired: RangeSet,
    writes: usize,
    error: Option<RequestError>,
    superblock: Option<Box<Superblock>>,
    /// Nodes it may need, all in all.
    budget: u64,
    /// Changes for which there is room while it runs.
    meanwhile: u64,
    /// It may sync on its own.
    pub(crate) urgent: bool,
    /// The segment it adds to the ring.
    grow: Option<JournalSegment>,
    /// Requests that it answers; what is asked for later is answered by the next.
    waiters: Vec<RequestId>,
    /// Changes that no record may speak of any more: they may lie past the new end of the disk.
    pub(crate) withheld: VecDeque<PendingEntry>,
    state: State,
}

/// A segment being added to the ring.
pub(crate) struct Growth {
    range: Range<u64>,
    zeroed: bool,
}

impl Growth {
    pub(crate) fn into_range(self) -> Range<u64> {
        self.range
    }
}

impl Checkpoint {
    /// A sync would let it go on.
    pub(crate) fn wants_sync(&self) -> bool {
        matches!(self.phase, Phase::Sync { .. })
    }

    /// Notes the nodes that the merge has written and retired since it was asked last.
    fn note_nodes(&mut self, node_sectors: u64) {
        let sectors = |address: u64| address / SECTOR..address / SECTOR + node_sectors;
        for range in self.merge.written.drain(..).map(sectors) {
            self.open.remove(range.clone());
            self.written.insert(range);
        }
        for range in self.merge.retired.drain(..).map(sectors) {
            self.open.insert(range.clone());
            self.retired.insert(range);
        }
    }
}

/// Upper bound of the nodes that merging `entries` changes into a tree of `nodes` nodes writes.
fn nodes_needed(entries: u64, nodes: u64, leaf_capacity: u64) -> u64 {
    // Each change touches a leaf and may split it; what is added fills leaves at least by half.
    let leaves = entries.min(nodes).saturating_mul(2) + 4 * entries / leaf_capacity + 2;
    leaves.saturating_add(leaves / 32 + 16)
}

impl Disk {
    fn leaf_capacity(&self) -> u64 {
        exd_format::leaf_capacity(self.node_size() as usize) as u64
    }

    pub(super) fn node_size(&self) -> u64 {
        self.superblock.geometry().node_size()
    }

    /// Nodes' worth of space that merging `entries` changes takes, the list included.
    pub(super) fn reserve_needed(&self, entries: u64) -> u64 {
        let budget = self.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.budget);
        let nodes = self.superblock.node_count.saturating_add(budget);
        let list = self.list_length().div_ceil(self.node_size());
        nodes_needed(entries, nodes, self.leaf_capacity()) + LIST_ROOM * list
    }

    /// True if another change of the map can be taken: a checkpoint of it all will find its room, and
    /// the completion log has a slot. Otherwise a checkpoint is on its way to make room.
    pub(super) fn has_room(&mut self, st: &mut dyn Storage) -> bool {
        if self.failed {
            // What stalls now is failed by the next step.
            return false;
        }
        let mut suffices = self.reserve_suffices();
        if !suffices && self.leftovers.is_some() {
            self.clear_up(st, u64::MAX);
            suffices = self.reserve_suffices();
        }
        let overlay_full = self.map.active.len() as u64 > 2 * self.options.overlay_max;
        if !suffices || overlay_full {
            if !self.map.active.is_empty() {
                self.request_checkpoint(st, true);
                return false;
            }
            if self.checkpoint.is_some() || self.reserved > 0 {
                return false;
            }
        }
        self.log_room() > 0
    }

    /// A checkpoint of all changes there are, and two more, would find room for its nodes.
    fn reserve_suffices(&self) -> bool {
        let entries = self.map.active.len() as u64 + self.reserved + 2;
        let frozen = self.checkpoint.as_ref().map_or(0, |cp| {
            cp.budget.saturating_sub(cp.written.total() * SECTOR / self.node_size())
        });
        let aside = self.checkpoint.as_ref().map_or(0, |cp| cp.list_room.end - cp.list_room.start);
        // The next checkpoint has what the last one left behind: it begins with clearing up.
        let left = self.leftovers.as_ref().map_or(0, Leftovers::sectors);
        let reserve = (self.space.meta_sectors() + aside + left) * SECTOR / self.node_size();
        self.reserve_needed(entries) + frozen <= reserve
    }

    /// A checkpoint is being made, or the one before is being cleared up after.
    pub fn is_checkpoint_under_way(&self) -> bool {
        self.checkpoint.is_some() || self.leftovers.is_some()
    }

    /// Starts a checkpoint unless one is under way; that one hurries then.
    pub(super) fn request_checkpoint(&mut self, st: &mut dyn Storage, urgent: bool) {
        match &mut self.checkpoint {
            Some(checkpoint) => checkpoint.urgent |= urgent,
            None if self.now_ms >= self.checkpoint_after_ms && !self.failed => {
                self.start_checkpoint(st, urgent, State::InUse);
            }
            None => {}
        }
    }

    /// Freezes the present state.
    pub(super) fn start_checkpoint(&mut self, st: &mut dyn Storage, urgent: bool, state: State) {
        assert!(self.checkpoint.is_none() && !self.failed);
        self.clear_up(st, u64::MAX);
        self.top_up_for_checkpoint(st);
        let list_room = self.put_list_room_aside();
        let virtual_size = self.size_to_commit();
        let shrinks = virtual_size < self.virtual_size;
        let withheld = if shrinks { std::mem::take(&mut self.backlog) } else { VecDeque::new() };
        let entries = self.map.active.len() as u64;
        let budget = nodes_needed(entries, self.superblock.node_count, self.leaf_capacity());
        self.map.freeze();
        self.checkpoint = Some(Checkpoint {
            phase: Phase::Build,
            merge: Merge::new(
                self.superblock.uuid,
                self.node_size(),
                self.superblock.generation + 1,
                self.sectors_per_block,
                self.map.root,
            ),
            open: self.space.open.clone(),
            zero: self.space.zero.clone(),
            data_end: self.space.data_end,
            applied: self.cseq,
            tail: match state {
                State::InUse => self.journal.head(),
                // The ring is empty and begins anew.
                State::Clean => Tail { position: 0, chain: 0, ..self.journal.head() },
            },
            virtual_size,
            root: self.map.root,
            list: AreaPointer::default(),
            list_room,
            written: RangeSet::new(),
            retired: RangeSet::new(),
            writes: 0,
            error: None,
            superblock: None,
            budget,
            meanwhile: self.changes_meanwhile(entries),
            urgent: urgent || !self.checkpoint_waiters.is_empty(),
            grow: None,
            waiters: std::mem::take(&mut self.checkpoint_waiters),
            withheld,
            state,
        });
    }

    /// Puts aside room for the changes to come, while there is room.
    pub(super) fn top_up_reserve(&mut self, st: &mut dyn Storage) {
        let entries = self.changes_ahead() + self.map.active.len() as u64;
        self.top_up_reserve_to(st, self.reserve_needed(entries));
    }

    /// Puts aside room for the nodes of a checkpoint that begins and of the changes made while it runs,
    /// which would else have to wait for it.
    fn top_up_for_checkpoint(&mut self, st: &mut dyn Storage) {
        let changes = self.map.active.len() as u64;
        let (nodes, leaf) = (self.superblock.node_count, self.leaf_capacity());
        let budget = nodes_needed(changes, nodes, leaf);
        let meanwhile = self.changes_meanwhile(changes);
        let next = nodes_needed(meanwhile, nodes.saturating_add(budget), leaf);
        let list = self.list_length().div_ceil(self.node_size());
        let wanted = budget.saturating_add(next).saturating_add(2 * LIST_ROOM * list);
        self.top_up_reserve_to(st, wanted.max(self.reserve_needed(changes + self.changes_ahead())));
    }

    /// Puts aside room for so many nodes.
    fn top_up_reserve_to(&mut self, st: &mut dyn Storage, nodes: u64) {
        if self.closing || self.starting {
            // The first checkpoint opens the first window: nothing is written there before.
            return;
        }
        let wanted = nodes.saturating_mul(self.node_size() / SECTOR);
        let have = self.space.meta_sectors();
        if have < wanted {
            self.reserve_from_windows(st, wanted - have);
        }
        self.ensure_list_run(st);
    }

    pub(super) fn changes_ahead(&self) -> u64 {
        self.options.overlay_max.min(CHANGES_AHEAD)
    }

    /// Changes that can be made while a checkpoint of so many runs.
    fn changes_meanwhile(&self, changes: u64) -> u64 {
        (changes / 8).clamp(1024, 16384).min(self.options.overlay_max)
    }

    /// The reserve grows with the changes: an image that takes few need not hold room for many.
    fn keep_reserve_ahead(&mut self, st: &mut dyn Storage) {
        let (changes, half) = (self.map.active.len() as u64, self.changes_ahead() / 2);
        if changes <= half {
            // The last checkpoint has seen to that.
            return;
        }
        let entries = changes + half;
        let needed = self.reserve_needed(entries) * self.node_size() / SECTOR;
        if self.space.meta_sectors() < needed {
            self.top_up_reserve(st);
        }
    }

    /// The space list is written in one piece: keeps a run in the reserve that is long enough.
    fn ensure_list_run(&mut self, st: &mut dyn Storage) {
        let run = LIST_ROOM * self.list_length() / SECTOR;
        self.ensure_run(st, run);
    }

    /// Sees that the reserve has a run of so many sectors, now or, if a record has to open space for it,
    /// as soon as that is durable.
    pub(super) fn ensure_run(&mut self, st: &mut dyn Storage, sectors: u64) {
        if self.space.meta_run() >= sectors {
            return;
        }
        if let Some(range) = self.space.meta_run_from_windows(sectors) {
            self.allocate_reserve(st, range);
        } else if !self.space.run_is_opening()
            && let Some(range) = self.space.plan_run(sectors)
        {
            self.commit(st, Entry::window(range.start, range.end - range.start), 0);
            self.space.begin_run(range, self.cseq);
        }
    }

    /// Room for the list of the checkpoint that begins, and for the next one's; less, where there is
    /// less.
    fn put_list_room_aside(&mut self) -> Range<u64> {
        let list = self.list_length() / SECTOR;
        let most = if self.closing { CLOSED_LISTS } else { LIST_ROOM };
        let room = (1..=most).rev().find_map(|lists| self.space.take_meta_run(lists * list));
        room.unwrap_or(0..0)
    }

    /// Moves space into the reserve and asks the host to allocate it: a full host must not keep a
    /// checkpoint from making room.
    fn reserve_from_windows(&mut self, st: &mut dyn Storage, sectors: u64) {
        for range in self.space.meta_from_windows(sectors) {
            self.allocate_reserve(st, range);
        }
    }

    /// Asks the host to allocate a part of the reserve.
    pub(super) fn allocate_reserve(&mut self, st: &mut dyn Storage, range: Range<u64>) {
        let (offset, len) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
        if !self.closing {
            self.start(st, Op::Allocate { offset, len }, Pending::Reserve { range });
        }
    }

    /// Bytes of the space list as things are, with room for what a checkpoint adds: a range for each
    /// node it replaces, and one for each range it takes nodes from.
    pub(super) fn list_length(&self) -> u64 {
        let (entries, nodes) = (self.map.active.len() as u64 + 1, self.superblock.node_count);
        let replaced = nodes_needed(entries, nodes, self.leaf_capacity()).min(nodes);
        let left = self.leftovers.as_ref().map_or(0, Leftovers::ranges);
        let ranges =
            self.space.open.count() + self.space.zero.count() + self.space.meta_count() + left;
        SpaceList::length_for(ranges + usize::try_from(replaced).unwrap_or(usize::MAX / 64) + 64)
    }

    /// Takes the steps that have become possible.
    pub(super) fn advance_checkpoint(&mut self, st: &mut dyn Storage) {
        if self.failed {
            return self.fail_checkpoint(RequestError::Failed);
        }
        self.clear_up_meanwhile(st, self.options.clear_up_nodes);
        self.consider_checkpoint(st);
        while self.step_checkpoint(st) {}
    }

    fn consider_checkpoint(&mut self, st: &mut dyn Storage) {
        if let Some(checkpoint) = &mut self.checkpoint
            && self.map.active.len() as u64 > checkpoint.meanwhile / 2
        {
            // It is to end before its room is used up and writes have to wait for it, even if the guest
            // does not flush.
            checkpoint.urgent = true;
        }
        let busy = self.checkpoint.is_some() || self.closing || self.is_settling();
        if busy || self.now_ms < self.checkpoint_after_ms {
            return;
        }
        self.grow_ring(st);
        if self.leftovers.is_none() {
            self.keep_reserve_ahead(st);
        }
        let asked = !self.checkpoint_waiters.is_empty() || self.resize_wants_checkpoint();
        let ring = self.journal.used() > self.journal.total() / 2;
        let overlay = self.map.active.len() as u64 > self.options.overlay_max;
        if asked || ring || overlay {
            self.start_checkpoint(st, asked, State::InUse);
        }
    }

    /// One step; true if another may be possible.
    fn step_checkpoint(&mut self, st: &mut dyn Storage) -> bool {
        let Some(checkpoint) = &mut self.checkpoint else { return false };
        if checkpoint.error.is_some() {
            if checkpoint.writes == 0 && checkpoint.superblock.is_none() {
                self.abort_checkpoint(st);
            }
            return false;
        }
        match checkpoint.phase {
            Phase::Build => self.build(st),
            Phase::List => self.write_list(st),
            Phase::Landing => {
                if checkpoint.writes > 0 {
                    return false;
                }
                checkpoint.phase = Phase::Sync { mark: self.landed, next: Next::Slot(0) };
                true
            }
            Phase::Sync { mark, next } => {
                let early = (bugs::on(Bug::SyncInWrongOrder) && next == Next::Slot(0))
                    || (bugs::on(Bug::SkipFirstSync) && self.starting);
                if self.synced < mark && !early {
                    return false;
                }
                match next {
                    Next::Slot(slot) => {
                        self.write_superblock(st, slot);
                        self.checkpoint.as_ref().is_some_and(|cp| cp.error.is_some())
                    }
                    Next::Commit => self.commit_checkpoint(st),
                }
            }
            Phase::Writing { .. } | Phase::Retry { .. } => false,
        }
    }

    /// Somebody waits until the checkpoint is through, or there are no requests yet or any more.
    fn checkpoint_holds_up(&self) -> bool {
        self.closing
            || self.starting
            || self.is_settling()
            || self.resizing.is_some()
            || !self.stalled.is_empty()
            || !(self.flushes.is_empty() || self.journal.has_room())
    }

    fn build(&mut self, st: &mut dyn Storage) -> bool {
        let writes_max = if self.checkpoint_holds_up() { WRITES_MAX_AWAITED } else { WRITES_MAX };
        let checkpoint = self.checkpoint.as_mut().expect("under way");
        if checkpoint.writes >= writes_max {
            return false;
        }
        let node_size = self.superblock.geometry().node_size();
        let space = &mut self.space;
        let frozen = self.map.frozen.as_ref().expect("frozen with the checkpoint");
        let step = checkpoint.merge.advance(
            &mut self.map.cache,
            frozen,
            &mut || space.take_meta(node_size),
            BATCH,
        );
        checkpoint.note_nodes(node_size / SECTOR);
        let (writes, root) = match step {
            Ok(MergeStep::Write(writes)) => (writes, None),
            Ok(MergeStep::Done(root, writes)) => (writes, Some(root)),
            Ok(MergeStep::TooDeep) => {
                self.corruption =
                    Some(Error::corrupt(self.map.root.address, "the extent tree is too deep"));
                checkpoint.error = Some(RequestError::Corrupt);
                return true;
            }
            Ok(MergeStep::NoSpace) => {
                checkpoint.error = Some(StorageError::NoSpace.into());
                return true;
            }
            Err(fault) => {
                let ahead = (self.map.cache.bound() / 8 / node_size).clamp(1, READ_AHEAD_MAX);
                let faults = checkpoint.merge.missing(&mut self.map.cache, frozen, ahead as usize);
                self.read_ahead(st, fault, faults);
                return false;
            }
        };
        if let Some(root) = root {
            checkpoint.root = root;
            checkpoint.phase = Phase::List;
        }
        self.write_nodes(st, writes);
        true
    }

    /// Writes nodes, neighbours in one operation.
    fn write_nodes(&mut self, st: &mut dyn Storage, writes: Vec<(u64, Vec<u8>)>) {
        let mut writes = writes.into_iter().peekable();
        while let Some((offset, bytes)) = writes.next() {
            let mut end = offset + bytes.len() as u64;
            let mut segments = vec![Segment::Bytes(bytes.into())];
            while let Some((_, bytes)) = writes.next_if(|(next, _)| *next == end) {
                end += bytes.len() as u64;
                segments.push(Segment::Bytes(bytes.into()));
            }
            self.stats.metadata_bytes += end - offset;
            self.checkpoint.as_mut().expect("under way").writes += 1;
            self.start(st, Op::Write { offset, segments }, Pending::CheckpointWrite);
        }
    }

    fn write_list(&mut self, st: &mut dyn Storage) -> bool {
        let old_list = self.superblock.space_list;
        let checkpoint = self.checkpoint.as_mut().expect("under way");
        let open = &mut checkpoint.open;
        open.insert(sectors_of(&old_list));
        if checkpoint.state == State::Clean {
            // The ring of a closed image is as short as it was at first.
            for segment in self.journal.segments.iter().skip(1) {
                open.insert(segment_sectors(segment));
            }
        }
        if let Some(growth) = &self.growth
            && growth.zeroed
            && open.contains(growth.range.clone())
            && self.journal.may_grow_from(checkpoint.tail)
        {
            open.remove(growth.range.clone());
            checkpoint.grow = Some(segment_of(&growth.range));
            self.journal.hold_wrap(true);
        }
        let (address, length) = loop {
            // Taking its place can split one range in two.
            let length = SpaceList::length_for(open.count() + checkpoint.zero.count() + 1);
            let sectors = length / SECTOR;
            let room = &mut checkpoint.list_room;
            if length <= SPACE_LIST_MAX && sectors <= room.end - room.start {
                room.start += sectors;
                break ((room.start - sectors) * SECTOR, length);
            }
            self.space.give_meta(std::mem::replace(room, 0..0));
            let place = if length <= SPACE_LIST_MAX { self.space.take_meta(length) } else { None };
            if let Some(address) = place {
                break (address, length);
            }
            if checkpoint.zero.count() == 0 {
                checkpoint.error = Some(StorageError::NoSpace.into());
                return true;
            }
            // Zeroes that are not listed are not lost, only forgotten until they are freed again.
            let half = checkpoint.zero.total() / 2;
            checkpoint.zero.keep_longest(half);
        };
        open.remove(address / SECTOR..(address + length) / SECTOR);
        let list = SpaceList {
            generation: self.superblock.generation + 1,
            address,
            uuid: self.superblock.uuid,
            ranges: Space::listing(open, &checkpoint.zero),
        };
        let bytes = list.encode(Some(length));
        checkpoint.list = list.pointer(&bytes);
        checkpoint.writes += 1;
        checkpoint.phase = Phase::Landing;
        self.stats.metadata_bytes += length;
        self.write_bytes(st, address, bytes.into(), Pending::CheckpointWrite);
        true
    }

    pub(super) fn checkpoint_write_ended(&mut self, result: Result<Done, StorageError>) {
        let checkpoint = self.checkpoint.as_mut().expect("its write was under way");
        checkpoint.writes -= 1;
        match result {
            Ok(_) => self.landed += 1,
            Err(error) => checkpoint.error = Some(error.into()),
        }
    }

    /// A node the checkpoint may be waiting for could not be had.
    pub(super) fn checkpoint_node_failed(&mut self, address: u64, error: RequestError) {
        if let Some(checkpoint) = &mut self.checkpoint
            && checkpoint.phase == Phase::Build
            && self.parked.contains_key(&address)
        {
            checkpoint.error.get_or_insert(error);
        }
    }

    fn write_superblock(&mut self, st: &mut dyn Storage, slot: u8) {
        if self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.superblock.is_none()) {
            let superblock = Box::new(self.next_superblock());
            let checkpoint = self.checkpoint.as_mut().expect("under way");
            if let Err(error) = superblock.validate() {
                // Only an image that lies about itself in a way no single structure shows gets here.
                self.corruption = Some(Error::decode(error, 0));
                checkpoint.error = Some(RequestError::Corrupt);
                return;
            }
            checkpoint.superblock = Some(superblock);
        }
        let checkpoint = self.checkpoint.as_mut().expect("under way");
        let superblock = checkpoint.superblock.as_ref().expect("made above");
        let index = (superblock.first_slot() + usize::from(slot)) % 2;
        let bytes = superblock.encode(index);
        checkpoint.phase = Phase::Writing { slot };
        self.stats.metadata_bytes += bytes.len() as u64;
        let offset = Superblock::slot_address(index);
        self.write_bytes(st, offset, bytes.into(), Pending::SuperblockWrite);
    }

    fn next_superblock(&self) -> Superblock {
        let checkpoint = self.checkpoint.as_ref().expect("under way");
        let old = &self.superblock;
        let mut segments = self.journal.segments.clone();
        segments.extend(checkpoint.grow);
        if checkpoint.state == State::Clean {
            segments.truncate(1);
        }
        let merge = &checkpoint.merge;
        let nodes = |ranges: &RangeSet| ranges.total() * SECTOR / self.node_size();
        let mut superblock = Superblock {
            generation: old.generation + 1,
            state: checkpoint.state,
            virtual_size: checkpoint.virtual_size,
            epoch: self.journal.epoch(),
            applied: checkpoint.applied,
            root: checkpoint.root,
            extent_count: old.extent_count.saturating_add_signed(merge.extents_delta),
            node_count: old
                .node_count
                .saturating_add(nodes(&checkpoint.written))
                .saturating_sub(nodes(&checkpoint.retired)),
            journal_tail: checkpoint.tail.position,
            tail_sequence: checkpoint.tail.sequence,
            tail_chain: checkpoint.tail.chain,
            segments,
            space_list: checkpoint.list,
            data_end: checkpoint.data_end * SECTOR,
            completion_log_path: self.log_path.clone(),
            version_minor: exd_format::VERSION_MINOR,
            ..old.clone()
        };
        // A writer that does not keep bitmaps up to date takes them back.
        superblock.drop_autoclear();
        superblock
    }

    pub(super) fn superblock_write_ended(
        &mut self,
        st: &mut dyn Storage,
        result: Result<Done, StorageError>,
    ) {
        let checkpoint = self.checkpoint.as_mut().expect("its write was under way");
        let Phase::Writing { slot } = checkpoint.phase else {
            unreachable!("a superblock is written in its phase only")
        };
        match result {
            Ok(_) => {
                self.landed += 1;
                let next = if slot == 0 && !bugs::on(Bug::OneSuperblockOnly) {
                    Next::Slot(1)
                } else {
                    Next::Commit
                };
                checkpoint.phase = Phase::Sync { mark: self.landed, next };
            }
            Err(error) => {
                // The slot may hold anything now; only the same bytes may follow.
                checkpoint.phase = Phase::Retry { slot };
                let error = error.into();
                self.fail_checkpoint_waiters(error);
                self.fail_what_needs_the_journal(st, error);
                self.fail_stalled(error);
                let size = self.checkpoint.as_ref().map_or(self.virtual_size, |cp| cp.virtual_size);
                self.resize_uncertain(size, error);
                self.fail_resize(error);
            }
        }
    }

    /// Fails the flushes that only the checkpoint can satisfy, and the writes whose windows no record
    /// can open meanwhile.
    fn fail_what_needs_the_journal(&mut self, st: &mut dyn Storage, error: RequestError) {
        let withheld = self.checkpoint.as_ref().is_some_and(|cp| !cp.withheld.is_empty());
        if !self.journal.has_room() || withheld {
            self.fail_flushes(error);
            self.fail_freeze(error);
            self.fail_starved(st, error);
        }
    }

    /// Both slots are durable: the old generation is history.
    fn commit_checkpoint(&mut self, st: &mut dyn Storage) -> bool {
        let tail = self.checkpoint.as_ref().expect("under way").tail;
        if self.journal.in_flight_before(tail.sequence) {
            return false;
        }
        let checkpoint = self.checkpoint.take().expect("under way");
        let old_list = self.superblock.space_list;
        self.superblock = *checkpoint.superblock.expect("written");
        self.map.root = checkpoint.root;
        self.space.map(sectors_of(&self.superblock.space_list));
        let old_list = sectors_of(&old_list);
        self.space.free(old_list.clone());
        self.space.give_meta(old_list);
        self.space.give_meta(checkpoint.list_room);
        self.journal.hold_wrap(false);
        match checkpoint.state {
            State::InUse => self.journal.advance_tail(checkpoint.tail),
            State::Clean => {
                for segment in self.journal.segments.iter().skip(1) {
                    self.space.free(segment_sectors(segment));
                }
            }
        }
        if let Some(segment) = checkpoint.grow
            && let Some(growth) = self.growth.take()
        {
            self.space.map(growth.range);
            self.journal.grow(segment);
        }
        self.forget_backlog(checkpoint.applied);
        self.leftovers = Some(Leftovers::new(checkpoint.written, checkpoint.retired));
        if self.closing || self.starting {
            self.clear_up(st, u64::MAX);
        }
        self.stats.checkpoints += 1;
        if checkpoint.virtual_size != self.virtual_size || self.resizing.is_some() {
            self.virtual_size = checkpoint.virtual_size;
            self.resize_committed(Ok(()));
        }
        for id in checkpoint.waiters {
            self.finish(id, Ok(()));
        }
        self.settle_space(st);
        false
    }

    /// The checkpoint cannot be completed: its changes wait for the next one.
    fn abort_checkpoint(&mut self, st: &mut dyn Storage) {
        let mut checkpoint = self.checkpoint.take().expect("under way");
        let error = checkpoint.error.expect("the reason");
        checkpoint.withheld.append(&mut self.backlog);
        self.backlog = checkpoint.withheld;
        let node_sectors = self.node_size() / SECTOR;
        for range in checkpoint.written.iter() {
            for sector in range.clone().step_by(node_sectors as usize) {
                self.map.cache.remove(sector * SECTOR);
            }
            self.space.give_meta(range);
        }
        self.space.give_meta(sectors_of(&checkpoint.list));
        self.space.give_meta(checkpoint.list_room);
        self.journal.hold_wrap(false);
        self.map.thaw();
        self.stats.checkpoints_failed += 1;
        self.checkpoint_error = Some(error);
        self.checkpoint_after_ms = self.now_ms + self.options.retry_ms.max(1);
        self.checkpoint_waiters.append(&mut checkpoint.waiters);
        self.fail_checkpoint_waiters(error);
        self.fail_resize(error);
        self.fail_what_needs_the_journal(st, error);
        self.fail_stalled(error);
    }

    fn fail_checkpoint(&mut self, error: RequestError) {
        self.fail_checkpoint_waiters(error);
        self.fail_resize(error);
    }

    /// Requests for a checkpoint end with an error.
    pub(super) fn fail_checkpoint_waiters(&mut self, error: RequestError) {
        let mut waiters = std::mem::take(&mut self.checkpoint_waiters);
        if let Some(checkpoint) = &mut self.checkpoint {
            waiters.append(&mut checkpoint.waiters);
        }
        for id in waiters {
            self.finish(id, Err(error));
        }
    }

    /// Tries a superblock write again that failed: at each tick, and when somebody waits for it.
    pub(super) fn retry_superblock(&mut self, st: &mut dyn Storage) {
        if let Some(Phase::Retry { slot }) = self.checkpoint.as_ref().map(|cp| cp.phase)
            && !self.failed
        {
            self.write_superblock(st, slot);
        }
    }

    // --- Growth of the ring. ---

    /// Begins to add a segment to the ring if it will soon be what makes a checkpoint necessary: the
    /// checkpoint can add it then.
    fn grow_ring(&mut self, st: &mut dyn Storage) {
        let total = self.journal.total();
        let waiting = self.backlog.len() as u64 * exd_format::ENTRY_SIZE as u64;
        let crowded = self.journal.used() + waiting > total / 4;
        // What failed is not tried again before the next checkpoint, and an end needs no longer ring.
        let barred = self.superblock.generation < self.no_growth_before || self.freeze.is_some();
        let full = self.journal.segments.len() >= SEGMENTS_MAX
            || total * 2 > self.options.journal_max.min(exd_format::RING_MAX);
        if !crowded || full || barred || self.growth.is_some() || self.closing {
            return;
        }
        // Eight times as long, as far as it may be.
        let most = self.options.journal_max.min(exd_format::RING_MAX);
        let more = (7 * total).min(most - total) / SEGMENT_ALIGN * SEGMENT_ALIGN;
        if self.geometry.fixed_length && more / SECTOR > self.space.end() / DEVICE_PART {
            return;
        }
        let Some(range) = self.space.take_from_window(more / SECTOR, SEGMENT_ALIGN / SECTOR) else {
            return;
        };
        let op = Op::Write {
            offset: range.start * SECTOR,
            segments: vec![Segment::Zero((range.end - range.start) * SECTOR)],
        };
        self.growth = Some(Growth { range, zeroed: false });
        self.start(st, op, Pending::RingZero);
    }

    pub(super) fn ring_zero_ended(&mut self, result: Result<Done, StorageError>) {
        let growth = self.growth.as_mut().expect("its write was under way");
        match result {
            Ok(_) => {
                self.landed += 1;
                self.stats.ring_zeroed_bytes += (growth.range.end - growth.range.start) * SECTOR;
                growth.zeroed = true;
            }
            Err(_) => {
                let range = growth.range.clone();
                self.growth = None;
                self.no_growth_before = self.superblock.generation + 1;
                self.space.quarantine(range, 0, 0);
            }
        }
    }
}

fn sectors_of(area: &AreaPointer) -> Range<u64> {
    area.address / SECTOR..(area.address + area.length) / SECTOR
}

fn segment_sectors(segment: &JournalSegment) -> Range<u64> {
    segment.offset / SECTOR..(segment.offset + segment.length) / SECTOR
}

fn segment_of(range: &Range<u64>) -> JournalSegment {
    JournalSegment { offset: range.start * SECTOR, length: (range.end - range.start) * SECTOR }
}
