//! EXD images: the engine behind a lock, and what it knows as its storage.
//!
//! The lock is held while requests and ends of operations are handed to the engine, never while host
//! I/O is under way. Operations go the way to the host of the thread that happens to call.

use crate::disk::gate::Gate;
use crate::disk::keeper::{self, Image, Keeper};
use crate::disk::slots::Slots;
use crate::disk::tidy::Tidy;
use crate::disk::{Disk, Finished, Port, Properties, Router, Submission};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use crate::io::{HostIo, IoSetup, Part, Work};
use crate::queue::memory::GuestBuffer;
use crate::stats::Checkpoints;
use exd_file::lock::{LockError, lock, read_holder, unlock};
use exd_file::{HostFile, LockMode, LogKeeper, boot_id, storage_error};
use exd_image::fast::{Access, Fast, FastStats, FilePart, Lane, Ticket};
use exd_image::{
    Completion, Disk as Engine, Done, Geometry, Op, OpenOptions, Request, RequestError, RequestId,
    Segment, Stats, Storage, StorageError, Token,
};
use rustc_hash::FxHashMap;
use serde_json::json;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So many requests of a batch are on their way to the host before the next are looked at: what they cost
/// here and what they cost there overlap.
const PORTION: usize = 8;
/// The same of requests that the engine need not know of: they cost little here, and each portion wakes
/// the host's disk once.
const PORTION_FAST: usize = 16;

/// Bytes of the table of written blocks: 4 GiB in blocks of 4 KiB, 1 TiB in long runs.
const FAST_BYTES: u64 = 16 << 20;

/// The least that guests are told to prefer, in bytes: smaller blocks cost the image nothing, but a guest
/// that lays its data out by them, or discards by them, makes smaller requests than any host likes.
const HINT_MIN: u32 = 4096;

/// How often the engine gets a chance to work on its own.
const TICK: Duration = Duration::from_millis(100);

/// Between looks at an image that is to be closed.
const CLOSE_PAUSE: Duration = Duration::from_millis(10);
/// How long the end of what is under way may take before it is worth a message.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take until the image stands still.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);
/// A superblock that is being written may be read in the middle of it.
const PEEKS_MAX: u32 = 10;

/// The keeper's own request, of which there is one at a time. Guests' are numbered otherwise.
const OWN: RequestId = RequestId(u64::MAX);
/// The step of defragmentation under way.
const TIDY: RequestId = RequestId(u64::MAX - 1);

/// An EXD image.
pub struct ExdDisk {
    shared: Arc<Shared>,
    properties: Properties,
    gate: Arc<Gate>,
    keeper: Keeper,
}

struct Shared {
    core: Mutex<Core>,
    /// Reads and overwrites of written blocks go past the core.
    fast: Arc<Fast>,
    file: Arc<HostFile>,
    setup: IoSetup,
    log: LogKeeper,
    boot_id: [u8; 16],
    /// Wakes the keeper.
    wake: Arc<Event>,
    checkpoints: Arc<Checkpoints>,
}

