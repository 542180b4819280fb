//! A storage in memory: sparse, cheap to copy, and of bounded size.

use exd_image::blocking::BufferRegistry;
use exd_image::{Completion, Done, Geometry, Op, RequestId, Segment, Storage, StorageError, Token};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

const PAGE: u64 = 4096;
/// No more pages than this: 32 MiB.
const PAGES_MAX: usize = 8192;
/// Identity of the file and of the boot.
pub const IDENTITY: [u8; 16] = [7; 16];

/// An image file and its completion log.
#[derive(Clone, Default)]
pub struct Memory {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    len: u64,
    log: Option<Vec<u8>>,
    ended: VecDeque<(Token, Result<Done, StorageError>)>,
    buffers: HashMap<RequestId, Vec<u8>>,
    written: bool,
    full: bool,
}

impl Memory {
    /// A file of this length with one piece of content after another.
    pub fn new(len: u64, pieces: &[(u64, &[u8])], log: Option<Vec<u8>>) -> Self {
        let mut memory = Memory { len, log, ..Memory::default() };
        for (offset, bytes) in pieces {
            memory.put_bytes(*offset, bytes);
        }
        memory
    }

    /// Whether anything was changed through the storage trait.
    pub fn written(&self) -> bool {
        self.written
    }

    /// Whether an operation found no room.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The completion log.
    pub fn log_mut(&mut self) -> Option<&mut Vec<u8>> {
        self.log.as_mut()
    }

    /// Bytes of the file; what is past its end is zero.
    pub fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let Some(end) = offset.checked_add(len) else { return bytes };
        for (&page, content) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = (page * PAGE).max(offset);
            let stop = ((page + 1) * PAGE).min(end);
            let from = (start - page * PAGE) as usize;
            let count = (stop - start) as usize;
            let to = (start - offset) as usize;
            bytes[to..to + count].copy_from_slice(&content[from..from + count]);
        }
        bytes
    }

    /// Stores bytes; false if there is no room.
    pub fn put_bytes(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % PAGE) as usize;
            let count = (PAGE as usize - from).min(bytes.len() - done);
            let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[from..from + count].copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
        self.pages.len() <= PAGES_MAX
    }

    fn zero(&mut self, range: Range<u64>) {
        let pages: Vec<u64> = self
            .pages
            .range(range.start / PAGE..range.end.div_ceil(PAGE))
            .map(|(p, _)| *p)
            .collect();
        for page in pages {
            let start = (page * PAGE).max(range.start);
            let stop = ((page + 1) * PAGE).min(range.end);
            if stop - start == PAGE {
                self.pages.remove(&page);
            } else if let Some(content) = self.pages.get_mut(&page) {
                let from = (start - page * PAGE) as usize;
                Arc::make_mut(content)[from..from + (stop - start) as usize].fill(0);
            }
        }
    }

    fn write(&mut self, offset: u64, segments: &[Segment]) -> Result<Done, StorageError> {
        let mut at = offset;
        for segment in segments {
            let room = match segment {
                Segment::Zero(len) | Segment::Spare(len) => {
                    self.zero(at..at + len);
                    self.len = self.len.max(at + len);
                    true
                }
                Segment::Request { request, offset, len } => {
                    let buffer = self.buffers.get(request).expect("a request has a buffer");
                    let piece = buffer[*offset as usize..(offset + len) as usize].to_vec();
                    self.put_bytes(at, &piece)
                }
                Segment::Bytes(bytes) => self.put_bytes(at, bytes),
            };
            if !room {
                self.full = true;
                return Err(StorageError::NoSpace);
            }
            at += segment.len();
        }
        Ok(Done::Ok)
    }

    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let (&first, _) = self.pages.range(offset / PAGE..).next()?;
        let mut end = first;
        while self.pages.contains_key(&end) {
            end += 1;
        }
        let range = (first * PAGE).max(offset)..(end * PAGE).min(self.len);
        (!range.is_empty()).then_some(range)
    }

    fn run(&mut self, op: Op) -> Result<Done, StorageError> {
        let reads =
            matches!(op, Op::ReadBytes { .. } | Op::ReadRequest { .. } | Op::NextData { .. });
        self.written |= !reads && op != Op::Sync;
        match op {
            Op::ReadBytes { offset, len } => Ok(Done::Bytes(self.bytes(offset, len))),
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                let bytes = self.bytes(offset, len);
                let buffer = self.buffers.get_mut(&request).expect("a request has a buffer");
                buffer[buffer_offset as usize..(buffer_offset + len) as usize]
                    .copy_from_slice(&bytes);
                Ok(Done::Ok)
            }
            Op::Write { offset, segments } => self.write(offset, &segments),
            Op::Punch { offset, len } => {
                self.zero(offset..offset + len);
                Ok(Done::Ok)
            }
            Op::Allocate { offset, len } => {
                self.len = self.len.max(offset + len);
                Ok(Done::Ok)
            }
            Op::SetLen { len } => {
                self.zero(len..u64::MAX - PAGE);
                self.len = len;
                Ok(Done::Ok)
            }
            Op::Sync => Ok(Done::Ok),
            Op::NextData { offset } => Ok(Done::Data(self.next_data(offset))),
        }
    }
}

impl Storage for Memory {
    fn submit(&mut self, token: Token, op: Op) {
        let result = self.run(op);
        self.ended.push_back((token, result));
    }

    fn wait(&mut self) -> Completion {
        self.ended.pop_front().expect("an operation is under way")
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        let buffer = self.buffers.get_mut(&request).expect("a request has a buffer");
        buffer[offset as usize..(offset + len) as usize].fill(0);
    }

    fn geometry(&self) -> Geometry {
        Geometry { alignment: 512, host_block: PAGE, fixed_length: false }
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        Ok(self.len)
    }

    fn identity(&self) -> [u8; 16] {
        IDENTITY
    }

    fn boot_id(&self) -> [u8; 16] {
        IDENTITY
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
        let mut log = vec![0; len];
        log[..bytes.len()].copy_from_slice(bytes);
        self.log = Some(log);
        Ok("memory".to_owned())
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
        self.buffers.remove(&id).expect("a request has a buffer")
    }
}
