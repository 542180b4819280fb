//! A storage in memory whose operations can be made to fail, to wait and to end in any order, and a
//! driver of [`Disk`] on it.
//!
//! Operations take effect when they end, not when they are submitted: what is in the queue when the
//! process dies has not happened.
#![allow(dead_code, reason = "each test program uses its part")]

use exd_image::blocking::BufferRegistry;
use exd_image::check::{Report, check};
use exd_image::{
    Completion, CreateOptions, Disk, Done, Geometry, Op, OpenOptions, Request, RequestError,
    RequestId, Segment, Storage, StorageError, Token, create,
};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// `EIO`.
pub const EIO: StorageError = StorageError::Io(5);
/// `EFBIG`, for what goes past [`FILE_MAX`].
const EFBIG: StorageError = StorageError::Io(27);
/// No file is longer.
const FILE_MAX: u64 = 1 << 32;
/// The host's page, and its unit of allocation.
const PAGE: u64 = 4096;
/// No test needs so many operations: an engine that submits more goes round in circles.
const OPERATIONS_MAX: u64 = 2_000_000;
/// Where the superblock slots end.
pub const SUPERBLOCKS_END: u64 = 8192;
/// Bytes of the smallest ring, which lies behind the fixed area.
pub const SMALL_RING: u64 = 65536;

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It takes its course.
    Proceed,
    /// It ends with an error and without effect.
    Fail(StorageError),
    /// It waits for [`Memory::release`].
    Hold,
}

/// Decides about each operation when it is submitted.
pub type Hook = Box<dyn FnMut(&Op) -> Fate>;

/// A small random generator (xorshift): the same numbers everywhere, from a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Operations that have not ended.
pub type Queue = VecDeque<(Token, Op, Option<StorageError>)>;

/// A file, its completion log and the buffers of requests, in memory.
#[derive(Default)]
pub struct Memory {
    pub file: Vec<u8>,
    pub log: Option<Vec<u8>>,
    pub buffers: HashMap<RequestId, Vec<u8>>,
    /// Granularity of reads and writes; 512 if less.
    pub alignment: u64,
    /// The host's allocation unit; 4096 if less.
    pub host_block: u64,
    /// A block device: as long as `file` is now.
    pub fixed_length: bool,
    /// The host has so many pages left for this file.
    pub pages_left: Option<u64>,
    pub hook: Option<Hook>,
    /// Operations end in random order.
    pub shuffle: Option<Random>,
    /// Syncs that ended well.
    pub syncs: u64,
    /// Under way.
    pub queue: Queue,
    /// Under way, waiting for [`Memory::release`].
    pub held: Queue,
    /// Pages the host has given, if it counts them.
    pub pages: BTreeSet<u64>,
    /// What may be left out of writes is not.
    pub keep_spare: bool,
    /// Operations submitted.
    pub operations: u64,
}

impl Memory {
    /// What the file would hold if the process died now and nothing under way took effect.
    pub fn killed(&self) -> Memory {
        Memory {
            file: self.file.clone(),
            log: self.log.clone(),
            alignment: self.alignment,
            host_block: self.host_block,
            fixed_length: self.fixed_length,
            ..Default::default()
        }
    }

    /// The process dies: each operation under way takes effect or not, as `lands` says.
    pub fn kill(&mut self, mut lands: impl FnMut() -> bool) {
        let under_way = std::mem::take(&mut self.queue).into_iter().chain(self.held.drain(..));
        for (_, op, error) in under_way.collect::<Vec<_>>() {
            if error.is_none() && lands() {
                let _ = self.carry_out(op);
            }
        }
        self.buffers.clear();
    }

    /// From now on the hook decides about operations.
    pub fn set_hook(&mut self, hook: impl FnMut(&Op) -> Fate + 'static) {
        self.hook = Some(Box::new(hook));
    }

    /// No more faults, and held operations go on.
    pub fn release(&mut self) {
        self.hook = None;
        self.queue.append(&mut self.held);
    }