struct Core {
    /// `None` while the image is not ours.
    engine: Option<Engine>,
    /// Buffers of the requests in flight.
    buffers: FxHashMap<RequestId, Arc<GuestBuffer>>,
    /// How the keeper's own request ended.
    own: Option<Result<(), RequestError>>,
    /// A step of defragmentation has ended.
    tidied: bool,
    /// A checkpoint is under way.
    checkpoint: bool,
    /// How often the engine was called.
    calls: u64,
    /// Sums of the statistics of closed sessions.
    past: serde_json::Map<String, serde_json::Value>,
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExdDisk {
    /// Opens the image in a locked file, with recovery if it was not closed cleanly. One that is not `held`
    /// is somebody else's: only what the guest is to be shown is read. The keeper waits for its lock as
    /// long as `patience`.
    pub fn open(
        file: Arc<HostFile>,
        options: OpenOptions,
        setup: IoSetup,
        router: Arc<Router>,
        held: bool,
        patience: Duration,
        defrag_idle: Option<Duration>,
    ) -> Result<ExdDisk, String> {
        let owner = file.metadata().map_err(|error| error.to_string())?.st_uid();
        let gate = Gate::new(held, 0).map_err(|error| format!("no eventfd: {error}"))?;
        let gate = Arc::new(gate);
        let io = HostIo::new(&setup, file.clone(), gate.wish().clone())
            .map_err(|error| format!("could not set up I/O: {error}"))?;
        let core = Core {
            engine: None,
            buffers: FxHashMap::default(),
            own: None,
            tidied: false,
            checkpoint: false,
            calls: 0,
            past: serde_json::Map::new(),
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            fast: Fast::new(FAST_BYTES),
            log: LogKeeper::new(file.path(), owner),
            file,
            setup,
            boot_id: boot_id(),
            wake: gate.wish().clone(),
            checkpoints: gate.checkpoints().clone(),
        });
        let read_only = options.read_only;
        let mut image = ExdImage {
            port: ExdPort::new(io, shared.clone()),
            event: gate.wish().clone(),
            options,
            router: router.clone(),
            begun: Instant::now(),
            next_tick: Instant::now(),
            generation: None,
            finished: Vec::new(),
            tidy: Tidy::new(defrag_idle.filter(|_| !read_only)),
        };
        let identity = image.peek()?;
        let capacity = if held { image.open()? } else { identity.virtual_size };
        gate.set_capacity(capacity);
        let block = u32::try_from(identity.block_size).unwrap_or(0).max(HINT_MIN);
        let properties = Properties {
            capacity,
            logical_block: 512,
            physical_block: block,
            discard_granularity: block,
            read_only,
            serial: identity.uuid.iter().take(10).map(|byte| format!("{byte:02x}")).collect(),
        };
        let keeper = Keeper::start(Box::new(image), gate.clone(), router, patience)
            .map_err(|error| format!("could not start the background thread: {error}"))?;
        Ok(ExdDisk { shared, properties, gate, keeper })
    }
}

/// What the keeper needs of an image.
struct ExdImage {
    port: ExdPort,
    event: Arc<Event>,
    options: OpenOptions,
    router: Arc<Router>,
    begun: Instant,
    next_tick: Instant,
    /// The image's generation when we gave it up.
    generation: Option<u64>,
    finished: Vec<Finished>,
    tidy: Tidy,
}

impl ExdImage {
    /// What the superblock says, without opening the image.
    fn peek(&mut self) -> Result<exd_image::Identity, String> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.port.peek() {
                Err(_) if tries < PEEKS_MAX => std::thread::sleep(CLOSE_PAUSE),
                result => return result,
            }
        }
    }

    /// Has the engine carry out a request of ours. One that takes longer than `patience` is called off
    /// where that is possible.
    fn carry_out(&mut self, request: Request, patience: Duration) -> Result<(), String> {
        let begun = Instant::now();
        self.port.with_engine(&mut self.finished, |engine, host| {
            engine.submit(host, OWN, request);
            engine.kick(host);
        });
        loop {
            if let Some(result) = self.port.shared.core().own.take() {
                return result.map_err(|error| error.to_string());
            }
            if begun.elapsed() > patience && request == Request::Freeze {
                self.port.with_engine(&mut self.finished, |engine, host| engine.thaw(host));
            }
            let pause = self.turn();
            keeper::wait(&self.event, pause.min(CLOSE_PAUSE));
        }
    }

    /// Nothing of the image's is under way on any thread.
    fn is_quiet(&self) -> bool {
        let core = self.port.shared.core();
        self.port.shared.fast.is_idle()
            && core.engine.as_ref().is_none_or(|engine| {
                engine.ops_in_flight() == 0 && engine.requests_in_flight() == 0
            })
    }
}

impl Image for ExdImage {
    fn lock(&mut self) -> Result<(), LockError> {
        let mode = if self.options.read_only { LockMode::Reader } else { LockMode::Writer };
        lock(&self.port.shared.file, mode, Duration::ZERO)
    }

