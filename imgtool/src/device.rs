//! Filling a block device with an EXD image so that it passes for one only when it is complete.

use crate::failure::{self, During};
use exd_file::storage::Notes;
use exd_file::{FileStorage, storage_error};
use exd_image::blocking::BufferRegistry;
use exd_image::{Completion, Done, Geometry, Op, RequestId, Segment, Storage, StorageError, Token};
use std::collections::VecDeque;

/// The fixed area of an EXD image: superblocks and holder record.
const WITHHELD_BYTES: u64 = 65536;

/// A storage that can keep the first 64 KiB of the image in memory, and zero on the device, until
/// [`WithheldStorage::release`]. Without anything withheld it is the storage below.
pub struct WithheldStorage {
    below: FileStorage,
    withheld: Option<Vec<u8>>,
    ended: VecDeque<Completion>,
}

impl WithheldStorage {
    /// Withholds nothing.
    pub fn new(below: FileStorage) -> Self {
        WithheldStorage { below, withheld: None, ended: VecDeque::new() }
    }

    /// Zeroes the start of the device, durably, and withholds what is written there from now on.
    pub fn withholding(below: FileStorage) -> failure::Result<Self> {
        let zeroes = vec![0; WITHHELD_BYTES as usize];
        below.file().write_at(0, &zeroes).during("could not mark the device unfinished")?;
        below.file().sync().during("could not mark the device unfinished")?;
        Ok(WithheldStorage { below, withheld: Some(zeroes), ended: VecDeque::new() })
    }

    /// Where explanations of errors appear.
    pub fn notes(&self) -> Notes {
        self.below.notes()
    }

    /// Writes what was withheld: the image is complete. The rest is durable already.
    pub fn release(mut self) -> failure::Result<()> {
        if let Some(start) = self.withheld.take() {
            let file = self.below.file();
            file.sync().during("could not sync")?;
            file.write_at(0, &start).during("could not write at offset 0")?;
            file.sync().during("could not sync")?;
        }
        Ok(())
    }

    /// Carries an operation out on the withheld start; `None` if it lies behind it.
    fn run_withheld(&mut self, op: &Op) -> Option<Result<Done, StorageError>> {
        let withheld = self.withheld.as_mut()?;
        let (offset, len) = match op {
            Op::ReadBytes { offset, len } | Op::Punch { offset, len } => (*offset, *len),
            Op::Write { offset, segments } => (*offset, segments.iter().map(Segment::len).sum()),
            _ => return None,
        };
        if offset >= WITHHELD_BYTES {
            return None;
        }
        // The fixed area is addressed by itself.
        let Some(window) = withheld.get_mut(offset as usize..offset.saturating_add(len) as usize)
        else {
            return Some(Err(StorageError::Io(libc::EINVAL)));
        };
        Some(match op {
            Op::ReadBytes { .. } => Ok(Done::Bytes(window.to_vec())),
            Op::Write { segments, .. } => fill(window, segments),
            _ => {
                window.fill(0);
                Ok(Done::Ok)
            }
        })
    }
}

fn fill(mut window: &mut [u8], segments: &[Segment]) -> Result<Done, StorageError> {
    for segment in segments {
        let (part, rest) = window.split_at_mut(segment.len() as usize);
        match segment {
            Segment::Zero(_) => part.fill(0),
            Segment::Bytes(bytes) => part.copy_from_slice(bytes),
            // Guest data never lies in the fixed area.
            Segment::Request { .. } => return Err(StorageError::Io(libc::EINVAL)),
        }
        window = rest;
    }
    Ok(Done::Ok)
}

impl Storage for WithheldStorage {
    fn submit(&mut self, token: Token, op: Op) {
        match self.run_withheld(&op) {
            Some(result) => self.ended.push_back((token, result)),
            None => self.below.submit(token, op),
        }
    }

    fn wait(&mut self) -> Completion {
        match self.ended.pop_front() {
            Some(completion) => completion,
            None => self.below.wait(),
        }
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        self.below.zero_request(request, offset, len);
    }

    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        self.below.file().len().map_err(|error| storage_error(&error))
    }

    fn identity(&self) -> [u8; 16] {
        self.below.identity()
    }

    fn boot_id(&self) -> [u8; 16] {
        self.below.boot_id()
    }

    fn read_log(&mut self, uuid: [u8; 16], path: &str) -> Result<Option<Vec<u8>>, StorageError> {
        self.below.read_log(uuid, path)
    }

    fn create_log(
        &mut self,
        uuid: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError> {
        self.below.create_log(uuid, bytes, len)
    }

    fn store_log(&mut self, offset: usize, bytes: &[u8]) {
        self.below.store_log(offset, bytes);
    }

    fn remove_log(&mut self) {
        self.below.remove_log();
    }
}

impl BufferRegistry for WithheldStorage {
    fn put(&mut self, id: RequestId, data: Vec<u8>) {
        self.below.put(id, data);
    }

    fn take(&mut self, id: RequestId) -> Vec<u8> {
        self.below.take(id)
    }
}
