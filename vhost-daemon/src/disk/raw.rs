//! Raw images: each request is one operation on the file.

use crate::disk::gate::Gate;
use crate::disk::keeper::{Image, Keeper};
use crate::disk::slots::Slots;
use crate::disk::{Disk, Finished, Port, Properties, Router, Submission};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use crate::io::{HostIo, IoSetup, Part, Work};
use exd_file::lock::{LockError, lock_for_qemu, unlock_for_qemu};
use exd_file::{HostFile, LockMode};
use exd_image::{Request, RequestError};
use exd_image::{RequestId, StorageError, Token};
use serde_json::json;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long changes that are under way may take to end.
const STANDSTILL_PATIENCE: Duration = Duration::from_secs(60);
/// Between looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(100);

/// A raw image.
pub struct RawDisk {
    shared: Arc<Shared>,
    gate: Arc<Gate>,
    keeper: Keeper,
    read_only: bool,
}

struct Shared {
    file: Arc<HostFile>,
    setup: IoSetup,
    gate: Arc<Gate>,
    /// A sync failed: nothing is durable any more (P5).
    failed: AtomicBool,
    syncs: AtomicU64,
    /// Writes that were asked to be durable when they end, which needs no sync besides.
    durable_writes: AtomicU64,
    requests: AtomicU64,
    standstill: Standstill,
}

/// Holds changes of the file back while it must not change. Whoever begins a change counts first and looks
/// then; whoever wants a standstill says so first and counts then.
#[derive(Default)]
struct Standstill {
    wanted: AtomicBool,
    /// Changes under way.
    changes: AtomicUsize,
    lock: Mutex<()>,
    quiet: Condvar,
}

impl Standstill {
    /// A change begins, unless it has to wait.
    fn begin(&self) -> bool {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let free = !self.wanted.load(Ordering::SeqCst);
        if !free {
            self.end();
        }
        free
    }

    fn end(&self) {
        if self.changes.fetch_sub(1, Ordering::SeqCst) == 1 && self.wanted.load(Ordering::SeqCst) {
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.quiet.notify_all();
        }
    }

    /// Begins no more changes and waits for those under way. False if they take too long.
    fn wait(&self, patience: Duration) -> bool {
        self.wanted.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + patience;
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.changes.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            let waited = self.quiet.wait_timeout(lock, PAUSE);
            lock = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }
}

impl RawDisk {
    /// On an open file, locked if it is `held`. The keeper waits for its lock as long as `patience`.
    pub fn new(
        file: Arc<HostFile>,
        setup: IoSetup,
        read_only: bool,
        router: Arc<Router>,
        held: bool,
        patience: Duration,
    ) -> io::Result<RawDisk> {
        let gate = Arc::new(Gate::new(held, 0)?);
        let shared = Arc::new(Shared {
            file,
            setup,
            gate: gate.clone(),
            failed: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            durable_writes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            standstill: Standstill { wanted: AtomicBool::new(!held), ..Standstill::default() },
        });
        let image = RawImage { shared: shared.clone(), router: router.clone(), read_only };
        gate.set_capacity(image.capacity()?);
        let keeper = Keeper::start(Box::new(image), gate.clone(), router, patience)?;
        Ok(RawDisk { shared, gate, keeper, read_only })
    }
}

/// What the keeper needs of an image.
struct RawImage {
    shared: Arc<Shared>,
    router: Arc<Router>,
    read_only: bool,
}

impl RawImage {
    /// Whole blocks of the file.
    fn capacity(&self) -> io::Result<u64> {
        let len = self.shared.file.len()?;
        let block = self.shared.file.geometry().alignment;
        if !len.is_multiple_of(block) {
            log::warn!(
                "the last {} bytes of the image are no whole block: not served",
                len % block
            );
        }
        Ok(len - len % block)
    }

    fn sync(&self) -> Result<(), String> {
        if self.read_only {
            return Ok(());
        }
        self.shared.syncs.fetch_add(1, Ordering::Relaxed);
        self.shared.file.sync().map_err(|error| {
            self.shared.failed.store(true, Ordering::Release);
            format!("could not sync the image: {error}")
        })
    }

    /// Stops changes, or goes on if that takes too long.
    fn stand_still(&mut self) -> Result<(), String> {
        if self.shared.standstill.wait(STANDSTILL_PATIENCE) {
            return Ok(());
        }
        self.go_on();
        Err("the writes under way take too long".to_owned())
    }

    fn go_on(&mut self) {
        self.shared.standstill.wanted.store(false, Ordering::SeqCst);
        self.router.wake_all();
    }

