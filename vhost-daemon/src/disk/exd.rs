//! EXD images: the engine behind a lock, and what it knows as its storage.
//!
//! The lock is held while requests and ends of operations are handed to the engine, never while host
//! I/O is under way. Operations go the way to the host of the thread that happens to call.

use crate::disk::gate::Gate;
use crate::disk::{Disk, Finished, Hold, NOT_YET, Port, Properties, Router, Submission};
use crate::event::Event;
use crate::io::{HostIo, IoSetup, Part, Work};
use crate::queue::memory::GuestBuffer;
use exd_file::lock::read_holder;
use exd_file::{HostFile, LogKeeper, boot_id, storage_error};
use exd_image::{
    Completion, Disk as Engine, Done, Geometry, Op, OpenOptions, RequestError, RequestId, Segment,
    Stats, Storage, StorageError, Token,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often the engine gets a chance to work on its own.
const TICK: Duration = Duration::from_millis(100);

/// An EXD image.
pub struct ExdDisk {
    shared: Arc<Shared>,
    properties: Properties,
    background: Mutex<Option<Background>>,
    wake: Arc<Event>,
    gate: Arc<Gate>,
    stopping: Arc<AtomicBool>,
}

type Background = JoinHandle<ExdPort>;

struct Shared {
    core: Mutex<Core>,
    file: Arc<HostFile>,
    setup: IoSetup,
    log: LogKeeper,
    boot_id: [u8; 16],
}

struct Core {
    /// `None` once it is closed.
    engine: Option<Engine>,
    /// Buffers of the requests in flight.
    buffers: HashMap<RequestId, Arc<GuestBuffer>>,
    stats: Stats,
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExdDisk {
    /// Opens the image in a locked file, with recovery if it was not closed cleanly.
    pub fn open(
        file: Arc<HostFile>,
        options: OpenOptions,
        setup: IoSetup,
        router: Arc<Router>,
    ) -> Result<ExdDisk, String> {
        let owner = file.metadata().map_err(|error| error.to_string())?.st_uid();
        let wake = Arc::new(Event::new().map_err(|error| format!("no eventfd: {error}"))?);
        let io = HostIo::new(&setup, file.clone(), wake.clone())
            .map_err(|error| format!("could not set up I/O: {error}"))?;
        let core = Core { engine: None, buffers: HashMap::new(), stats: Stats::default() };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            log: LogKeeper::new(file.path(), owner),
            file,
            setup,
            boot_id: boot_id(),
        });
        let mut port = ExdPort { io, shared: shared.clone(), ends: Vec::new() };
        let read_only = options.read_only;
        let begun = Instant::now();
        let engine = port.open(options)?;
        let info = engine.info();
        log::debug!("opened in {:?}: {info:?}", begun.elapsed());
        let block = u32::try_from(info.block_size).unwrap_or(4096);
        let properties = Properties {
            capacity: info.virtual_size,
            logical_block: 512,
            physical_block: block,
            discard_granularity: block,
            read_only,
            serial: info.uuid.iter().take(10).map(|byte| format!("{byte:02x}")).collect(),
        };
        shared.core().engine = Some(engine);
        let stopping = Arc::new(AtomicBool::new(false));
        let (stop, event) = (stopping.clone(), wake.clone());
        let background = thread::Builder::new()
            .name("background".to_owned())
            .spawn(move || run_background(port, &stop, &event, &router))
            .map_err(|error| format!("could not start the background thread: {error}"))?;
        let background = Mutex::new(Some(background));
        let gate = Gate::new(true, properties.capacity).map_err(|error| error.to_string())?;
        Ok(ExdDisk { shared, properties, background, wake, gate: Arc::new(gate), stopping })
    }
}

/// Gives the engine its time until it is told to stop.
fn run_background(
    mut port: ExdPort,
    stopping: &AtomicBool,
    event: &Event,
    router: &Router,
) -> ExdPort {
    let begun = Instant::now();
    let mut next = begun;
    let mut finished = Vec::new();
    while !stopping.load(Ordering::Acquire) {
        let now = Instant::now();
        if now >= next {
            port.tick((now - begun).as_millis() as u64, &mut finished);
            next = now + TICK;
        }
        while port.reap(&mut finished) {}
        router.deliver(&mut finished);
        let pause = next.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(pause + Duration::from_millis(1));
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        // Interrupted or not: the loop looks at everything anyway.
        let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::ZERO));
        event.clear();
    }
    port
}

impl Disk for ExdDisk {
    fn properties(&self) -> Properties {
        self.properties.clone()
    }

    fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    fn hold(&self) -> Hold {
        Hold::Held
    }