    /// Held operations are going to fail.
    pub fn fail_held(&mut self, error: StorageError) {
        self.held.iter_mut().for_each(|held| held.2 = Some(error));
    }

    /// Held operations of one kind go on; the hook stays.
    pub fn release_only(&mut self, kind: impl Fn(&Op) -> bool) {
        let (go, stay) = self.held.drain(..).partition(|(_, op, _)| kind(op));
        self.held = stay;
        self.queue.extend::<Queue>(go);
    }

    /// One operation ends, if any can.
    pub fn step(&mut self) -> Option<Completion> {
        let index = match &mut self.shuffle {
            Some(random) if !self.queue.is_empty() => random.below(self.queue.len() as u64),
            _ => 0,
        };
        let (token, op, error) = self.queue.remove(index as usize)?;
        Some((token, error.map_or_else(|| self.carry_out(op), Err)))
    }

    fn bytes(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let file = self.file.get(offset as usize..).unwrap_or_default();
        let present = file.len().min(bytes.len());
        bytes[..present].copy_from_slice(&file[..present]);
        bytes
    }

    /// Takes the host's pages for a range, all or none.
    fn allocate(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        let Some(left) = self.pages_left else { return Ok(()) };
        let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
        let new: Vec<u64> = pages.filter(|page| !self.pages.contains(page)).collect();
        let left = left.checked_sub(new.len() as u64).ok_or(StorageError::NoSpace)?;
        self.pages_left = Some(left);
        self.pages.extend(new);
        Ok(())
    }

    fn punch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.file.len() as u64);
        if offset < end {
            self.file[offset as usize..end as usize].fill(0);
        }
        if let Some(left) = &mut self.pages_left {
            let pages = offset.div_ceil(PAGE)..(offset + len) / PAGE;
            *left += pages.filter(|page| self.pages.remove(page)).count() as u64;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        let align = self.geometry().alignment;
        let end = offset + data.len() as u64;
        assert!(offset.is_multiple_of(align) && end.is_multiple_of(align), "an unaligned write");
        self.allocate(offset, data.len() as u64)?;
        if (self.file.len() as u64) < end {
            assert!(!self.fixed_length, "a write past the end of the device");
            self.file.resize(end as usize, 0);
        }
        self.file[offset as usize..end as usize].copy_from_slice(data);
        Ok(())
    }

    fn gather(&self, segments: &[Segment]) -> Vec<u8> {
        let mut data = Vec::new();
        for segment in segments {
            match segment {
                Segment::Zero(len) | Segment::Spare(len) => {
                    data.resize(data.len() + *len as usize, 0)
                }
                Segment::Bytes(bytes) => data.extend_from_slice(bytes),
                Segment::Request { request, offset, len } => data.extend_from_slice(
                    &self.buffers[request][*offset as usize..(offset + len) as usize],
                ),
            }
        }
        data
    }

    fn next_data(&self, offset: u64) -> Option<std::ops::Range<u64>> {
        let used = |page: &u64| {
            let end = ((page + 1) * PAGE).min(self.file.len() as u64);
            self.file[(page * PAGE) as usize..end as usize].iter().any(|byte| *byte != 0)
        };
        let page = (offset / PAGE..(self.file.len() as u64).div_ceil(PAGE)).find(used)?;
        Some(page * PAGE..(page + 1) * PAGE)
    }

    fn carry_out(&mut self, op: Op) -> Result<Done, StorageError> {
        match op {
            Op::ReadBytes { offset, len } => {
                let len = if len > FILE_MAX { return Err(EFBIG) } else { len };
                return Ok(Done::Bytes(self.bytes(offset, len)));
            }
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                let bytes = self.bytes(offset, len);
                let buffer = self.buffers.get_mut(&request).expect("the request is under way");
                buffer[buffer_offset as usize..(buffer_offset + len) as usize]
                    .copy_from_slice(&bytes);
            }
            Op::Write { mut offset, mut segments } => {
                if !self.keep_spare {
                    Segment::trim(&mut offset, &mut segments);
                }
                let data = self.gather(&segments);
                if offset.saturating_add(data.len() as u64) > FILE_MAX {
                    return Err(EFBIG);
                }
                self.write(offset, &data)?;
            }
            Op::Punch { offset, len } => self.punch(offset, len),
            Op::Allocate { offset, len } => self.allocate(offset, len)?,
            Op::SetLen { .. } if self.fixed_length => return Err(StorageError::Unsupported),
            Op::SetLen { len } if len > FILE_MAX => return Err(EFBIG),
            Op::SetLen { len } => self.file.resize(len as usize, 0),
            Op::Sync => self.syncs += 1,
            Op::NextData { offset } => return Ok(Done::Data(self.next_data(offset))),
        }
        Ok(Done::Ok)
    }
}

