//! Opening, recovery and closing.
//!
//! A writable opening always commits a checkpoint of its own before it takes requests: it ends the
//! journal's old epoch, so that leftovers cannot come back, and rewrites everything recovery relied
//! on, because the host may have dropped what it failed to write before (P5).

use super::checkpoint::CLOSED_LISTS;
use super::durability::Rhythm;
use super::{Disk, Stats};
use crate::blocking_io as io;
use crate::bugs::{self, Bug};
use crate::error::{Error, ErrorKind};
use crate::journal::Journal;
use crate::log::CompletionLog;
use crate::map::{Map, NodeCache};
use crate::pool::{Pool, ZeroAhead};
use crate::recovery::{self, Recovered};
use crate::request::RequestError;
use crate::storage::{SECTOR, Storage};
use exd_format::{
    CompletionLogHeader, HOLDER_OFFSET, Holder, Preallocation, SpaceList, State, Superblock,
};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// How to open an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenOptions {
    /// Only read. Nothing is written, not even for an image that was not closed cleanly.
    pub read_only: bool,
    /// Bound in bytes of the cache of tree nodes.
    pub cache_bytes: u64,
    /// Keep a completion log: completed requests survive the death of the process (P2).
    pub completion_log: bool,
    /// Who is opening, for others to see while the image is locked.
    pub holder: Option<HolderName>,
    /// Size in bytes of an allocation window.
    pub window_bytes: u64,
    /// How space is prepared for small first writes.
    pub zero_ahead: ZeroAhead,
    /// Bytes prepared ahead of the allocator, at most.
    pub zero_ahead_bytes: u64,
    /// First writes of so many bytes or fewer go to prepared space.
    pub zero_ahead_write_max: u64,
    /// Of them, so many bytes between two flushes: what prepared space saves is the host's metadata at the
    /// flush, and not the write of the data.
    pub zero_ahead_burst: u64,
    /// Prepared space that was not needed for so long is given back.
    pub zero_ahead_idle_ms: u64,
    /// The journal grows up to so many bytes.
    pub journal_max: u64,
    /// A checkpoint is due after so many changes of the map.
    pub overlay_max: u64,
    /// After a checkpoint, so many nodes of the old tree are given back with each step; with 0 at ticks only.
    pub clear_up_nodes: u64,
    /// Slots of the completion log.
    pub log_slots: u32,
    /// Without a flush from the guest, background work syncs on its own after so long.
    pub idle_sync_ms: u64,
    /// A failed checkpoint is tried again after so long.
    pub retry_ms: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            read_only: false,
            cache_bytes: 64 << 20,
            completion_log: true,
            holder: None,
            window_bytes: 256 << 20,
            zero_ahead: ZeroAhead::Off,
            zero_ahead_bytes: 32 << 20,
            zero_ahead_write_max: 32 << 10,
            zero_ahead_burst: 4 << 20,
            zero_ahead_idle_ms: 2000,
            journal_max: 16 << 20,
            overlay_max: 131_072,
            clear_up_nodes: 4,
            log_slots: 65536,
            idle_sync_ms: 1000,
            retry_ms: 200,
        }
    }
}

/// Who opens an image for writing.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct HolderName {
    /// Process id.
    pub pid: u64,
    /// Host name.
    pub host: String,
    /// Name of the program.
    pub program: String,
    /// What helps to find it, such as its socket.
    pub detail: String,
    /// Seconds since 1970.
    pub started: u64,
}