    fn unlock(&mut self) {
        if let Err(error) = unlock(&self.port.shared.file) {
            log::error!("the image could not be unlocked: {error}");
        }
    }

    fn open(&mut self) -> Result<u64, String> {
        let begun = Instant::now();
        if let Some(left) = self.generation.take() {
            let found = self.peek()?.generation;
            if found != left {
                log::info!("another process has changed the image (generation {left} -> {found})");
            }
        }
        let mut engine = self.port.open(self.options.clone())?;
        engine.share(&self.port.shared.fast).map_err(|error| error.to_string())?;
        let info = engine.info();
        log::debug!("opened in {:?}: {info:?}", begun.elapsed());
        self.port.shared.core().engine = Some(engine);
        (self.begun, self.next_tick) = (begun, begun);
        self.tidy.restart();
        Ok(info.virtual_size)
    }

    fn close(&mut self) -> Result<(), String> {
        self.port.with_engine(&mut self.finished, |engine, _| engine.shut_fast());
        if !self.options.read_only
            && let Err(error) = self.carry_out(Request::Freeze, FREEZE_PATIENCE)
        {
            log::debug!("closing without a standstill: {error}");
        }
        let mut complain = Instant::now() + CLOSE_PATIENCE;
        while !self.is_quiet() {
            self.port.with_engine(&mut self.finished, |engine, host| {
                if engine.is_frozen() && engine.requests_in_flight() > 0 {
                    engine.thaw(host);
                }
            });
            if Instant::now() >= complain {
                log::warn!("waiting for operations on the image that the host does not end");
                complain = Instant::now() + CLOSE_PATIENCE;
            }
            let pause = self.turn();
            keeper::wait(&self.event, pause.min(CLOSE_PAUSE));
        }
        self.generation = None;
        self.generation = self.port.close()?;
        // A reader of the second socket may have been quicker.
        if self.generation.is_none() { self.close() } else { Ok(()) }
    }

    fn turn(&mut self) -> Duration {
        let now = Instant::now();
        if now >= self.next_tick {
            self.port.tick((now - self.begun).as_millis() as u64, &mut self.finished);
            self.next_tick = now + TICK;
        }
        while self.port.reap(&mut self.finished) {}
        self.router.deliver(&mut self.finished);
        self.next_tick.saturating_duration_since(Instant::now())
    }

    fn resize(&mut self, size: u64) -> Result<u64, String> {
        self.carry_out(Request::Resize { size }, Duration::MAX)?;
        let core = self.port.shared.core();
        Ok(core.engine.as_ref().map_or(size, |engine| engine.info().virtual_size))
    }

    fn checkpoint(&mut self) -> Result<(), String> {
        self.carry_out(Request::Checkpoint, Duration::MAX)
    }

    fn freeze(&mut self) -> Result<(), String> {
        if self.options.read_only {
            return Ok(());
        }
        self.carry_out(Request::Freeze, FREEZE_PATIENCE)
    }

    fn tidy(&mut self) {
        if !self.tidy.is_wanted() || Instant::now() < self.next_tick {
            return;
        }
        let shared = self.port.shared.clone();
        let mut core = shared.core();
        if std::mem::take(&mut core.tidied) {
            self.tidy.ended();
        }
        let Some(engine) = &core.engine else { return };
        let (stats, fast) = (engine.stats(), shared.fast.stats());
        let size = engine.info().virtual_size;
        drop(core);
        let requests = stats.reads + stats.writes + stats.zeroes + fast.reads + fast.overwrites;
        let written = stats.bytes_written + stats.zeroes;
        if let Some((offset, len)) = self.tidy.next(requests, written, size, Instant::now()) {
            self.port.with_engine(&mut self.finished, |engine, host| {
                engine.submit(host, TIDY, Request::Defragment { offset, len });
                engine.kick(host);
            });
        }
    }

    fn thaw(&mut self) {
        self.port.with_engine(&mut self.finished, |engine, host| engine.thaw(host));
    }
}

