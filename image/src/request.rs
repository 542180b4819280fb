//! What callers ask of an open image, and how it can fail.

use crate::storage::StorageError;
use std::fmt;

/// A guest's request. Offsets and lengths are bytes of the virtual disk, multiples of 512.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Reads into the request's buffer.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Writes the request's data.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Complete only when durable (write-through, FUA).
        durable: bool,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// The range's space may be given back.
        unmap: bool,
        /// Complete only when durable.
        durable: bool,
    },
    /// The content of the range is no longer needed. Whole blocks then read as zeroes; the rest is
    /// left as it is.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Makes every write that completed before it durable (P1).
    Flush,
    /// Moves data that is scattered over the image file together, as far as that makes reading the
    /// range in order cheaper. Changes nothing a guest can see.
    Defragment {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Writes the extent tree out and empties the journal.
    Checkpoint,
    /// Makes the image file stand still until [`crate::Disk::thaw`], with everything acknowledged before
    /// in it. Reads go on; changes wait.
    Freeze,
    /// Changes the virtual size; what lies past a smaller size is discarded for good.
    Resize {
        /// New virtual size in bytes, a multiple of 512.
        size: u64,
    },
}

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestError {
    /// Not inside the disk, or not a multiple of 512.
    OutOfRange,
    /// The image is open for reading only.
    ReadOnly,
    /// The host failed.
    Storage(StorageError),
    /// Metadata that the request needed is damaged (P6); [`crate::Disk::last_corruption`] says where.
    Corrupt,
    /// An earlier sync failed: nothing is durable any more until the image is opened again (P5).
    Failed,
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestError::OutOfRange => f.write_str("request is outside the disk or unaligned"),
            RequestError::ReadOnly => f.write_str("the image is open read-only"),
            RequestError::Storage(error) => error.fmt(f),
            RequestError::Corrupt => f.write_str("image metadata is damaged"),
            RequestError::Failed => {
                f.write_str("an earlier sync of the image failed; reopen it to go on")
            }
        }
    }
}

impl std::error::Error for RequestError {}

impl From<StorageError> for RequestError {
    fn from(error: StorageError) -> Self {
        RequestError::Storage(error)
    }
}