impl Disk {
    /// Opens an image, recovering it if it was not closed cleanly. `st` holds the lock.
    pub fn open(st: &mut dyn Storage, options: OpenOptions) -> Result<Disk, Error> {
        let mut recovered = recovery::recover(st)?;
        let superblock = recovered.superblock.clone();
        let block_size = 1u64 << superblock.block_bits;
        let geometry = st.geometry();
        if !options.read_only {
            let reasons = superblock.read_only_reasons();
            if !reasons.is_empty() {
                return Err(Error {
                    kind: ErrorKind::ReadOnly,
                    context: format!(
                        "the image can only be read by this version: {}",
                        reasons.join(", ")
                    ),
                    offset: None,
                });
            }
            let counters = [
                superblock.generation,
                superblock.epoch,
                superblock.tail_sequence,
                recovered.tail.sequence,
                recovered.cseq,
            ];
            if counters.iter().any(|counter| *counter > COUNTER_MAX) {
                return Err(Error::corrupt(0, "a counter of the superblock has run out"));
            }
            if options.log_slots < LOG_SLOTS_MIN {
                return Err(Error::invalid(format!(
                    "a completion log has at least {LOG_SLOTS_MIN} slots"
                )));
            }
            if geometry.alignment > block_size {
                return Err(Error::invalid(format!(
                    "the host needs I/O of {} bytes, the image has blocks of {block_size}: use buffered I/O",
                    geometry.alignment
                )));
            }
        }
        let unclean = superblock.state == State::InUse;
        if !options.read_only && (unclean || !recovered.both_slots) {
            // What a crash from now on would find must be what recovery goes by: it may be in one slot
            // only, or in the host's cache only.
            commit_superblock(st, &superblock)?;
        }
        let sectors_per_block = block_size / SECTOR;
        let cache = NodeCache::new(options.cache_bytes, superblock.geometry().node_size());
        let mut map = Map::new(superblock.root, cache, sectors_per_block);
        map.active =
            std::mem::replace(&mut recovered.overlay, crate::map::Overlay::new(sectors_per_block));
        let mut tail = recovered.tail;
        tail.chain = 0;
        let epoch = if options.read_only { superblock.epoch } else { superblock.epoch + 1 };
        let journal = Journal::new(
            superblock.uuid,
            epoch,
            superblock.segments.clone(),
            1 << superblock.record_bits,
            tail,
            recovered.cseq,
        );
        let mut disk = Disk {
            geometry,
            block_size,
            sectors_per_block,
            virtual_size: superblock.virtual_size,
            map,
            space: std::mem::replace(&mut recovered.space, crate::space::Space::new(1, 0)),
            journal,
            log: None,
            log_path: superblock.completion_log_path.clone(),
            superblock,
            options,
            next_token: 0,
            pending: FxHashMap::default(),
            active: FxHashMap::default(),
            finished: VecDeque::new(),
            groups: FxHashMap::default(),
            next_group: 0,
            owned: BTreeMap::new(),
            small_since_flush: 0,
            staged: Vec::new(),
            starved: VecDeque::new(),
            moves: Vec::new(),
            parked: HashMap::new(),
            stalled: VecDeque::new(),
            reserved: 0,
            next_io: 0,
            running_io: BTreeSet::new(),
            fast: None,
            freeze_io: 0,
            cseq: recovered.cseq,
            backlog: VecDeque::new(),
            durable_through: recovered.cseq,
            // What a session before left unsynced is not known: the image counts as dirty.
            landed: 1,
            synced: 0,
            sync: None,
            flushes: Vec::new(),
            rhythm: Rhythm::default(),
            sync_due: false,
            own_goal: None,
            failed: false,
            checkpoint: None,
            leftovers: None,
            checkpoint_waiters: Vec::new(),
            checkpoint_after_ms: 0,
            checkpoint_error: None,
            records_after_ms: 0,
            no_growth_before: 0,
            growth: None,
            resizing: None,
            freeze: None,
            held: VecDeque::new(),
            punches: 0,
            growing: false,
            starting: true,
            closing: false,
            now_ms: 0,
            last_sync_ms: 0,
            last_request_ms: 0,
            corruption: None,
            stats: Stats::default(),
        };
        if !disk.options.read_only {
            disk.start_session(st, &mut recovered)?;
        }
        Ok(disk)
    }

