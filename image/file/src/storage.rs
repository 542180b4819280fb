//! The engine's storage on a host file, by blocking calls.

use crate::aligned::AlignedBuf;
use crate::completion_log::{LogError, LogKeeper};
use crate::error::{FileError, storage_error};
use crate::file::{HostFile, boot_id};
use crate::lock::read_holder;
use exd_image::blocking::BufferRegistry;
use exd_image::{Completion, Done, Geometry, Op, RequestId, Segment, Storage, StorageError, Token};
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::linux::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

/// Largest piece that goes through the aligned bounce buffer at once, in bytes.
const BOUNCE_BYTES: usize = 1 << 20;

static ZEROES: [u8; 65536] = [0; 65536];

/// Explanations for the user that the engine's errors have no room for, such as which file could not
/// be read and what to do. Stays readable while the engine has the storage.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn push(&self, note: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    /// Takes what has been noted so far.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An image file driven by blocking calls: an operation is carried out where it is submitted, and its
/// end is kept until [`Storage::wait`] asks for it. Whoever opens the file locks it first (P9).
#[derive(Debug)]
pub struct FileStorage {
    file: HostFile,
    log: LogKeeper,
    boot_id: [u8; 16],
    ended: VecDeque<Completion>,
    buffers: HashMap<RequestId, Vec<u8>>,
    bounce: Option<AlignedBuf>,
    notes: Notes,
}

impl FileStorage {
    /// On an open file.
    pub fn new(file: HostFile) -> Result<Self, FileError> {
        let owner = file.metadata()?.st_uid();
        Ok(FileStorage {
            log: LogKeeper::new(file.path(), owner),
            file,
            boot_id: boot_id(),
            ended: VecDeque::new(),
            buffers: HashMap::new(),
            bounce: None,
            notes: Notes::default(),
        })
    }

    /// The file.
    pub fn file(&self) -> &HostFile {
        &self.file
    }

    /// Where explanations of errors appear.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// Gives a request its buffer: the data to write, or the place for the data read.
    pub fn put_buffer(&mut self, id: RequestId, data: Vec<u8>) {
        let earlier = self.buffers.insert(id, data);
        assert!(earlier.is_none(), "a request in flight keeps its buffer");
    }

    /// Takes the buffer of a finished request back.
    pub fn take_buffer(&mut self, id: RequestId) -> Vec<u8> {
        self.buffers.remove(&id).expect("every request has a buffer")
    }