impl Disk for ExdDisk {
    fn properties(&self) -> Properties {
        Properties { capacity: self.gate.capacity(), ..self.properties.clone() }
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
        let io = HostIo::new(&self.shared.setup, self.shared.file.clone(), event)?;
        Ok(Box::new(ExdPort::new(io, self.shared.clone())))
    }

    fn statistics(&self) -> serde_json::Value {
        let core = self.shared.core();
        let mut all = match &core.engine {
            Some(engine) => sum(&core.past, counters(&engine.stats())),
            None => sum(&core.past, counters(&Stats::default())),
        };
        add_fast(&mut all, self.shared.fast.stats());
        all.insert("engine_calls".to_owned(), json!(core.calls));
        all.insert("format".to_owned(), json!("exd"));
        all.insert("open".to_owned(), json!(core.engine.is_some()));
        all.into()
    }
}

type Counters = serde_json::Map<String, serde_json::Value>;

/// Counters by name.
fn counters(stats: &Stats) -> Counters {
    let counters = json!({
        "reads": stats.reads,
        "writes": stats.writes,
        "zeroes": stats.zeroes,
        "flushes": stats.flushes,
        "bytes_written": stats.bytes_written,
        "bytes_read": stats.bytes_read,
        "syncs": stats.syncs,
        "records": stats.records,
        "record_bytes": stats.record_bytes,
        "entries": stats.entries,
        "checkpoints": stats.checkpoints,
        "checkpoints_failed": stats.checkpoints_failed,
        "metadata_bytes": stats.metadata_bytes,
        "node_reads": stats.node_reads,
        "edge_waits": stats.edge_waits,
        "merges": stats.merges,
        "first_writes": stats.first_writes,
        "overwrites": stats.overwrites,
        "punched_bytes": stats.punched_bytes,
        "zeroed_bytes": stats.zeroed_bytes,
        "ring_zeroed_bytes": stats.ring_zeroed_bytes,
        "moved_bytes": stats.moved_bytes,
    });
    match counters {
        serde_json::Value::Object(counters) => counters,
        _ => unreachable!("made as an object"),
    }
}

/// Adds what passed the engine by.
fn add_fast(counters: &mut Counters, fast: FastStats) {
    let sums = [
        ("reads", fast.reads),
        ("writes", fast.overwrites),
        ("overwrites", fast.overwrites),
        ("bytes_read", fast.bytes_read),
        ("bytes_written", fast.bytes_written),
        ("fast_reads", fast.reads),
        ("fast_overwrites", fast.overwrites),
        ("fast_misses", fast.misses),
    ];
    for (name, more) in sums {
        let before = counters.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        counters.insert(name.to_owned(), json!(before + more));
    }
}

/// Adds the counters of one session to those of others.
fn sum(past: &Counters, mut session: Counters) -> Counters {
    for (name, value) in &mut session {
        let before = past.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        *value = json!(before + value.as_u64().unwrap_or(0));
    }
    session
}

/// Waits for what an engine that has failed left under way: the lock must not be given up before (P9).
fn drain(io: &mut HostIo) {
    while io.unfinished() > 0 {
        drop(io.wait());
    }
}

/// Marks the tokens of operations that the engine knows nothing of.
const FAST: u64 = 1 << 63;

/// A request on its way past the engine.
struct FastRequest {
    id: RequestId,
    ticket: Ticket,
    /// Operations that have not ended.
    left: usize,
    error: Option<StorageError>,
}

struct ExdPort {
    /// Before the lane: when it is gone, nothing of the lane's is under way.
    io: HostIo,
    lane: Lane,
    fast: Slots<FastRequest>,
    parts: Vec<FilePart>,
    shared: Arc<Shared>,
    ends: Vec<Completion>,
}

impl ExdPort {
    fn new(io: HostIo, shared: Arc<Shared>) -> ExdPort {
        ExdPort {
            io,
            lane: shared.fast.lane(),
            fast: Slots::default(),
            parts: Vec::new(),
            shared,
            ends: Vec::new(),
        }
    }

