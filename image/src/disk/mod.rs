//! One open image: a deterministic state machine between requests and storage operations.
//!
//! Nothing here blocks, keeps time or starts threads. [`Disk::submit`] takes requests,
//! [`Disk::complete`] is told how storage operations ended, and each call submits what has become
//! possible. [`Disk::pop_finished`] yields finished requests in the order in which they finished.
//!
//! * `data.rs`: reads, writes, zeroes, discards; block ownership.
//! * `durability.rs`: completions, journal records, flushes, syncs.
//! * `checkpoint.rs`: the tree written out, the superblock committed.
//! * `recycle.rs`: windows opened, freed space punched and released.
//! * `relocate.rs`: scattered data moved together.
//! * `zeroing.rs`: space written with zeroes ahead of the allocator.
//! * `resize.rs`: growing and shrinking.
//! * `freeze.rs`: standing still.
//! * `fast.rs`: what passes the engine by, seen from here.
//! * `room.rs`: room for the checkpoint that begins a session.
//! * `lifecycle.rs`: opening, recovery, closing.

mod checkpoint;
mod data;
mod durability;
mod fast;
mod freeze;
mod leftovers;
mod lifecycle;
mod recycle;
mod relocate;
mod resize;
mod room;
mod zeroing;

pub(crate) use lifecycle::commit_superblock;
pub use lifecycle::{HolderName, OpenOptions};

use crate::bugs::{self, Bug};
use crate::error::Error;
use crate::fast::FastOwner;
use crate::journal::Journal;
use crate::log::CompletionLog;
use crate::map::{Fault, Map, decode_node};
use crate::request::{Request, RequestError};
use crate::space::Space;
use crate::storage::{
    Done, Geometry, Op, RequestId, SECTOR, Segment, Storage, StorageError, Token,
};
use checkpoint::Checkpoint;
use data::{Group, Work, WorkKind};
use durability::{FlushWaiter, PendingEntry, Rhythm, SyncInFlight};
use exd_format::Superblock;
use freeze::Freeze;
use leftovers::{CLEAR_UP_NODES_TICK, Leftovers};
use resize::Resizing;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// What a storage operation under way is for.
enum Pending {
    /// Nodes that lie one behind the other.
    Nodes {
        faults: Vec<Fault>,
        generation: u64,
    },
    Read {
        id: RequestId,
        io: u64,
    },
    Overwrite {
        id: RequestId,
        io: u64,
    },
    GroupEdge {
        group: u64,
        edge: data::Edge,
    },
    GroupWrite {
        group: u64,
    },
    MoveRead {
        group: u64,
        source: usize,
    },
    Record {
        sequence: u64,
    },
    Sync,
    Punch {
        range: Range<u64>,
    },
    /// Space being prepared for first writes.
    ZeroAhead {
        range: Range<u64>,
        known_zero: bool,
    },
    /// Prepared space being given back.
    DropPool {
        range: Range<u64>,
    },
    CheckpointWrite,
    SuperblockWrite,
    RingZero,
    /// Host space for a part of the metadata reserve.
    Reserve {
        range: Range<u64>,
    },
    /// The file being made longer; how that ends does not matter, but that it has ended does.
    Grow,
}

/// A guest's request under way.
struct Active {
    request: Request,
    outstanding: u32,
    error: Option<RequestError>,
}

/// Counters since the image was opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Write-zeroes and discard requests.
    pub zeroes: u64,
    /// Flush requests, and durable writes.
    pub flushes: u64,
    /// Bytes guests wrote.
    pub bytes_written: u64,
    /// Bytes guests read.
    pub bytes_read: u64,
    /// Host syncs.
    pub syncs: u64,
    /// Journal records written.
    pub records: u64,
    /// Bytes of journal records written.
    pub record_bytes: u64,
    /// Entries journaled.
    pub entries: u64,
    /// Checkpoints committed.
    pub checkpoints: u64,
    /// Checkpoints given up because of an error.
    pub checkpoints_failed: u64,
    /// Bytes of tree nodes, space lists and superblocks written.
    pub metadata_bytes: u64,
    /// Tree nodes read from storage.
    pub node_reads: u64,
    /// Pieces of requests that waited for the owner of a block.
    pub edge_waits: u64,
    /// Pieces that joined a neighbour's first write.
    pub merges: u64,
    /// First writes of runs of blocks.
    pub first_writes: u64,
    /// Overwrites of written blocks.
    pub overwrites: u64,
    /// Bytes given back to the host.
    pub punched_bytes: u64,
    /// Bytes moved to make scattered data contiguous.
    pub moved_bytes: u64,
    /// Bytes prepared ahead of first writes.
    pub zeroed_bytes: u64,
    /// Bytes prepared ahead of the journal's records, as the ring grew.
    pub ring_zeroed_bytes: u64,
}