    fn run(&mut self, op: Op) -> Result<Done, StorageError> {
        let io = |result: io::Result<()>| match result {
            Ok(()) => Ok(Done::Ok),
            Err(error) => Err(storage_error(&error)),
        };
        match op {
            Op::ReadBytes { offset, len } => {
                let len = usize::try_from(len).map_err(|_| StorageError::Io(libc::ENOMEM))?;
                let mut bytes = vec![0; len];
                self.read(offset, &mut bytes).map_err(|e| storage_error(&e))?;
                Ok(Done::Bytes(bytes))
            }
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                // Out of the map while it is filled: the bounce buffer needs the rest of `self`.
                let mut buffer = self.take_buffer(request);
                let result = self.read(offset, piece_mut(&mut buffer, buffer_offset, len));
                self.buffers.insert(request, buffer);
                io(result)
            }
            Op::Write { mut offset, mut segments } => {
                Segment::trim(&mut offset, &mut segments);
                io(self.write(offset, &segments))
            }
            Op::Punch { offset, len } => io(self.file.punch(offset, len)),
            Op::Allocate { offset, len } => io(self.file.allocate(offset, len)),
            Op::SetLen { len } => io(self.file.set_len(len)),
            Op::Sync => io(self.file.sync()),
            Op::NextData { offset } => match self.file.next_data(offset) {
                Ok(range) => Ok(Done::Data(range)),
                Err(error) => Err(storage_error(&error)),
            },
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.file.is_direct() {
            return self.file.read_at(offset, buffer);
        }
        let alignment = self.file.geometry().alignment;
        let mut done = 0;
        while done < buffer.len() {
            let start = offset + done as u64;
            let lead = (start % alignment) as usize;
            let count = (buffer.len() - done).min(BOUNCE_BYTES - lead);
            let span = (lead + count).next_multiple_of(alignment as usize);
            let bounce = bounce(&mut self.bounce, &self.file);
            self.file.read_at(start - lead as u64, &mut bounce[..span])?;
            buffer[done..done + count].copy_from_slice(&bounce[lead..lead + count]);
            done += count;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, segments: &[Segment]) -> io::Result<()> {
        if !self.file.is_direct() {
            return self.file.write_vectored_at(offset, &mut self.pieces(segments));
        }
        // Out of `self` while the segments are borrowed from it.
        let mut memory = self.bounce.take();
        let result = self.write_direct(offset, segments, bounce(&mut memory, &self.file));
        self.bounce = memory;
        result
    }

    fn write_direct(&self, offset: u64, segments: &[Segment], bounce: &mut [u8]) -> io::Result<()> {
        let mut pieces = self.pieces(segments);
        let mut rest = pieces.as_mut_slice();
        let mut position = offset;
        while !rest.is_empty() {
            let filled = gather(rest, bounce);
            IoSlice::advance_slices(&mut rest, filled);
            self.file.write_at(position, &bounce[..filled])?;
            position += filled as u64;
        }
        Ok(())
    }

    /// The memory of a write's segments, in order.
    fn pieces<'a>(&'a self, segments: &'a [Segment]) -> Vec<IoSlice<'a>> {
        let mut pieces = Vec::with_capacity(segments.len());
        for segment in segments {
            match segment {
                Segment::Zero(len) | Segment::Spare(len) => {
                    let mut left = *len;
                    while left > 0 {
                        let count = left.min(ZEROES.len() as u64);
                        pieces.push(IoSlice::new(&ZEROES[..count as usize]));
                        left -= count;
                    }
                }
                Segment::Request { request, offset, len } => {
                    let buffer = self.buffers.get(request).expect("every request has a buffer");
                    let (start, end) = (*offset as usize, (*offset + *len) as usize);
                    pieces.push(IoSlice::new(&buffer[start..end]));
                }
                Segment::Bytes(bytes) => pieces.push(IoSlice::new(bytes)),
            }
        }
        pieces
    }

    fn note(&self, error: LogError) -> StorageError {
        let class = match error.source.kind() {
            io::ErrorKind::PermissionDenied => StorageError::Io(libc::EACCES),
            _ => storage_error(&error.source),
        };
        self.notes.push(error.text);
        class
    }

    /// The last holder wrote its record in an earlier boot of the host, or on another one.
    fn held_in_another_boot(&self) -> bool {
        read_holder(&self.file).is_some_and(|holder| holder.boot_id != self.boot_id)
    }
}

/// The bounce buffer, made when first needed.
fn bounce<'a>(memory: &'a mut Option<AlignedBuf>, file: &HostFile) -> &'a mut AlignedBuf {
    memory.get_or_insert_with(|| {
        let alignment = file.memory_alignment().max(file.geometry().alignment);
        AlignedBuf::new(BOUNCE_BYTES + alignment as usize, alignment as usize)
    })
}