    /// Starts a request that the engine need not know of. False if it must.
    fn begin_fast(&mut self, submission: &mut Submission) -> bool {
        let (access, offset, len) = match submission.request {
            Request::Read { offset, len } => (Access::Read, offset, len),
            Request::Write { offset, len, durable: false } => (Access::Overwrite, offset, len),
            _ => return false,
        };
        let Some(buffer) = &submission.buffer else { return false };
        self.parts.clear();
        let Some(ticket) = self.lane.begin(access, offset, len, &mut self.parts) else {
            return false;
        };
        let left = self.parts.len();
        let request = FastRequest { id: submission.id, ticket, left, error: None };
        let token = Token(FAST | u64::from(self.fast.insert(request)));
        let mut at = 0;
        for FilePart { offset, len } in self.parts.drain(..) {
            let buffer = buffer.clone();
            let work = match access {
                Access::Read => Work::ReadGuest { offset, buffer, buffer_offset: at, len },
                Access::Overwrite => {
                    let parts = Part::Guest { buffer, offset: at, len }.into();
                    Work::Write { offset, parts, durable: false, spare: (0, 0) }
                }
            };
            self.io.start(token, work);
            at += len;
        }
        true
    }

    /// Takes the end of an operation that the engine knows nothing of.
    fn end_fast(
        &mut self,
        token: Token,
        result: &Result<Done, StorageError>,
        finished: &mut Vec<Finished>,
    ) {
        let number = (token.0 & !FAST) as u32;
        let request = self.fast.get_mut(number).expect("the request is under way");
        request.left -= 1;
        if let Err(error) = result {
            request.error.get_or_insert(*error);
        }
        if request.left == 0
            && let Some(FastRequest { id, ticket, error, .. }) = self.fast.take(number)
        {
            self.lane.end(ticket);
            finished.push((id, error.map_or(Ok(()), |error| Err(error.into()))));
        }
    }

    fn open(&mut self, options: OpenOptions) -> Result<Engine, String> {
        let mut core = self.shared.core();
        let mut host = Host { io: &mut self.io, buffers: &mut core.buffers, shared: &self.shared };
        let opened = Engine::open(&mut host, options).map_err(|error| error.to_string());
        if opened.is_err() {
            drain(&mut self.io);
        }
        opened
    }

    fn peek(&mut self) -> Result<exd_image::Identity, String> {
        let mut core = self.shared.core();
        let mut host = Host { io: &mut self.io, buffers: &mut core.buffers, shared: &self.shared };
        exd_image::peek(&mut host).map_err(|error| error.to_string())
    }