/// An open image.
pub struct Disk {
    options: OpenOptions,
    geometry: Geometry,
    superblock: Superblock,
    block_size: u64,
    sectors_per_block: u64,
    virtual_size: u64,
    map: Map,
    space: Space,
    journal: Journal,
    log: Option<CompletionLog>,
    log_path: String,

    next_token: u64,
    pending: FxHashMap<Token, Pending>,
    active: FxHashMap<RequestId, Active>,
    finished: VecDeque<(RequestId, Result<(), RequestError>)>,

    // Data path.
    groups: FxHashMap<u64, Group>,
    next_group: u64,
    /// Blocks under first write or read-modify-write: first block -> group.
    owned: BTreeMap<u64, u64>,
    staged: Vec<u64>,
    /// Groups waiting for a window.
    starved: VecDeque<u64>,
    /// Groups that move data and wait until nobody writes into its old place any more.
    moves: Vec<u64>,
    /// Work waiting for a node, by the node's address.
    parked: HashMap<u64, Vec<Work>>,
    /// Work waiting for a checkpoint to make room.
    stalled: VecDeque<Work>,
    /// Blocks of small first writes since the guest's last flush.
    small_since_flush: u64,
    /// Journal entries that first writes under way will need.
    reserved: u64,
    next_io: u64,
    running_io: BTreeSet<u64>,
    /// What passes this engine by.
    fast: Option<FastOwner>,
    /// A freeze waits for I/O numbered below this.
    freeze_io: u64,

    // Durability.
    cseq: u64,
    backlog: VecDeque<PendingEntry>,
    durable_through: u64,
    /// Number of operations that changed the file and ended well.
    landed: u64,
    /// The part of `landed` that is durable.
    synced: u64,
    sync: Option<SyncInFlight>,
    flushes: Vec<FlushWaiter>,
    rhythm: Rhythm,
    /// An own sync is due.
    sync_due: bool,
    /// What a sync of our own is to make durable: changes and landed operations up to these.
    own_goal: Option<(u64, u64)>,
    failed: bool,

    // Background.
    checkpoint: Option<Checkpoint>,
    /// What the last checkpoint left behind, until it is given back.
    leftovers: Option<Leftovers>,
    checkpoint_waiters: Vec<RequestId>,
    /// After a failed checkpoint: not before this time.
    checkpoint_after_ms: u64,
    checkpoint_error: Option<RequestError>,
    /// After a failed write of a record: not again before this time, unless a flush asks.
    records_after_ms: u64,
    /// The ring may grow again in this generation.
    no_growth_before: u64,
    growth: Option<checkpoint::Growth>,
    resizing: Option<Resizing>,
    freeze: Option<Freeze>,
    held: VecDeque<(RequestId, Request)>,
    punches: u32,
    /// The file's length is being set.
    growing: bool,
    /// The session's first checkpoint is not committed: nothing may be recycled yet.
    starting: bool,
    closing: bool,
    now_ms: u64,
    last_sync_ms: u64,
    last_request_ms: u64,

    corruption: Option<Error>,
    stats: Stats,
}

/// What is known of an open image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Info {
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Identity.
    pub uuid: [u8; 16],
    /// Checkpoint generation.
    pub generation: u64,
    /// Number of writing sessions.
    pub epoch: u64,
    /// It was closed cleanly (as found at opening, read-only; false while open for writing).
    pub clean: bool,
    /// Extents in the tree of the last checkpoint.
    pub extents: u64,
    /// Nodes of that tree.
    pub nodes: u64,
    /// Bytes of the journal ring.
    pub journal_bytes: u64,
    /// What creation promised about space.
    pub preallocation: exd_format::Preallocation,
    /// End of used space in the image file, in bytes.
    pub image_end: u64,
    /// When it was made, seconds since 1970.
    pub created: u64,
}