/// Copies the start of `pieces` into `bounce`, at most [`BOUNCE_BYTES`], and returns how much.
fn gather(pieces: &[IoSlice<'_>], bounce: &mut [u8]) -> usize {
    let mut filled = 0;
    for piece in pieces {
        let count = piece.len().min(BOUNCE_BYTES - filled);
        bounce[filled..filled + count].copy_from_slice(&piece[..count]);
        filled += count;
        if filled == BOUNCE_BYTES {
            break;
        }
    }
    filled
}

/// A part of a request's buffer. The engine asks only for what the request covers.
fn piece_mut(buffer: &mut [u8], offset: u64, len: u64) -> &mut [u8] {
    &mut buffer[offset as usize..(offset + len) as usize]
}

impl Storage for FileStorage {
    fn submit(&mut self, token: Token, op: Op) {
        let result = self.run(op);
        self.ended.push_back((token, result));
    }

    fn wait(&mut self) -> Completion {
        self.ended.pop_front().expect("an operation is under way")
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        let buffer = self.buffers.get_mut(&request).expect("every request has a buffer");
        piece_mut(buffer, offset, len).fill(0);
    }

    fn geometry(&self) -> Geometry {
        self.file.geometry()
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        self.file.len().map_err(|e| storage_error(&e))
    }

    fn identity(&self) -> [u8; 16] {
        self.file.identity()
    }

    fn boot_id(&self) -> [u8; 16] {
        self.boot_id
    }

    fn read_log(&mut self, uuid: [u8; 16], path: &str) -> Result<Option<Vec<u8>>, StorageError> {
        match self.log.read(uuid, path) {
            Ok(found) => Ok(found),
            // Out of reach, but of another boot, so that it would not count.
            Err(_) if self.held_in_another_boot() => Ok(None),
            Err(error) => Err(self.note(error)),
        }
    }

    fn create_log(
        &mut self,
        uuid: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError> {
        self.log.create(uuid, bytes, len).map_err(|error| self.note(error))
    }

    fn store_log(&mut self, offset: usize, bytes: &[u8]) {
        self.log.store(offset, bytes);
    }

    fn remove_log(&mut self) {
        self.log.remove();
    }
}

impl BufferRegistry for FileStorage {
    fn put(&mut self, id: RequestId, data: Vec<u8>) {
        self.put_buffer(id, data);
    }

    fn take(&mut self, id: RequestId) -> Vec<u8> {
        self.take_buffer(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(direct: bool) -> (tempfile::TempDir, FileStorage) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = HostFile::open_or_create(&dir.path().join("f"), direct).expect("create");
        (dir, FileStorage::new(file).expect("storage"))
    }

    fn do_op(storage: &mut FileStorage, op: Op) -> Result<Done, StorageError> {
        storage.submit(Token(1), op);
        storage.wait().1
    }

    fn segments_land_in_order(direct: bool) {
        let (_dir, mut storage) = storage(direct);
        let request = RequestId(4);
        let data: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 512) as u8 | 1).collect();
        storage.put_buffer(request, data.clone());
        let segments = vec![
            Segment::Bytes(vec![9; 4096].into()),
            Segment::Zero(200_704),
            Segment::Request { request, offset: 512, len: (3 << 20) - 512 },
            Segment::Zero(512),
        ];
        let written: u64 = segments.iter().map(Segment::len).sum();
        assert_eq!(do_op(&mut storage, Op::Write { offset: 8192, segments }), Ok(Done::Ok));
        storage.take_buffer(request);
        let Ok(Done::Bytes(back)) =
            do_op(&mut storage, Op::ReadBytes { offset: 8192, len: written })
        else {
            panic!("readable")
        };
        assert!(back[..4096].iter().all(|b| *b == 9));
        assert!(back[4096..204_800].iter().all(|b| *b == 0));
        assert!(back[204_800..204_800 + data.len() - 512] == data[512..]);
        assert!(back[back.len() - 512..].iter().all(|b| *b == 0));

        // Unaligned to what the host wants, aligned to 512, and over the end of the file.
        storage.put_buffer(request, vec![1; 4 << 20]);
        let op = Op::ReadRequest {
            offset: 8192 + 4608,
            request,
            buffer_offset: 1024,
            len: (4 << 20) - 1024,
        };
        assert_eq!(do_op(&mut storage, op), Ok(Done::Ok));
        storage.zero_request(request, 1024, 512);
        let buffer = storage.take_buffer(request);
        assert!(buffer[..1024].iter().all(|b| *b == 1));
        assert!(buffer[1024..1536].iter().all(|b| *b == 0));
        let left = back.len() - 5120;
        assert!(buffer[1536..1536 + left] == back[5120..]);
        assert!(buffer[1536 + left..].iter().all(|b| *b == 0));
    }

    #[test]
    fn segments_land_in_order_buffered() {
        segments_land_in_order(false);
    }

    #[test]
    fn segments_land_in_order_direct() {
        segments_land_in_order(true);
    }

    #[test]
    fn errors_are_sorted() {
        let (_dir, mut storage) = storage(false);
        let too_far =
            Op::Write { offset: i64::MAX as u64 - 511, segments: vec![Segment::Zero(512)] };
        assert!(matches!(do_op(&mut storage, too_far), Err(StorageError::Io(_))));
        assert_eq!(do_op(&mut storage, Op::NextData { offset: 0 }), Ok(Done::Data(None)));
        assert_eq!(do_op(&mut storage, Op::SetLen { len: 4096 }), Ok(Done::Ok));
        assert_eq!(storage.file_len(), Ok(4096));
    }
}