    /// Calls the engine under the lock, if it is open, and takes what has finished.
    fn with_engine(
        &mut self,
        finished: &mut Vec<Finished>,
        call: impl FnOnce(&mut Engine, &mut Host<'_>),
    ) {
        let mut core = self.shared.core();
        let Core { engine: Some(engine), buffers, own, tidied, checkpoint, calls, .. } = &mut *core
        else {
            return;
        };
        *calls += 1;
        let mut host = Host { io: &mut self.io, buffers, shared: &self.shared };
        call(engine, &mut host);
        if *checkpoint != engine.is_checkpoint_under_way() {
            *checkpoint = !*checkpoint;
            self.shared.checkpoints.set_running(*checkpoint);
        }
        while let Some((id, result)) = engine.pop_finished() {
            if id == TIDY {
                // What cannot be moved stays where it is; a guest that reads it is told why.
                *tidied = true;
                continue;
            }
            if id == OWN {
                *own = Some(result);
                self.shared.wake.signal();
                continue;
            }
            buffers.remove(&id);
            if result == Err(RequestError::Corrupt)
                && let Some(damage) = engine.last_corruption()
            {
                log::error!(target: "guest", "the image is damaged: {damage}");
            }
            finished.push((id, result));
        }
        drop(core);
        self.io.enter_behind(finished);
    }

    fn tick(&mut self, now_ms: u64, finished: &mut Vec<Finished>) {
        self.with_engine(finished, |engine, host| engine.tick(host, now_ms));
    }

    /// Closes the engine: the generation it leaves. `None` if it has got requests meanwhile.
    fn close(&mut self) -> Result<Option<u64>, String> {
        let mut core = self.shared.core();
        let core = &mut *core;
        if core.engine.as_ref().is_some_and(|engine| engine.requests_in_flight() > 0) {
            return Ok(None);
        }
        let mut engine = core.engine.take().ok_or("the image is closed already")?;
        let mut host = Host { io: &mut self.io, buffers: &mut core.buffers, shared: &self.shared };
        let closed = engine.close(&mut host);
        core.past = sum(&core.past, counters(&engine.stats()));
        drain(&mut self.io);
        closed.map_err(|error| format!("could not close the image cleanly: {error}"))?;
        Ok(Some(engine.info().generation))
    }
}

impl Port for ExdPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        let mut begun = 0;
        batch.retain_mut(|submission| {
            let fast = self.begin_fast(submission);
            begun += usize::from(fast);
            if begun == PORTION_FAST {
                self.io.enter_behind(finished);
                begun = 0;
            }
            !fast
        });
        if begun > 0 {
            self.io.enter_behind(finished);
        }
        let mut left = usize::MAX;
        while !batch.is_empty() && batch.len() < left {
            left = batch.len();
            let count = portion(batch);
            let last = count == batch.len();
            self.with_engine(finished, |engine, host| {
                for Submission { id, request, buffer } in batch.drain(..count) {
                    if let Some(buffer) = buffer {
                        host.buffers.insert(id, buffer);
                    }
                    engine.submit(host, id, request);
                }
                match last {
                    true => engine.kick(host),
                    false => engine.send_staged(host),
                }
            });
        }
        // Given up since the gate was looked at; only a reader of the second socket can come so late.
        finished.extend(batch.drain(..).map(|late| (late.id, Err(RequestError::Failed))));
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let mut ends = std::mem::take(&mut self.ends);
        self.io.reap(&mut ends);
        let progress = !ends.is_empty();
        ends.retain(|(token, result)| {
            let fast = token.0 & FAST != 0;
            if fast {
                self.end_fast(*token, result, finished);
            }
            !fast
        });
        if !ends.is_empty() {
            self.with_engine(finished, |engine, host| {
                for (token, result) in ends.drain(..) {
                    engine.complete(host, token, result);
                }
            });
        } else {
            self.io.enter_behind(finished);
        }
        self.ends = ends;
        progress || self.io.has_results()
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        Some(self.io.lone_calls())
    }

    fn unfinished(&self) -> usize {
        self.io.unfinished()
    }
}

/// How many requests of the batch to begin with. Writes that follow each other stay together: the engine
/// makes one of them, and where they share a block it need not order them.
fn portion(batch: &[Submission]) -> usize {
    let range = |submission: &Submission| match submission.request {
        Request::Write { offset, len, .. } => Some((offset, offset + len)),
        _ => None,
    };
    let mut count = PORTION.min(batch.len());
    while count < batch.len() {
        let (Some(last), Some(next)) = (range(&batch[count - 1]), range(&batch[count])) else {
            break;
        };
        if last.1 != next.0 {
            break;
        }
        count += 1;
    }
    count
}

/// The engine's storage, for one call.
struct Host<'a> {
    io: &'a mut HostIo,
    buffers: &'a mut FxHashMap<RequestId, Arc<GuestBuffer>>,
    shared: &'a Shared,
}

