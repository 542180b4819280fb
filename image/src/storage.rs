//! The one door through which the engine reaches storage.
//!
//! The engine never performs I/O: it submits an [`Op`] under a [`Token`] and is told later how it
//! ended. Submit and completion are separate so that two half-done sub-block writes can be held and
//! finished in either order; that order is where the bugs live that this project exists to prevent.
//!
//! # What the engine assumes of the host
//! * A completed write is visible to later reads, but durable only after a [`Op::Sync`] that was
//!   submitted after the write completed returned success.
//! * Until then any subset of the unsynced writes survives a crash of the host, each torn at 512
//!   bytes, in any order; a length change is an effect of its own.
//! * Bytes that were not written keep their content; holes and everything past the end read as zero.
//! * After a failed sync the fate of every unsynced write is unknown for ever.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes in a sector, the unit of guest addresses and of tearing.
pub const SECTOR: u64 = 512;

/// Names an operation between its submission and its completion. Never reused within one open image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u64);

/// Names a guest request, and with it the buffer that holds or receives its data. Chosen by whoever
/// submits the request; unique among the requests in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// A piece of what a write stores, in order. The engine never touches guest data: it names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Segment {
    /// So many zero bytes.
    Zero(u64),
    /// So many zero bytes, at the beginning or the end of a write, where zeroes are already: they may be
    /// left out.
    Spare(u64),
    /// Bytes `offset .. offset + len` of the data of a guest's write request.
    Request {
        /// The write request.
        request: RequestId,
        /// First byte within the request's buffer.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes of the engine's own (metadata, or the rest of a block that is read, modified, written).
    Bytes(Arc<[u8]>),
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Segment::Zero(len) | Segment::Spare(len) | Segment::Request { len, .. } => *len,
            Segment::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Leaves out what may be left out of a write's segments: so many bytes before and behind the rest.
    pub fn trim(offset: &mut u64, segments: &mut Vec<Segment>) -> (u64, u64) {
        let (mut before, mut behind) = (0, 0);
        if let [.., Segment::Spare(len)] = segments[..] {
            behind = len;
            segments.pop();
        }
        if let [Segment::Spare(len), ..] = segments[..] {
            before = len;
            *offset += len;
            segments.remove(0);
        }
        (before, behind)
    }

    /// True for a segment of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One operation on the image file. Offsets and lengths are in bytes of the image file, multiples of
/// 512, and of [`Geometry::alignment`] for reads and writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Reads metadata; completes with [`Done::Bytes`] of exactly `len` bytes. What lies past the end
    /// of the file reads as zeroes.
    ReadBytes {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Reads guest data into bytes `buffer_offset ..` of the buffer of a read request.
    /// What lies past the end of the file reads as zeroes. May be unaligned to
    /// [`Geometry::alignment`] (not to 512): the storage then reads more and copies.
    ReadRequest {
        /// Position in the file.
        offset: u64,
        /// The read request.
        request: RequestId,
        /// Where in the request's buffer the bytes go.
        buffer_offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Writes the segments one after another. A short write is an error of the storage to hide: it
    /// finishes the rest or fails.
    Write {
        /// Position in the file.
        offset: u64,
        /// What to store.
        segments: Vec<Segment>,
    },
    /// Gives the range back to the host; it reads as zeroes afterwards. Fails with
    /// [`StorageError::Unsupported`] where the host cannot.
    Punch {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Reserves host space for the range without changing what it reads.
    Allocate {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Sets the file's length. `Unsupported` on a block device.
    SetLen {
        /// The new length in bytes.
        len: u64,
    },
    /// Makes durable every write, punch, allocation and length change that completed before this
    /// operation was submitted (fdatasync).
    Sync,
    /// Asks for the first range at or after `offset` that holds data on the host (SEEK_DATA);
    /// completes with [`Done::Data`]. A storage that cannot tell answers that all is data.
    NextData {
        /// Position in the file.
        offset: u64,
    },
}

/// What a successful operation yields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// Nothing but success.
    Ok,
    /// The bytes of [`Op::ReadBytes`].
    Bytes(Vec<u8>),
    /// The answer to [`Op::NextData`]: `None` when no data follows.
    Data(Option<Range<u64>>),
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StorageError {
    /// The host has no space left (ENOSPC, EDQUOT).
    NoSpace,
    /// The host cannot do this here (EOPNOTSUPP).
    Unsupported,
    /// Any other error, with its `errno`.
    Io(i32),
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StorageError::NoSpace => f.write_str("no space left on the host"),
            StorageError::Unsupported => f.write_str("operation not supported by the host"),
            StorageError::Io(errno) => {
                write!(f, "{}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for StorageError {}

/// What the engine needs to know about where the image lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Granularity in bytes of offsets and lengths of reads and writes: 512 or more, a power of two.
    pub alignment: u64,
    /// The host's allocation unit in bytes (file system block): punches are aligned to it, and first
    /// writes are padded to it.
    pub host_block: u64,
    /// The file's length is fixed (a block device): it cannot grow, and unwritten space is *not*
    /// known to be zero.
    pub fixed_length: bool,
}

/// Ends of operations, as [`Storage::wait`] and the driver's event loop deliver them.
pub type Completion = (Token, Result<Done, StorageError>);

/// The image file and the completion log beside it.
///
/// The storage holds the image lock (P9) for as long as it exists.
pub trait Storage {
    /// Starts an operation. Its end is reported exactly once, never from inside this call.
    fn submit(&mut self, token: Token, op: Op);

    /// Blocks until some operation has ended. Called only while one is under way.
    fn wait(&mut self) -> Completion;

    /// Fills `len` bytes at `offset` of a read request's buffer with zeroes, at once.
    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64);

    /// Where the image lies. Constant while it is open.
    fn geometry(&self) -> Geometry;

    /// Current length of the file in bytes.
    fn file_len(&mut self) -> Result<u64, StorageError>;

    /// Identity of the file on this host (device and inode): a completion log counts only for the
    /// very file it was written for.
    fn identity(&self) -> [u8; 16];

    /// Identity of this boot of the host: a completion log does not outlive it.
    fn boot_id(&self) -> [u8; 16];

    /// The completion log an earlier owner of this image left, whole; `None` if there is none.
    /// `path` is where the superblock says it was (may be empty).
    fn read_log(&mut self, uuid: [u8; 16], path: &str) -> Result<Option<Vec<u8>>, StorageError>;

    /// Creates the completion log with `bytes` as its first content and `len` bytes in all, in place
    /// of any earlier one, and returns where it is. It is memory that outlives this process:
    /// [`Storage::store_log`] cannot fail.
    fn create_log(
        &mut self,
        uuid: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError>;

    /// Stores bytes into the completion log. Survives the death of the process from the moment the
    /// call returns; a death during the call may leave any part of it.
    fn store_log(&mut self, offset: usize, bytes: &[u8]);

    /// Removes the completion log.
    fn remove_log(&mut self);
}