impl Storage for Memory {
    fn submit(&mut self, token: Token, op: Op) {
        self.operations += 1;
        assert!(self.operations < OPERATIONS_MAX, "the engine goes round in circles: {op:?}");
        match self.hook.as_mut().map_or(Fate::Proceed, |hook| hook(&op)) {
            Fate::Proceed => self.queue.push_back((token, op, None)),
            Fate::Fail(error) => self.queue.push_back((token, op, Some(error))),
            Fate::Hold => self.held.push_back((token, op, None)),
        }
    }

    fn wait(&mut self) -> Completion {
        self.step().expect("something is under way")
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        let buffer = self.buffers.get_mut(&request).expect("the request is under way");
        buffer[offset as usize..(offset + len) as usize].fill(0);
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            alignment: self.alignment.max(512),
            host_block: self.host_block.max(PAGE),
            fixed_length: self.fixed_length,
        }
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        Ok(self.file.len() as u64)
    }

    fn identity(&self) -> [u8; 16] {
        [1; 16]
    }

    fn boot_id(&self) -> [u8; 16] {
        [2; 16]
    }

    fn read_log(&mut self, _: [u8; 16], _: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.log.clone())
    }

    fn create_log(
        &mut self,
        _: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError> {
        let mut log = bytes.to_vec();
        log.resize(len, 0);
        self.log = Some(log);
        Ok("/log".into())
    }

    fn store_log(&mut self, offset: usize, bytes: &[u8]) {
        let log = self.log.as_mut().expect("the log was created");
        log[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn remove_log(&mut self) {
        self.log = None;
    }
}

impl BufferRegistry for Memory {
    fn put(&mut self, id: RequestId, data: Vec<u8>) {
        self.buffers.insert(id, data);
    }

    fn take(&mut self, id: RequestId) -> Vec<u8> {
        self.buffers.remove(&id).expect("the request has a buffer")
    }
}

/// Bytes of the buffer that a request needs.
pub fn buffer_len(request: &Request) -> usize {
    match *request {
        Request::Read { len, .. } | Request::Write { len, .. } => len as usize,
        _ => 0,
    }
}

/// Options of a small image with the smallest ring.
pub fn small_image(virtual_size: u64) -> CreateOptions {
    CreateOptions { virtual_size, uuid: [5; 16], journal_bytes: SMALL_RING, ..Default::default() }
}

/// Options with an allocation window of so many KiB.
pub fn window(kib: u64) -> OpenOptions {
    OpenOptions { window_bytes: kib << 10, ..Default::default() }
}

/// How requests end.
pub type Outcome = Result<(), RequestError>;

/// An open image on a [`Memory`], and what became of the requests.
pub struct Rig {
    pub storage: Memory,
    pub disk: Disk,
    /// Requests that ended only after a tick.
    pub waited_for_tick: u64,
    ended: HashMap<RequestId, Outcome>,
    next_id: u64,
    now_ms: u64,
}

impl Rig {
    /// Makes an image in memory and opens it.
    pub fn new(image: &CreateOptions, options: OpenOptions) -> Rig {
        Rig::on(Memory::default(), image, options)
    }

    /// Makes an image on `storage` and opens it.
    pub fn on(mut storage: Memory, image: &CreateOptions, options: OpenOptions) -> Rig {
        create(&mut storage, image).expect("the image can be made");
        Rig::open(storage, options).expect("a new image opens")
    }

    pub fn open(mut storage: Memory, options: OpenOptions) -> Result<Rig, exd_image::Error> {
        let disk = Disk::open(&mut storage, options)?;
        let ended = HashMap::new();
        Ok(Rig { storage, disk, waited_for_tick: 0, ended, next_id: 1, now_ms: 0 })
    }

    /// Submits a request; [`Rig::run`] and [`Rig::tick`] carry it out.
    pub fn submit(&mut self, request: Request) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.storage.put(id, vec![0xab; buffer_len(&request)]);
        self.disk.submit(&mut self.storage, id, request);
        id
    }

    /// Goes on until no operation can end; `after_each` sees the storage after each.
    pub fn run_with(&mut self, mut after_each: impl FnMut(&Memory)) {
        self.disk.kick(&mut self.storage);
        loop {
            while let Some((id, outcome)) = self.disk.pop_finished() {
                self.storage.take(id);
                assert!(self.ended.insert(id, outcome).is_none(), "{id:?} ended twice");
            }
            let Some((token, result)) = self.storage.step() else { return };
            self.disk.complete(&mut self.storage, token, result);
            after_each(&self.storage);
        }
    }

    /// Goes on until no operation can end.
    pub fn run(&mut self) {
        self.run_with(|_| ());
    }

    /// A second passes.
    pub fn tick(&mut self) {
        self.now_ms += 1000;
        self.disk.tick(&mut self.storage, self.now_ms);
        self.run();
    }

    /// How a request ended, if it has.
    pub fn outcome(&self, id: RequestId) -> Option<Outcome> {
        self.ended.get(&id).copied()
    }

    /// Goes on until the request has ended. Panics if it never does.
    pub fn finish(&mut self, id: RequestId) -> Outcome {
        self.run();
        for attempt in 0..50 {
            if let Some(outcome) = self.outcome(id) {
                return outcome;
            }
            self.waited_for_tick += u64::from(attempt == 0);
            self.tick();
        }
        panic!("{id:?} hangs, {} operations under way", self.disk.ops_in_flight());
    }

    /// Submits a request and goes on until it has ended.
    pub fn request(&mut self, request: Request) -> Outcome {
        let id = self.submit(request);
        self.finish(id)
    }

    pub fn write(&mut self, offset: u64, len: u64) -> Outcome {
        self.request(Request::Write { offset, len, durable: false })
    }

    pub fn discard(&mut self, offset: u64, len: u64) -> Outcome {
        self.request(Request::Discard { offset, len })
    }

    pub fn flush(&mut self) -> Outcome {
        self.request(Request::Flush)
    }

    pub fn checkpoint(&mut self) -> Outcome {
        self.request(Request::Checkpoint)
    }

    /// Writes `count` single blocks with a hole behind each: as many extents.
    pub fn scatter(&mut self, count: u64) {
        for i in 0..count {
            assert_eq!(self.write(i * 8192, 4096), Ok(()), "write {i}");
        }
    }

    /// Closes the image, which must end well, and checks it.
    pub fn close(mut self) -> Memory {
        self.disk.close(&mut self.storage).expect("the image can be closed");
        let report = check(&mut self.storage).expect("the image can be examined");
        assert!(report.is_clean() && !report.unclean, "{report:?}");
        self.storage
    }

    /// The process dies, and the image must be sound.
    pub fn kill(mut self) -> Memory {
        self.storage.kill(|| false);
        let report = check(&mut self.storage).expect("the image can be examined");
        assert_eq!(report.corruption_count, 0, "{:?}", report.corruptions);
        self.storage
    }
}

/// What `check` says of the image if the process died now.
pub fn check_killed(storage: &Memory) -> Report {
    check(&mut storage.killed()).expect("the image can be examined")
}