impl Host<'_> {
    fn buffer(&self, request: RequestId) -> Arc<GuestBuffer> {
        self.buffers.get(&request).expect("a request in flight has a buffer").clone()
    }

    fn part(&self, segment: Segment) -> Part {
        match segment {
            Segment::Zero(len) | Segment::Spare(len) => Part::Zero(len),
            Segment::Request { request, offset, len } => {
                Part::Guest { buffer: self.buffer(request), offset, len }
            }
            Segment::Bytes(bytes) => Part::Bytes(bytes),
        }
    }

    fn write(&self, mut offset: u64, mut segments: Vec<Segment>) -> Work {
        let spare = Segment::trim(&mut offset, &mut segments);
        let parts: Vec<_> = segments.into_iter().map(|segment| self.part(segment)).collect();
        Work::Write { offset, parts: parts.into(), durable: false, spare }
    }

    /// Turns an operation into I/O. What is rare and quick and no I/O is done at once.
    fn work(&self, op: Op) -> Work {
        let file = &self.shared.file;
        let ended = |result: io::Result<Done>| Work::Ended(result.map_err(|e| storage_error(&e)));
        match op {
            Op::ReadBytes { offset, len } => Work::ReadBytes { offset, len },
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                Work::ReadGuest { offset, buffer: self.buffer(request), buffer_offset, len }
            }
            Op::Write { offset, segments } => self.write(offset, segments),
            Op::Punch { offset, len } => Work::Punch { offset, len },
            Op::Allocate { .. } if file.is_block_device() => Work::Ended(Ok(Done::Ok)),
            Op::Allocate { offset, len } => Work::Allocate { offset, len },
            Op::SetLen { len } => Work::SetLen { len },
            Op::Sync => Work::Sync,
            Op::NextData { offset } => ended(file.next_data(offset).map(Done::Data)),
        }
    }

    /// The last holder wrote its record in an earlier boot of the host, or on another one.
    fn held_in_another_boot(&self) -> bool {
        let holder = read_holder(&self.shared.file);
        holder.is_some_and(|holder| holder.boot_id != self.shared.boot_id)
    }
}

