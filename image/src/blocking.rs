//! An open image for programs that do one thing at a time.

use crate::create::{CreateOptions, create};
use crate::disk::{Disk, Info, OpenOptions};
use crate::error::Error;
use crate::map::State;
use crate::request::{Request, RequestError};
use crate::storage::{RequestId, SECTOR, Storage};

/// A storage that holds the buffers of requests itself.
pub trait BufferRegistry {
    /// Gives the storage a request's buffer.
    fn put(&mut self, id: RequestId, data: Vec<u8>);
    /// Takes it back.
    fn take(&mut self, id: RequestId) -> Vec<u8>;
}

/// A run of the virtual disk with one state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapPiece {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// State of all of it.
    pub state: State,
    /// Byte offset of its place in the image file, if it has one.
    pub physical: Option<u64>,
}

/// An open image and its storage.
pub struct Image<S: Storage + BufferRegistry> {
    storage: S,
    disk: Disk,
    next: u64,
}

impl<S: Storage + BufferRegistry> Image<S> {
    /// Makes an image; the storage comes back for opening it.
    pub fn create(mut storage: S, options: &CreateOptions) -> Result<S, Error> {
        create(&mut storage, options)?;
        Ok(storage)
    }

    /// Opens an image.
    pub fn open(mut storage: S, options: OpenOptions) -> Result<Self, Error> {
        let disk = Disk::open(&mut storage, options)?;
        Ok(Image { storage, disk, next: 0 })
    }

    /// What is known of the image.
    pub fn info(&self) -> Info {
        self.disk.info()
    }

    /// The engine underneath.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// The storage underneath.
    pub fn storage(&mut self) -> &mut S {
        &mut self.storage
    }

    /// Bytes of the virtual disk.
    pub fn virtual_size(&self) -> u64 {
        self.disk.info().virtual_size
    }

    /// Reads `buffer.len()` bytes at `offset`, both multiples of 512.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let len = buffer.len() as u64;
        let data = self.run(Request::Read { offset, len }, vec![0; buffer.len()])?;
        buffer.copy_from_slice(&data);
        Ok(())
    }

    /// Writes `data` at `offset`, both multiples of 512.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let len = data.len() as u64;
        self.run(Request::Write { offset, len, durable: false }, data.to_vec()).map(drop)
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.run(Request::WriteZeroes { offset, len, unmap, durable: false }, Vec::new()).map(drop)
    }

    /// Gives a range up.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        self.run(Request::Discard { offset, len }, Vec::new()).map(drop)
    }

    /// Makes everything before it durable.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.run(Request::Flush, Vec::new()).map(drop)
    }

    /// Moves scattered data of a range together.
    pub fn defragment(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        self.run(Request::Defragment { offset, len }, Vec::new()).map(drop)
    }

    /// Writes the tree out.
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        self.run(Request::Checkpoint, Vec::new()).map(drop)
    }

    /// Changes the virtual size.
    pub fn resize(&mut self, size: u64) -> Result<(), Error> {
        self.run(Request::Resize { size }, Vec::new()).map(drop)
    }

    /// How `len` bytes from `offset` are mapped, in order; neighbours of one state are one piece where
    /// their places are neighbours too.
    pub fn map(&mut self, offset: u64, len: u64) -> Result<Vec<MapPiece>, Error> {
        let mut pieces: Vec<MapPiece> = Vec::new();
        let end = offset.saturating_add(len).min(self.virtual_size());
        let mut at = offset;
        while at < end {
            let piece = self.disk.map_piece(&mut self.storage, at, end)?;
            at += piece.len;
            match pieces.last_mut() {
                Some(last)
                    if last.state == piece.state
                        && last.physical.map(|start| start + last.len) == piece.physical =>
                {
                    last.len += piece.len;
                }
                _ => pieces.push(piece),
            }
        }
        Ok(pieces)
    }

    /// Closes the image; the storage, and with it the lock, comes back.
    pub fn close(mut self) -> Result<S, Error> {
        self.disk.close(&mut self.storage)?;
        Ok(self.storage)
    }

    /// Lets go of the image as a crash would.
    pub fn abandon(self) -> S {
        self.storage
    }

    fn run(&mut self, request: Request, data: Vec<u8>) -> Result<Vec<u8>, Error> {
        let id = RequestId(self.next);
        self.next += 1;
        self.storage.put(id, data);
        self.disk.submit(&mut self.storage, id, request);
        self.disk.kick(&mut self.storage);
        let mut waited_ms = 0;
        let result = loop {
            if let Some((finished, result)) = self.disk.pop_finished() {
                assert!(finished == id, "one request at a time");
                break result;
            }
            if self.disk.ops_in_flight() == 0 {
                // Something waits for time to pass: a failed checkpoint, tried again later.
                waited_ms += 100;
                assert!(
                    waited_ms <= 600_000,
                    "{request:?} neither ends nor has anything under way"
                );
                self.disk.advance_clock(&mut self.storage, 100);
                continue;
            }
            let (token, result) = self.storage.wait();
            self.disk.complete(&mut self.storage, token, result);
        };
        let data = self.storage.take(id);
        match result {
            Ok(()) => Ok(data),
            Err(RequestError::Corrupt) => Err(self
                .disk
                .last_corruption()
                .cloned()
                .unwrap_or_else(|| RequestError::Corrupt.into())),
            Err(error) => {
                let mut error = Error::from(error);
                error.context = describe(&request, &error.context);
                Err(error)
            }
        }
    }
}

fn describe(request: &Request, what: &str) -> String {
    let (verb, offset, len) = match *request {
        Request::Read { offset, len } => ("read", offset, len),
        Request::Write { offset, len, .. } => ("write", offset, len),
        Request::WriteZeroes { offset, len, .. } => ("zero", offset, len),
        Request::Discard { offset, len } => ("discard", offset, len),
        Request::Defragment { offset, len } => ("defragment", offset, len),
        Request::Flush => return format!("cannot flush: {what}"),
        Request::Checkpoint => return format!("cannot write a checkpoint: {what}"),
        Request::Freeze => return format!("cannot freeze the image: {what}"),
        Request::Resize { size } => return format!("cannot resize to {size} bytes: {what}"),
    };
    format!("cannot {verb} {len} bytes at {offset} of the virtual disk: {what}")
}

impl Disk {
    /// The mapping at byte `at` of the virtual disk, up to `end` at most.
    fn map_piece(&mut self, st: &mut dyn Storage, at: u64, end: u64) -> Result<MapPiece, Error> {
        let block_size = self.info().block_size;
        let block = at / block_size;
        let (mapping, blocks) =
            self.lookup_blocking(st, block, end.div_ceil(block_size) - block)?;
        let stop = ((block + blocks) * block_size).min(end);
        let skip = at - block * block_size;
        let physical = (mapping.place != 0).then(|| mapping.place * SECTOR + skip);
        Ok(MapPiece { offset: at, len: stop - at, state: mapping.state, physical })
    }
}
