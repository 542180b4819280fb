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

    /// Carries out the part of an operation that concerns the withheld start, and returns what is left
    /// of it for the device, or its end.
    fn divert(&mut self, op: Op) -> Result<Op, Result<Done, StorageError>> {
        let Some(withheld) = &mut self.withheld else { return Ok(op) };
        match op {
            Op::Write { offset, segments } if offset < WITHHELD_BYTES => {
                let window = withheld.get_mut(offset as usize..).unwrap_or_default();
                let rest = fill(window, segments).map_err(Err)?;
                match rest.is_empty() {
                    true => Err(Ok(Done::Ok)),
                    false => Ok(Op::Write { offset: WITHHELD_BYTES, segments: rest }),
                }
            }
            Op::Punch { offset, len } if offset < WITHHELD_BYTES => {
                let end = offset.saturating_add(len);
                let held = end.min(WITHHELD_BYTES) as usize;
                withheld.get_mut(offset as usize..held).unwrap_or_default().fill(0);
                match end > WITHHELD_BYTES {
                    true => Ok(Op::Punch { offset: WITHHELD_BYTES, len: end - WITHHELD_BYTES }),
                    false => Err(Ok(Done::Ok)),
                }
            }
            Op::ReadBytes { offset, len } if offset < WITHHELD_BYTES => {
                Err(self.read_start(offset, len))
            }
            other => Ok(other),
        }
    }

    /// Reads metadata that begins in the withheld start.
    fn read_start(&mut self, offset: u64, len: u64) -> Result<Done, StorageError> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| StorageError::Io(libc::ENOMEM))?];
        let file = self.below.file();
        file.read_at(offset, &mut bytes).map_err(|error| storage_error(&error))?;
        let held = self.withheld.as_deref().unwrap_or_default();
        let held = held.get(offset as usize..).unwrap_or_default();
        for (byte, held) in bytes.iter_mut().zip(held) {
            *byte = *held;
        }
        Ok(Done::Bytes(bytes))
    }
}

/// Stores segments into `window` until it is full, and returns those that did not fit.
fn fill(mut window: &mut [u8], segments: Vec<Segment>) -> Result<Vec<Segment>, StorageError> {
    let mut rest = Vec::new();
    for segment in segments {
        let held = (segment.len()).min(window.len() as u64);
        let (part, behind) = window.split_at_mut(held as usize);
        match &segment {
            Segment::Zero(_) | Segment::Spare(_) => part.fill(0),
            Segment::Bytes(bytes) => part.copy_from_slice(&bytes[..part.len()]),
            // Guest data never lies in the fixed area.
            Segment::Request { .. } if held > 0 => return Err(StorageError::Io(libc::EINVAL)),
            Segment::Request { .. } => {}
        }
        window = behind;
        if segment.len() > held {
            rest.push(match segment {
                Segment::Zero(len) | Segment::Spare(len) => Segment::Zero(len - held),
                Segment::Bytes(bytes) => Segment::Bytes(bytes[held as usize..].into()),
                request => request,
            });
        }
    }
    Ok(rest)
}

impl Storage for WithheldStorage {
    fn submit(&mut self, token: Token, op: Op) {
        match self.divert(op) {
            Err(result) => self.ended.push_back((token, result)),
            Ok(op) => self.below.submit(token, op),
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

#[cfg(test)]
mod tests {
    use super::*;
    use exd_file::HostFile;

    /// An image on a device passes for one only when it is complete, whatever the engine writes.
    #[test]
    fn the_start_stays_zero_until_the_release() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("device");
        let file = HostFile::open_or_create(&path, false).expect("create");
        file.write_at(0, &[9; 200_000]).expect("write");
        let below = FileStorage::new(file).expect("storage");
        let mut storage = WithheldStorage::withholding(below).expect("marked");
        let mut run = |op| {
            storage.submit(Token(1), op);
            storage.wait().1
        };
        let segments = vec![
            Segment::Bytes(vec![1; 60_000].into()),
            Segment::Zero(1000),
            Segment::Bytes(vec![2; 9000].into()),
            Segment::Zero(488),
        ];
        assert_eq!(run(Op::Write { offset: 512, segments }), Ok(Done::Ok));
        let Ok(Done::Bytes(back)) = run(Op::ReadBytes { offset: 0, len: 80_000 }) else {
            panic!("readable")
        };
        assert!(back[..512].iter().all(|byte| *byte == 0));
        assert!(back[512..60_512].iter().all(|byte| *byte == 1));
        assert!(back[60_512..61_512].iter().all(|byte| *byte == 0));
        assert!(back[61_512..70_512].iter().all(|byte| *byte == 2));
        assert!(back[70_512..71_000].iter().all(|byte| *byte == 0));
        assert!(back[71_000..].iter().all(|byte| *byte == 9));
        let now = std::fs::read(&path).expect("read");
        assert!(now[..65_536].iter().all(|byte| *byte == 0), "unfinished");
        assert_eq!(run(Op::Punch { offset: 0, len: 4096 }), Ok(Done::Ok));
        storage.release().expect("written");
        let now = std::fs::read(&path).expect("read");
        assert!(now[..4096].iter().all(|byte| *byte == 0));
        assert!(now[4096..80_000] == back[4096..]);
    }
}