    /// Takes the image over: the checkpoint that begins a session.
    fn start_session(
        &mut self,
        st: &mut dyn Storage,
        recovered: &mut Recovered,
    ) -> Result<(), Error> {
        self.write_holder(st)?;
        let device_end = if self.geometry.fixed_length {
            Some(st.file_len().map_err(length_error)? / SECTOR)
        } else {
            None
        };
        // On a block device a punch writes zeroes: freed places are used again as they are.
        let keep =
            self.superblock.preallocation != Preallocation::Off || self.geometry.fixed_length;
        let policy = match self.options.zero_ahead {
            // Space of a device is allocated, and not zero for that.
            ZeroAhead::Falloc if self.geometry.fixed_length => ZeroAhead::Off,
            policy => policy,
        };
        let pool = Pool::new(policy, self.options.zero_ahead_bytes);
        let window_bytes = self.options.window_bytes;
        self.space.configure(self.geometry.host_block, window_bytes, device_end, keep, pool);
        let needed = self.reserve_needed(self.map.active.len() as u64 + 1);
        let needed = needed * self.superblock.geometry().node_size();
        let room = self.room_to_begin(st, recovered, needed)?;
        let meta = self.room_on_host(st, room, needed);
        if bugs::on(Bug::TrustPoolAfterUnclean) {
            let mut open = self.space.open.clone();
            for range in meta.iter() {
                open.remove(range);
            }
            for range in open.iter() {
                self.space.add_window(range, true);
            }
        }
        self.space.adopt_open(meta);
        if let Some((range, known_zero)) = self.space.plan_window() {
            if !self.geometry.fixed_length {
                let end = self.space.data_end.max(range.end) * SECTOR;
                if st.file_len().map_err(length_error)? < end {
                    // A longer file spares each appending write its own growth; a full host or a
                    // limit on file sizes shows later, where it matters.
                    let _ = io::set_len(st, end);
                }
            }
            self.space.add_window(range, known_zero);
        }
        // The commit is this session's first; the log of the session before is honoured until then.
        self.start_checkpoint(st, true, State::InUse);
        self.drive(st, |disk| disk.checkpoint.is_none())?;
        if self.options.completion_log {
            self.create_log(st)?;
        } else {
            st.remove_log();
        }
        self.starting = false;
        self.top_up_reserve(st);
        Ok(())
    }

    fn create_log(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let header = CompletionLogHeader {
            epoch: self.journal.epoch(),
            uuid: self.superblock.uuid,
            boot_id: st.boot_id(),
            storage: st.identity(),
            slot_count: self.options.log_slots,
            flags: 0,
        };
        let len = header.file_length() as usize;
        let path = st.create_log(header.uuid, &header.encode(), len).map_err(|error| Error {
            kind: ErrorKind::Storage(error),
            context: "cannot create the completion log".into(),
            offset: None,
        })?;
        self.log = Some(CompletionLog::new(header));
        // Whoever recovers the image must find the log: where it is, is part of the image.
        if path != self.log_path && path.len() <= LOG_PATH_MAX {
            self.log_path = path;
            self.start_checkpoint(st, true, State::InUse);
            self.drive(st, |disk| disk.checkpoint.is_none())?;
        }
        Ok(())
    }

    pub(super) fn write_holder(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let name = self.options.holder.clone().unwrap_or_default();
        let holder = Holder {
            epoch: self.journal.epoch(),
            uuid: self.superblock.uuid,
            pid: name.pid,
            started: name.started,
            boot_id: st.boot_id(),
            host: name.host,
            program: name.program,
            detail: name.detail,
        };
        io::write(st, HOLDER_OFFSET, &holder.encode(), "the holder record")
    }

    /// Waits for storage until `done`.
    fn drive(&mut self, st: &mut dyn Storage, done: impl Fn(&Disk) -> bool) -> Result<(), Error> {
        self.run(st);
        while !done(self) {
            if let Some(error) = self.stuck() {
                return Err(error);
            }
            let (token, result) = st.wait();
            let failure = result.as_ref().err().copied();
            self.complete(st, token, result);
            if let Some(error) = failure
                && self.checkpoint.is_none()
                && self.stats.checkpoints_failed > 0
            {
                return Err(Error {
                    kind: ErrorKind::Storage(error),
                    context: "cannot write a checkpoint".into(),
                    offset: None,
                });
            }
        }
        if self.stats.checkpoints_failed > 0 || self.failed {
            return Err(self.stuck().unwrap_or_else(|| self.failure()));
        }
        Ok(())
    }