impl Disk {
    /// What is known of the image.
    pub fn info(&self) -> Info {
        Info {
            virtual_size: self.virtual_size,
            block_size: self.block_size,
            uuid: self.superblock.uuid,
            generation: self.superblock.generation,
            epoch: self.superblock.epoch,
            clean: self.superblock.state == exd_format::State::Clean,
            extents: self.superblock.extent_count,
            nodes: self.superblock.node_count,
            journal_bytes: self.journal.total(),
            preallocation: self.superblock.preallocation,
            image_end: self.space.data_end * SECTOR,
            created: self.superblock.created,
        }
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Bytes the node cache holds.
    pub fn cache_bytes(&self) -> u64 {
        self.map.cache.bytes()
    }

    /// The last damage of metadata that a request met.
    pub fn last_corruption(&self) -> Option<&Error> {
        self.corruption.as_ref()
    }

    /// A sync has failed: the image accepts no more changes (P5).
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Guest requests that have not come out of [`Disk::pop_finished`]... and are not ready to.
    pub fn requests_in_flight(&self) -> usize {
        self.active.len() + self.held.len()
    }

    /// Storage operations under way.
    pub fn ops_in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The next finished request.
    pub fn pop_finished(&mut self) -> Option<(RequestId, Result<(), RequestError>)> {
        self.finished.pop_front()
    }

    /// Takes a request. Its buffer must stay valid until it comes out of [`Disk::pop_finished`].
    /// First writes are only staged, so that neighbours in the same batch can join: call
    /// [`Disk::kick`] when there is nothing more to submit at the moment.
    pub fn submit(&mut self, st: &mut dyn Storage, id: RequestId, request: Request) {
        self.last_request_ms = self.now_ms;
        let frozen = self.freeze.is_some() && request.waits_for_thaw();
        if self.resizing.is_some() || frozen {
            self.held.push_back((id, request));
            return;
        }
        if let Err(error) = self.validate(&request) {
            self.finished.push_back((id, Err(error)));
            return;
        }
        let known = self.active.insert(id, Active { request, outstanding: 1, error: None });
        assert!(known.is_none(), "request id {id:?} is in flight already");
        let work = |kind, offset, len| Work { id, kind, start: offset, end: offset + len };
        match request {
            Request::Read { offset, len } => {
                self.stats.reads += 1;
                self.stats.bytes_read += len;
                self.dispatch(st, work(WorkKind::Read, offset, len));
            }
            Request::Write { offset, len, .. } => {
                self.stats.writes += 1;
                self.stats.bytes_written += len;
                self.dispatch(st, work(WorkKind::Write, offset, len));
            }
            Request::WriteZeroes { offset, len, unmap, .. } => {
                self.stats.zeroes += 1;
                self.dispatch(st, work(WorkKind::Zero { unmap }, offset, len));
            }
            Request::Discard { offset, len } => {
                self.stats.zeroes += 1;
                self.dispatch(st, work(WorkKind::Discard, offset, len));
            }
            Request::Defragment { offset, len } => {
                self.dispatch(st, work(WorkKind::Move, offset, len));
            }
            Request::Flush => {
                self.stats.flushes += 1;
                self.small_since_flush = 0;
                self.wait_for_durability(id);
            }
            Request::Checkpoint => self.checkpoint_waiters.push(id),
            Request::Resize { size } => self.start_resize(st, id, size),
            Request::Freeze => {
                self.freeze = Some(Freeze::Drain(id));
                self.freeze_fast(true);
            }
        }
    }

    /// Sends the data that [`Disk::submit`] staged so far, in the middle of a batch; [`Disk::kick`] must
    /// follow at its end. Journal and flushes are looked at only there, once for the batch.
    pub fn send_staged(&mut self, st: &mut dyn Storage) {
        if !self.options.read_only {
            self.issue_staged(st);
        }
    }

    /// Starts what [`Disk::submit`] staged.
    pub fn kick(&mut self, st: &mut dyn Storage) {
        self.run(st);
    }

    /// A storage operation has ended.
    pub fn complete(
        &mut self,
        st: &mut dyn Storage,
        token: Token,
        result: Result<Done, StorageError>,
    ) {
        let pending = self.pending.remove(&token).expect("a token of ours, reported once");
        match pending {
            Pending::Nodes { faults, generation } => {
                self.nodes_arrived(st, faults, generation, result);
            }
            Pending::Read { id, io } => {
                self.running_io.remove(&io);
                self.piece_done(id, result.map(drop).map_err(RequestError::from));
            }
            Pending::Overwrite { id, io } => {
                self.running_io.remove(&io);
                if result.is_ok() {
                    self.landed += 1;
                }
                self.piece_done(id, result.map(drop).map_err(RequestError::from));
            }
            Pending::GroupEdge { group, edge } => self.edge_arrived(st, group, edge, result),
            Pending::GroupWrite { group } => self.group_write_ended(st, group, result),
            Pending::MoveRead { group, source } => {
                self.move_read_ended(st, group, source, result);
            }
            Pending::Record { sequence } => self.record_ended(st, sequence, result),
            Pending::Sync => self.sync_ended(st, result),
            Pending::Punch { range } => self.punch_ended(range, result),
            Pending::ZeroAhead { range, known_zero } => {
                self.zero_ahead_ended(range, known_zero, result);
            }
            Pending::DropPool { range } => self.drop_pool_ended(range, result),
            Pending::CheckpointWrite => self.checkpoint_write_ended(result),
            Pending::SuperblockWrite => self.superblock_write_ended(st, result),
            Pending::RingZero => self.ring_zero_ended(result),
            Pending::Reserve { range } => {
                if result == Err(StorageError::NoSpace) {
                    self.space.unreserve(range);
                }
            }
            Pending::Grow => self.growing = false,
        }
        self.run(st);
    }

    /// Lets background work happen. `now_ms` is any monotonic clock.
    pub fn tick(&mut self, st: &mut dyn Storage, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
        if self.options.read_only || self.is_frozen() {
            return;
        }
        self.count_fast_overwrites();
        let quiet_since = self.last_sync_ms.max(self.last_request_ms);
        if self.now_ms.saturating_sub(quiet_since) >= self.options.idle_sync_ms
            && self.background_wants_sync()
        {
            self.sync_due = true;
        }
        self.retry_superblock(st);
        self.clear_up_meanwhile(st, CLEAR_UP_NODES_TICK);
        self.age_pool(st);
        self.run(st);
    }

    /// Does everything that has become possible.
    fn run(&mut self, st: &mut dyn Storage) {
        if self.options.read_only {
            self.finish_read_only();
            return;
        }
        loop {
            let before = self.progress();
            self.retry_stalled(st);
            self.issue_staged(st);
            self.advance_moves(st);
            if !self.is_settling() {
                self.recycle(st);
            }
            if !self.checkpoint_waiters.is_empty() {
                // Somebody new waits for it.
                self.retry_superblock(st);
            }
            self.advance_checkpoint(st);
            self.advance_freeze();
            self.send_records_ahead(st);
            self.advance_durability(st);
            self.advance_resize(st);
            self.release_held(st);
            if before == self.progress() {
                return;
            }
        }
    }

    /// Changes whenever a step of [`Disk::run`] may have made another one possible.
    fn progress(&self) -> (u64, u64, u64, usize, [bool; 2], Option<Freeze>) {
        let ended = self.stats.checkpoints + self.stats.checkpoints_failed;
        let pending = [self.resizing.is_some(), self.leftovers.is_some()];
        (ended, self.next_token, self.cseq, self.active.len(), pending, self.freeze)
    }

    fn validate(&self, request: &Request) -> Result<(), RequestError> {
        let range = match *request {
            Request::Read { offset, len }
            | Request::Write { offset, len, .. }
            | Request::WriteZeroes { offset, len, .. }
            | Request::Discard { offset, len }
            | Request::Defragment { offset, len } => Some((offset, len)),
            Request::Resize { size } => {
                let most = exd_format::VIRTUAL_SIZE_MAX;
                if size == 0 || size % SECTOR != 0 || size > most {
                    return Err(RequestError::OutOfRange);
                }
                None
            }
            Request::Flush | Request::Checkpoint | Request::Freeze => None,
        };
        if let Some((offset, len)) = range {
            let inside = offset.checked_add(len).is_some_and(|end| end <= self.virtual_size);
            if !inside || offset % SECTOR != 0 || len % SECTOR != 0 {
                return Err(RequestError::OutOfRange);
            }
        }
        let changes = !matches!(request, Request::Read { .. } | Request::Flush);
        if changes && self.options.read_only {
            return Err(RequestError::ReadOnly);
        }
        if self.failed && !matches!(request, Request::Read { .. }) {
            return Err(RequestError::Failed);
        }
        Ok(())
    }

    /// Submits an operation and remembers what it is for.
    fn start(&mut self, st: &mut dyn Storage, op: Op, what: Pending) {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.pending.insert(token, what);
        st.submit(token, op);
    }

    fn write_bytes(&mut self, st: &mut dyn Storage, offset: u64, bytes: Arc<[u8]>, what: Pending) {
        self.start(st, Op::Write { offset, segments: vec![Segment::Bytes(bytes)] }, what);
    }

    /// One more piece of a request is under way.
    fn piece_started(&mut self, id: RequestId) {
        self.active.get_mut(&id).expect("the request is active").outstanding += 1;
    }

    /// A piece of a request has ended.
    fn piece_done(&mut self, id: RequestId, result: Result<(), RequestError>) {
        let active = self.active.get_mut(&id).expect("the request is active");
        if let Err(error) = result {
            active.error.get_or_insert(error);
        }
        active.outstanding -= 1;
        if active.outstanding > 0 {
            return;
        }
        let durable = match active.request {
            Request::Write { durable, .. } | Request::WriteZeroes { durable, .. } => durable,
            Request::Resize { .. } => return self.resize_pieces_done(),
            _ => false,
        };
        match active.error {
            None if durable => {
                self.stats.flushes += 1;
                self.small_since_flush = 0;
                self.wait_for_durability(id);
            }
            None => self.finish(id, Ok(())),
            Some(error) => self.finish(id, Err(error)),
        }
    }

    fn finish(&mut self, id: RequestId, result: Result<(), RequestError>) {
        self.active.remove(&id).expect("the request is active");
        self.finished.push_back((id, result));
    }

    /// Asks for a node of the tree; `work` goes on when it is here.
    fn park(&mut self, st: &mut dyn Storage, fault: Fault, work: Option<Work>) {
        let address = fault.pointer.address;
        let waiting = self.parked.entry(address);
        let first = matches!(waiting, std::collections::hash_map::Entry::Vacant(_));
        waiting.or_default().extend(work);
        if let Some(work) = work {
            self.piece_started(work.id);
        }
        if first {
            self.read_nodes(st, vec![fault]);
        }
    }

    /// Reads nodes that lie one behind the other.
    fn read_nodes(&mut self, st: &mut dyn Storage, faults: Vec<Fault>) {
        let Some(first) = faults.first() else { return };
        self.stats.node_reads += faults.len() as u64;
        let offset = first.pointer.address;
        let len = self.superblock.geometry().node_size() * faults.len() as u64;
        let generation = self.superblock.generation;
        self.start(st, Op::ReadBytes { offset, len }, Pending::Nodes { faults, generation });
    }

    /// Asks for `fault`, and for `more` that will be needed soon: neighbours in one operation.
    fn read_ahead(&mut self, st: &mut dyn Storage, fault: Fault, mut more: Vec<Fault>) {
        self.park(st, fault, None);
        let node_size = self.superblock.geometry().node_size();
        more.sort_unstable_by_key(|fault| fault.pointer.address);
        let mut run: Vec<Fault> = Vec::new();
        for fault in more {
            let address = fault.pointer.address;
            if self.parked.contains_key(&address) {
                continue;
            }
            self.parked.insert(address, Vec::new());
            if run.last().is_some_and(|last| last.pointer.address + node_size != address) {
                self.read_nodes(st, std::mem::take(&mut run));
            }
            run.push(fault);
        }
        self.read_nodes(st, run);
    }

    fn nodes_arrived(
        &mut self,
        st: &mut dyn Storage,
        faults: Vec<Fault>,
        generation: u64,
        result: Result<Done, StorageError>,
    ) {
        if generation != self.superblock.generation {
            // A checkpoint was committed meanwhile and may have reused these places: whoever waits
            // looks again, from the new root.
            for fault in faults {
                for work in self.parked.remove(&fault.pointer.address).unwrap_or_default() {
                    self.dispatch(st, work);
                }
            }
            return;
        }
        let node_size = self.superblock.geometry().node_size() as usize;
        let bytes = match result {
            Ok(Done::Bytes(bytes)) if bytes.len() == node_size * faults.len() => Ok(bytes),
            Ok(_) => Err(StorageError::Io(EIO)),
            Err(error) => Err(error),
        };
        for (index, fault) in faults.into_iter().enumerate() {
            let bytes = bytes.as_ref().map(|bytes| &bytes[index * node_size..][..node_size]);
            self.node_arrived(st, fault, bytes.map_err(|error| *error));
        }
    }

    fn node_arrived(
        &mut self,
        st: &mut dyn Storage,
        fault: Fault,
        bytes: Result<&[u8], StorageError>,
    ) {
        let address = fault.pointer.address;
        let verdict = match bytes {
            Ok(bytes) => match decode_node(bytes, &fault, &self.superblock.geometry()) {
                Ok(node) => {
                    self.map.cache.insert(fault.pointer, node);
                    Ok(())
                }
                Err(error) => {
                    self.corruption = Some(error);
                    Err(RequestError::Corrupt)
                }
            },
            Err(error) => Err(RequestError::Storage(error)),
        };
        if let Err(error) = verdict {
            self.checkpoint_node_failed(address, error);
        }
        for work in self.parked.remove(&address).unwrap_or_default() {
            match verdict {
                // The parked piece and the dispatched one are the same piece.
                Ok(()) => self.dispatch(st, work),
                Err(error) => self.piece_done(work.id, Err(error)),
            }
        }
    }

    /// Read-only images have nothing to make durable.
    fn finish_read_only(&mut self) {
        for waiter in std::mem::take(&mut self.flushes) {
            self.finish(waiter.id, Ok(()));
        }
    }

    /// Every operation on data gets a number, so that freed space can wait for those before it.
    fn begin_io(&mut self) -> u64 {
        let io = self.next_io;
        self.next_io += 1;
        self.running_io.insert(io);
        io
    }

    /// Operations numbered below this have ended.
    fn drained_io(&self) -> u64 {
        if bugs::on(Bug::ReuseBeforeDrain) {
            return self.next_io;
        }
        self.running_io.first().copied().unwrap_or(self.next_io)
    }
}

/// The errno of an input/output error, as Linux numbers it.
pub(crate) const EIO: i32 = 5;

impl Disk {
    /// Looks a block up, loading nodes as it goes. Operations of requests under way complete
    /// meanwhile.
    pub(crate) fn lookup_blocking(
        &mut self,
        st: &mut dyn Storage,
        block: u64,
        max: u64,
    ) -> Result<(crate::map::Mapping, u64), Error> {
        loop {
            let fault = match self.map.lookup(block, max) {
                Ok(found) => return Ok(found),
                Err(fault) => fault,
            };
            self.corruption = None;
            let address = fault.pointer.address;
            self.park(st, fault, None);
            while self.parked.contains_key(&address) {
                let (token, result) = st.wait();
                let error = result.as_ref().err().copied();
                self.complete(st, token, result);
                if let Some(error) = error {
                    return Err(Error::storage(error, "cannot read a tree node", address));
                }
            }
            if let Some(corruption) = &self.corruption {
                return Err(corruption.clone());
            }
        }
    }

    /// Moves the clock of [`Disk::tick`] on by `ms`.
    pub(crate) fn advance_clock(&mut self, st: &mut dyn Storage, ms: u64) {
        self.tick(st, self.now_ms + ms);
    }
}