    /// No change is under way and none begins.
    fn set_size(&self, size: u64) -> Result<u64, String> {
        let file = &self.shared.file;
        if !file.is_block_device() {
            let before = self.shared.gate.capacity();
            // What lies past the end must not be asked for while it goes away.
            self.shared.gate.set_capacity(size.min(before));
            // This thread has no I/O of its own that the file system could be waiting for.
            if let Err(error) = file.set_len(size) {
                self.shared.gate.set_capacity(before);
                return Err(error.to_string());
            }
            self.sync()?;
            return Ok(size);
        }
        // Its size is not ours to set, but may have been changed.
        let now = self.capacity().map_err(|error| error.to_string())?;
        if size > now { Err(format!("the device has {now} bytes")) } else { Ok(size) }
    }
}

impl Image for RawImage {
    fn lock(&mut self) -> Result<(), LockError> {
        let mode = if self.read_only { LockMode::Reader } else { LockMode::Writer };
        lock_for_qemu(&self.shared.file, mode)
    }

    fn unlock(&mut self) {
        if let Err(error) = unlock_for_qemu(&self.shared.file) {
            log::error!("the image could not be unlocked: {error}");
        }
    }

    fn open(&mut self) -> Result<u64, String> {
        self.shared.failed.store(false, Ordering::Release);
        self.shared.standstill.wanted.store(false, Ordering::SeqCst);
        self.capacity().map_err(|error| error.to_string())
    }

    fn close(&mut self) -> Result<(), String> {
        // Nobody writes any more; if somebody does, the lock stays until that has ended (P9).
        while !self.shared.standstill.wait(STANDSTILL_PATIENCE) {
            log::warn!("waiting for operations on the image that the host does not end");
        }
        // The standstill lasts until the image is ours again.
        self.sync()
    }

    fn turn(&mut self) -> Duration {
        Duration::from_secs(3600)
    }

    fn resize(&mut self, size: u64) -> Result<u64, String> {
        let block = self.shared.file.geometry().alignment;
        if self.read_only {
            return Err("the image is open read-only".to_owned());
        }
        if size == 0 || !size.is_multiple_of(block) {
            return Err(format!("the size must be a multiple of {block} bytes"));
        }
        self.stand_still()?;
        let result = self.set_size(size);
        self.go_on();
        result
    }

    fn checkpoint(&mut self) -> Result<(), String> {
        self.sync()
    }

    fn freeze(&mut self) -> Result<(), String> {
        self.stand_still()?;
        self.sync().inspect_err(|_| self.go_on())
    }

    fn thaw(&mut self) {
        self.go_on();
    }
}

impl Disk for RawDisk {
    fn properties(&self) -> Properties {
        let geometry = self.shared.file.geometry();
        let block = u32::try_from(geometry.alignment).unwrap_or(512);
        let host_block = u32::try_from(geometry.host_block).unwrap_or(block);
        Properties {
            capacity: self.gate.capacity(),
            logical_block: block,
            physical_block: host_block,
            discard_granularity: host_block,
            read_only: self.read_only,
            serial: "vhost-daemon-raw".to_owned(),
        }
    }

    fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    fn file(&self) -> &Arc<HostFile> {
        &self.shared.file
    }

    fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    fn port(&self, event: Arc<Event>) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(RawPort {
            io: HostIo::new(&self.shared.setup, self.shared.file.clone(), event)?,
            shared: self.shared.clone(),
            steps: Slots::default(),
            ends: Vec::new(),
            held: VecDeque::new(),
        }))
    }

    fn statistics(&self) -> serde_json::Value {
        json!({
            "format": "raw",
            "syncs": self.shared.syncs.load(Ordering::Relaxed),
            "durable_writes": self.shared.durable_writes.load(Ordering::Relaxed),
            "requests": self.shared.requests.load(Ordering::Relaxed),
        })
    }
}

struct RawPort {
    io: HostIo,
    shared: Arc<Shared>,
    steps: Slots<Step>,
    ends: Vec<exd_image::Completion>,
    /// Changes that wait for the end of a standstill.
    held: VecDeque<Submission>,
}

/// What an operation belongs to and what follows it.
struct Step {
    id: RequestId,
    /// It counts as a change.
    changes: bool,
    after: After,
}

enum After {
    /// The request is finished.
    Finish,
    /// The operation made things durable; if it fails, that is final.
    FinishDurable,
    /// The space may have been given back: a wish, not a promise.
    Discarded,
    /// The range was zeroed.
    Zeroed { offset: u64, len: u64, durable: bool },
}

impl RawPort {
    fn start(&mut self, id: RequestId, changes: bool, work: Work, after: After) {
        let number = self.steps.insert(Step { id, changes, after });
        self.io.start(Token(number.into()), work);
    }

    fn sync(&mut self, id: RequestId, changes: bool) {
        self.shared.syncs.fetch_add(1, Ordering::Relaxed);
        self.start(id, changes, Work::Sync, After::FinishDurable);
    }

    /// Begins a request, or puts it by during a standstill.
    fn admit(&mut self, submission: Submission, finished: &mut Vec<Finished>) {
        let changes = !matches!(submission.request, Request::Read { .. } | Request::Flush);
        if changes && !self.shared.standstill.begin() {
            self.held.push_back(submission);
            return;
        }
        let id = submission.id;
        if let Err(error) = self.begin(submission, changes) {
            self.finish(id, changes, Err(error), finished);
        }
    }