impl Storage for Host<'_> {
    fn submit(&mut self, token: Token, op: Op) {
        let work = self.work(op);
        self.io.start(token, work);
    }

    fn wait(&mut self) -> Completion {
        self.io.wait()
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        self.buffer(request).zero(offset, len);
    }

    fn geometry(&self) -> Geometry {
        self.shared.file.geometry()
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        self.shared.file.len().map_err(|error| storage_error(&error))
    }

    fn identity(&self) -> [u8; 16] {
        self.shared.file.identity()
    }

    fn boot_id(&self) -> [u8; 16] {
        self.shared.boot_id
    }

    fn read_log(&mut self, uuid: [u8; 16], path: &str) -> Result<Option<Vec<u8>>, StorageError> {
        match self.shared.log.read(uuid, path) {
            Ok(found) => Ok(found),
            // Out of reach, but of another boot, so that it would not count.
            Err(_) if self.held_in_another_boot() => Ok(None),
            Err(error) => {
                log::error!("{error}");
                Err(storage_error(&error.source))
            }
        }
    }

    fn create_log(
        &mut self,
        uuid: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError> {
        self.shared.log.create(uuid, bytes, len).map_err(|error| {
            log::error!("{error}");
            storage_error(&error.source)
        })
    }

    fn store_log(&mut self, offset: usize, bytes: &[u8]) {
        self.shared.log.store(offset, bytes);
    }

    fn remove_log(&mut self) {
        self.shared.log.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::IoEngine;
    use crate::queue::memory::tests::{memory, piece};
    use exd_file::{FileStorage, OpenMode};
    use exd_image::CreateOptions;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A disk in the current directory, since direct I/O does not work everywhere.
    struct Bench {
        disk: ExdDisk,
        _dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir_in(".").expect("temporary directory");
            let path = dir.path().join("disk.exd");
            let file = HostFile::create_new(&path, false).expect("create");
            let mut storage = FileStorage::new(file).expect("storage");
            let options = CreateOptions { virtual_size: 64 << 20, ..CreateOptions::default() };
            exd_image::create(&mut storage, &options).expect("create");
            drop(storage);
            let mode = OpenMode { write: true, direct: true };
            let file = HostFile::open(&path, mode).expect("open");
            lock(&file, LockMode::Writer, PATIENCE).expect("lock");
            let setup = IoSetup::new(IoEngine::Auto, &file).expect("set up");
            let (options, router) = (OpenOptions::default(), Arc::default());
            let disk = ExdDisk::open(Arc::new(file), options, setup, router, true, PATIENCE, None);
            Bench { disk: disk.expect("open"), _dir: dir }
        }

        fn thread(&self) -> Thread {
            let event = Arc::new(Event::new().expect("event"));
            Thread {
                port: self.disk.port(event.clone()).expect("port"),
                event,
                finished: Vec::new(),
            }
        }
    }

    /// What a queue's thread has.
    struct Thread {
        port: Box<dyn Port>,
        event: Arc<Event>,
        finished: Vec<Finished>,
    }

    impl Thread {
        fn set_alone(&mut self, alone: bool) {
            self.port.lone_calls().expect("it makes calls").set_alone(alone);
        }

        fn submit(&mut self, id: u64, request: Request, buffer: Option<Arc<GuestBuffer>>) {
            let mut batch = vec![Submission { id: RequestId(id), request, buffer }];
            self.port.submit(&mut batch, &mut self.finished);
        }

        /// Looks for ends as long as there are any, and sleeps only until the event.
        fn wait(&mut self) -> Vec<Finished> {
            let begun = Instant::now();
            loop {
                while self.port.reap(&mut self.finished) {}
                if !self.finished.is_empty() {
                    return std::mem::take(&mut self.finished);
                }
                keeper::wait(&self.event, PATIENCE);
                assert!(begun.elapsed() < PATIENCE, "no event tells of the end");
            }
        }
    }

    /// Unaligned memory of so many KiB, the same 16 again and again.
    fn unaligned(kib: u64) -> Arc<GuestBuffer> {
        let pieces: Vec<_> = (0..kib / 16).map(|_| piece(0x1001, 16 << 10, true)).collect();
        Arc::new(GuestBuffer::new(memory(), &pieces).expect("in memory"))
    }

    /// A request may be several calls, the next of which is made when the end of one is taken: the thread must
    /// not go to sleep over it.
    #[test]
    fn the_end_of_a_lone_call_waits_for_no_event() {
        let bench = Bench::new();
        let mut thread = bench.thread();
        let (offset, len) = (0, 1 << 20);
        let buffer = unaligned(1 << 10);
        for (id, request) in [
            (0, Request::Write { offset, len, durable: false }),
            (1, Request::Read { offset, len }),
            (2, Request::Write { offset, len, durable: false }),
            (3, Request::Flush),
        ] {
            thread.set_alone(true);
            let with_data = !matches!(request, Request::Flush);
            thread.submit(id, request, with_data.then(|| buffer.clone()));
            assert_eq!(thread.wait(), [(RequestId(id), Ok(()))]);
        }
    }

    /// Flushes of two threads: when the first ends, the thread that learns of it begins the sync that the
    /// second needs. It does not keep the first from its guest until that has ended.
    #[test]
    fn an_end_is_not_kept_back_by_a_call_for_somebody_else() {
        let bench = Bench::new();
        let mut threads = [bench.thread(), bench.thread()];
        let write = |offset| Request::Write { offset, len: 16 << 10, durable: false };
        for round in 0..20 {
            for (id, thread) in (0..).zip(&mut threads) {
                thread.set_alone(false);
                thread.submit(id, write((2 * round + id) << 20), Some(unaligned(16)));
                assert_eq!(thread.wait(), [(RequestId(id), Ok(()))]);
                thread.submit(id, Request::Flush, None);
            }
            let [first, second] = &mut threads;
            // Whatever it takes until one of the ends is here; the call would be made meanwhile.
            while first.finished.is_empty() && second.finished.is_empty() {
                for thread in [&mut *first, &mut *second] {
                    thread.set_alone(true);
                    let _ = thread.port.reap(&mut thread.finished);
                    let kept = !thread.finished.is_empty();
                    let lone = thread.port.lone_calls().expect("it makes calls");
                    lone.judge(|| {
                        assert!(!kept, "the end was kept back by a call");
                        false
                    });
                }
            }
            // An end may be with the other thread, whose request it is not.
            let mut ended = 0;
            while ended < 2 {
                for thread in &mut threads {
                    thread.set_alone(false);
                    let _ = thread.port.reap(&mut thread.finished);
                    ended += thread.finished.drain(..).count();
                }
            }
        }
    }
}