    fn failure(&self) -> Error {
        if let Some(corruption) = &self.corruption {
            return corruption.clone();
        }
        if let Some(error) = self.checkpoint_error {
            let mut error = Error::from(error);
            error.context = format!("cannot write a checkpoint: {}", error.context);
            return error;
        }
        Error {
            kind: ErrorKind::Failed,
            context: format!(
                "the session cannot be ended: {} operations under way, {} requests, checkpoint {}",
                self.pending.len(),
                self.active.len(),
                self.checkpoint.is_some()
            ),
            offset: None,
        }
    }

    /// Why nothing more will happen, if that is so.
    fn stuck(&self) -> Option<Error> {
        (self.pending.is_empty() || self.failed).then(|| self.failure())
    }

    /// Ends the session: drains, checkpoints, gives unused space back, marks the image clean and
    /// removes the completion log. After an error the image is as after a crash.
    pub fn close(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        self.end_fast()?;
        if self.options.read_only {
            return Ok(());
        }
        self.fail_freeze(RequestError::Failed);
        self.freeze = None;
        self.no_growth_before = u64::MAX;
        // What failed before is tried again now.
        self.stats.checkpoints_failed = 0;
        self.checkpoint_error = None;
        self.checkpoint_after_ms = 0;
        self.records_after_ms = 0;
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.urgent = true;
        }
        self.drive(st, |disk| disk.active.is_empty() && disk.held.is_empty())?;
        if self.map.active.len() > CLOSING_CHANGES {
            // The last checkpoint's room stays with the image: few changes are left for it.
            self.request_checkpoint(st, true);
        }
        self.settle_for_good(st)?;
        if self.checkpoint.is_some() {
            return Err(self.failure());
        }
        self.end_session(st).inspect_err(|_| {
            // A clean superblock may be on its way: nothing may follow it.
            self.fail();
        })?;
        self.give_back(st);
        if !self.geometry.fixed_length {
            let end = self.superblock.data_end;
            if st.file_len().map_err(length_error)? > end {
                // The image is complete already; the tail is a hole.
                let _ = io::set_len(st, end);
            }
        }
        st.remove_log();
        self.log = None;
        Ok(())
    }

    /// The clean end: after an error the image is not to be used any more.
    fn end_session(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        self.reclaim(st)?;
        self.log_path.clear();
        self.stats.checkpoints_failed = 0;
        self.start_checkpoint(st, true, State::Clean);
        self.drive(st, |disk| disk.checkpoint.is_none() && disk.pending.is_empty())
    }

    /// What the closed image does not own needs no space on the host. It stays listed as open: these
    /// punches are not made durable, and if the host cannot punch, nothing is lost.
    fn give_back(&mut self, st: &mut dyn Storage) {
        if self.space.keeps() {
            return;
        }
        let unit = (self.geometry.host_block / SECTOR).max(1);
        for range in self.space.unreserved() {
            let start = range.start.next_multiple_of(unit);
            let end = range.end / unit * unit;
            if start < end && io::punch(st, start * SECTOR..end * SECTOR).is_err() {
                return;
            }
        }
    }

    /// Everything committed becomes durable and everything freed gets punched.
    fn settle_for_good(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let mut tries = SUPERBLOCK_TRIES;
        loop {
            self.clear_up(st, u64::MAX);
            let busy = |disk: &Disk| {
                !disk.pending.is_empty()
                    || disk.space.wants_punch()
                    || disk.space.awaits_sync()
                    || disk.synced < disk.landed
                    || disk.checkpoint.is_some()
            };
            if !busy(self) {
                return Ok(());
            }
            // One sync for all that was under way, not one after each piece of it.
            self.sync_due = self.pending.is_empty() && !self.space.wants_punch();
            self.run(st);
            if self.failed {
                return Err(self.failure());
            }
            if self.pending.is_empty() {
                if tries == 0 {
                    return Ok(());
                }
                // A superblock that could not be written: only the same bytes may follow.
                tries -= 1;
                self.retry_superblock(st);
                continue;
            }
            let (token, result) = st.wait();
            self.complete(st, token, result);
        }
    }

    /// Gives back what the session held in advance.
    fn reclaim(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        // The list grows by what is left of the windows.
        let list = self.list_length() + SpaceList::length_for(self.space.ranges_to_close());
        let run = CLOSED_LISTS * list / SECTOR;
        self.ensure_run(st, run);
        self.settle_for_good(st)?;
        if self.checkpoint.is_some() {
            return Err(self.failure());
        }
        self.clear_up(st, u64::MAX);
        self.closing = true;
        if let Some(growth) = self.growth.take() {
            self.space.add_dirty(growth.into_range());
        }
        self.space.close_windows();
        let nodes = 2 * self.reserve_needed(self.map.active.len() as u64 + 1);
        let keep = nodes * self.superblock.geometry().node_size() / SECTOR + run;
        let keep = keep.max(CLOSED_META_BYTES / SECTOR);
        self.space.shrink_meta(keep);
        let mut punched = Vec::new();
        while let Some(range) = self.space.take_punch(u64::MAX / 2, u64::MAX) {
            let bytes = range.start * SECTOR..range.end * SECTOR;
            match io::punch(st, bytes) {
                Ok(()) => punched.push(range),
                Err(_) => self.space.punch_failed(range),
            }
        }
        if !punched.is_empty() {
            io::sync(st).inspect_err(|_| self.fail())?;
            for range in punched {
                self.space.release(range);
            }
        }
        self.space.trim_end();
        Ok(())
    }
}