    fn finish(
        &self,
        id: RequestId,
        changes: bool,
        result: Result<(), RequestError>,
        finished: &mut Vec<Finished>,
    ) {
        if changes {
            self.shared.standstill.end();
        }
        finished.push((id, result));
    }

    fn begin(&mut self, submission: Submission, changes: bool) -> Result<(), RequestError> {
        let Submission { id, request, buffer } = submission;
        let durable = matches!(
            request,
            Request::Flush
                | Request::Write { durable: true, .. }
                | Request::WriteZeroes { durable: true, .. }
        );
        if durable && self.shared.failed.load(Ordering::Acquire) {
            return Err(RequestError::Failed);
        }
        // The size may have changed since the request was looked at.
        let capacity = self.shared.gate.capacity();
        let inside = |offset: u64, len: u64| match offset.checked_add(len) {
            Some(end) if end <= capacity => Ok(()),
            _ => Err(RequestError::OutOfRange),
        };
        match request {
            Request::Read { offset, len } => {
                inside(offset, len)?;
                let buffer = buffer.ok_or(RequestError::OutOfRange)?;
                let work = Work::ReadGuest { offset, buffer, buffer_offset: 0, len };
                self.start(id, changes, work, After::Finish);
            }
            Request::Write { offset, len, durable } => {
                inside(offset, len)?;
                let buffer = buffer.ok_or(RequestError::OutOfRange)?;
                let parts = Part::Guest { buffer, offset: 0, len }.into();
                self.shared.durable_writes.fetch_add(u64::from(durable), Ordering::Relaxed);
                let after = if durable { After::FinishDurable } else { After::Finish };
                self.start(
                    id,
                    changes,
                    Work::Write { offset, parts, durable, spare: (0, 0) },
                    after,
                );
            }
            Request::WriteZeroes { offset, len, unmap, durable } => {
                inside(offset, len)?;
                let work =
                    if unmap { Work::Punch { offset, len } } else { Work::Zero { offset, len } };
                self.start(id, changes, work, After::Zeroed { offset, len, durable });
            }
            Request::Discard { offset, len } => {
                inside(offset, len)?;
                self.start(id, changes, Work::Punch { offset, len }, After::Discarded);
            }
            Request::Flush => self.sync(id, changes),
            Request::Checkpoint
            | Request::Defragment { .. }
            | Request::Freeze
            | Request::Resize { .. } => {
                return Err(RequestError::OutOfRange);
            }
        }
        Ok(())
    }

    fn end(&mut self, step: Step, result: Result<(), StorageError>, finished: &mut Vec<Finished>) {
        let Step { id, changes, after } = step;
        match (after, result) {
            (After::Zeroed { offset, len, durable }, Err(StorageError::Unsupported)) => {
                let parts = Part::Zero(len).into();
                let after = if durable { After::FinishDurable } else { After::Finish };
                self.start(
                    id,
                    changes,
                    Work::Write { offset, parts, durable, spare: (0, 0) },
                    after,
                );
            }
            (After::Discarded, Err(StorageError::Unsupported)) => {
                self.finish(id, changes, Ok(()), finished);
            }
            (After::Zeroed { durable: true, .. }, Ok(())) => self.sync(id, changes),
            (After::FinishDurable, Err(error @ StorageError::Io(_))) => {
                if !self.shared.failed.swap(true, Ordering::AcqRel) {
                    log::error!(
                        "the image could not be synced: {error}; no flush succeeds any more"
                    );
                }
                self.finish(id, changes, Err(error.into()), finished);
            }
            (_, result) => {
                self.finish(id, changes, result.map_err(RequestError::from), finished);
            }
        }
    }

    /// Begins what waited for the end of a standstill.
    fn release_held(&mut self, finished: &mut Vec<Finished>) -> bool {
        if self.held.is_empty() || self.shared.standstill.is_wanted() {
            return false;
        }
        for submission in std::mem::take(&mut self.held) {
            self.admit(submission, finished);
        }
        true
    }
}

impl Port for RawPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        self.shared.requests.fetch_add(batch.len() as u64, Ordering::Relaxed);
        for submission in batch.drain(..) {
            self.admit(submission, finished);
        }
        self.io.enter_behind(finished);
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let released = self.release_held(finished);
        let mut ends = std::mem::take(&mut self.ends);
        self.io.reap(&mut ends);
        let progress = released || !ends.is_empty();
        for (token, result) in ends.drain(..) {
            let step = self.steps.take(token.0 as u32).expect("every operation has a step");
            self.end(step, result.map(|_| ()), finished);
        }
        self.ends = ends;
        self.io.enter_behind(finished);
        progress || self.io.has_results()
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        Some(self.io.lone_calls())
    }

    fn unfinished(&self) -> usize {
        self.io.unfinished() + self.held.len()
    }
}