    fn resize(&self, _size: u64) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn checkpoint(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn freeze(&self, _limit: Duration) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn thaw(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn suspend(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn resume(&self) -> Result<(), String> {
        Ok(())
    }

    fn port(&self, event: Arc<Event>) -> io::Result<Box<dyn Port>> {
        let io = HostIo::new(&self.shared.setup, self.shared.file.clone(), event)?;
        Ok(Box::new(ExdPort { io, shared: self.shared.clone(), ends: Vec::new() }))
    }

    fn statistics(&self) -> serde_json::Value {
        let core = self.shared.core();
        let stats = core.engine.as_ref().map_or(core.stats, Engine::stats);
        json!({
            "format": "exd",
            "open": core.engine.is_some(),
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
        })
    }

    fn close(&self) -> Result<(), String> {
        self.stopping.store(true, Ordering::Release);
        self.wake.signal();
        let background = self.background.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut port = background
            .ok_or("the image is closed already")?
            .join()
            .map_err(|_| "the background thread has failed")?;
        port.close()
    }
}

struct ExdPort {
    io: HostIo,
    shared: Arc<Shared>,
    ends: Vec<Completion>,
}

impl ExdPort {
    fn open(&mut self, options: OpenOptions) -> Result<Engine, String> {
        let mut core = self.shared.core();
        let mut host = Host { io: &mut self.io, buffers: &mut core.buffers, shared: &self.shared };
        Engine::open(&mut host, options).map_err(|error| error.to_string())
    }

    /// Calls the engine under the lock, if it is open, and takes what has finished.
    fn with_engine(
        &mut self,
        finished: &mut Vec<Finished>,
        call: impl FnOnce(&mut Engine, &mut Host<'_>),
    ) {
        let mut core = self.shared.core();
        let Core { engine: Some(engine), buffers, .. } = &mut *core else { return };
        let mut host = Host { io: &mut self.io, buffers, shared: &self.shared };
        call(engine, &mut host);
        while let Some((id, result)) = engine.pop_finished() {
            buffers.remove(&id);
            if result == Err(RequestError::Corrupt)
                && let Some(damage) = engine.last_corruption()
            {
                log::error!(target: "guest", "the image is damaged: {damage}");
            }
            finished.push((id, result));
        }
        drop(core);
        self.io.enter();
    }

    fn tick(&mut self, now_ms: u64, finished: &mut Vec<Finished>) {
        self.with_engine(finished, |engine, host| engine.tick(host, now_ms));
    }

    fn close(&mut self) -> Result<(), String> {
        let mut core = self.shared.core();
        let core = &mut *core;
        let mut engine = core.engine.take().ok_or("the image is closed already")?;
        let mut host = Host { io: &mut self.io, buffers: &mut core.buffers, shared: &self.shared };
        let closed = engine.close(&mut host);
        core.stats = engine.stats();
        closed.map_err(|error| format!("could not close the image cleanly: {error}"))
    }
}

impl Port for ExdPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        self.with_engine(finished, |engine, host| {
            for Submission { id, request, buffer } in batch.drain(..) {
                if let Some(buffer) = buffer {
                    host.buffers.insert(id, buffer);
                }
                engine.submit(host, id, request);
            }
            engine.kick(host);
        });
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let mut ends = std::mem::take(&mut self.ends);
        self.io.reap(&mut ends);
        let progress = !ends.is_empty();
        if progress {
            self.with_engine(finished, |engine, host| {
                for (token, result) in ends.drain(..) {
                    engine.complete(host, token, result);
                }
            });
        } else {
            self.io.enter();
        }
        self.ends = ends;
        progress
    }

    fn unfinished(&self) -> usize {
        self.io.unfinished()
    }
}

/// The engine's storage, for one call.
struct Host<'a> {
    io: &'a mut HostIo,
    buffers: &'a mut HashMap<RequestId, Arc<GuestBuffer>>,
    shared: &'a Shared,
}

impl Host<'_> {
    fn buffer(&self, request: RequestId) -> Arc<GuestBuffer> {
        self.buffers.get(&request).expect("a request in flight has a buffer").clone()
    }

    fn part(&self, segment: Segment) -> Part {
        match segment {
            Segment::Zero(len) => Part::Zero(len),
            Segment::Request { request, offset, len } => {
                Part::Guest { buffer: self.buffer(request), offset, len }
            }
            Segment::Bytes(bytes) => Part::Bytes(bytes),
        }
    }

    /// Turns an operation into I/O. What is rare and quick and no I/O is done at
    /// once.
    fn work(&self, op: Op) -> Work {
        let file = &self.shared.file;
        let ended = |result: io::Result<Done>| Work::Ended(result.map_err(|e| storage_error(&e)));
        match op {
            Op::ReadBytes { offset, len } => Work::ReadBytes { offset, len },
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                Work::ReadGuest { offset, buffer: self.buffer(request), buffer_offset, len }
            }
            Op::Write { offset, segments } => {
                let parts = segments.into_iter().map(|segment| self.part(segment)).collect();
                Work::Write { offset, parts, durable: false }
            }
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