/// Room for metadata that a closed image keeps, so that the next session can begin on a full host.
const CLOSED_META_BYTES: u64 = 256 << 10;

/// More changes than this get a checkpoint of their own before the last one.
const CLOSING_CHANGES: usize = 1024;

/// A session that begins here cannot count past what the format allows, 2^62.
const COUNTER_MAX: u64 = (1 << 62) - (1 << 48);

/// Fewer slots of the completion log would not do for what the engine keeps in reserve.
const LOG_SLOTS_MIN: u32 = 128;

/// How often closing tries to write a superblock.
const SUPERBLOCK_TRIES: u32 = 3;

/// Longest path of a completion log that the superblock holds.
const LOG_PATH_MAX: usize = 702;

fn length_error(error: crate::storage::StorageError) -> Error {
    Error {
        kind: ErrorKind::Storage(error),
        context: "cannot tell the length of the image file".into(),
        offset: None,
    }
}

/// Writes a superblock to both slots, each durable before the next step.
pub(crate) fn commit_superblock(
    st: &mut dyn Storage,
    superblock: &Superblock,
) -> Result<(), Error> {
    let first = superblock.first_slot();
    for slot in [first, 1 - first] {
        let offset = Superblock::slot_address(slot);
        io::write(st, offset, &superblock.encode(slot), "the superblock")?;
        io::sync(st)?;
    }
    Ok(())
}

/// What an open image fails with when it cannot go on.
impl From<RequestError> for Error {
    fn from(error: RequestError) -> Self {
        let kind = match error {
            RequestError::OutOfRange => ErrorKind::Invalid,
            RequestError::ReadOnly => ErrorKind::ReadOnly,
            RequestError::Storage(error) => ErrorKind::Storage(error),
            RequestError::Corrupt => ErrorKind::Corrupt,
            RequestError::Failed => ErrorKind::Failed,
        };
        let context = match error {
            RequestError::Storage(_) => "request failed".into(),
            other => other.to_string(),
        };
        Error { kind, context, offset: None }
    }
}
