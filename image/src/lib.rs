//! The EXD image engine: a sparse, extent-based, crash-safe virtual disk as a deterministic state
//! machine.
//!
//! [`Disk`] turns requests into operations on a [`Storage`], which the caller implements, and is told
//! how they ended. [`blocking::Image`] wraps both for programs that do one thing at a time,
//! [`create`](create()) makes images, [`check`](check::check) examines them without writing.
#![forbid(unsafe_code)]

mod apply;
pub mod blocking;
mod blocking_io;
pub mod bugs;
pub mod check;
mod create;
mod disk;
mod error;
pub mod fast;
mod journal;
mod log;
mod map;
mod pool;
mod ranges;
mod recovery;
mod request;
mod space;
mod storage;
mod streams;

#[cfg(feature = "measure")]
pub use map::measure;

pub use create::{CreateOptions, create};
pub use disk::{Disk, HolderName, Info, OpenOptions, Stats};
pub use error::{Error, ErrorKind};
pub use exd_format::Preallocation;
pub use map::State;
pub use pool::ZeroAhead;
pub use recovery::{Identity, peek, peek_log};
pub use request::{Request, RequestError};
pub use storage::{
    Completion, Done, Geometry, Op, RequestId, SECTOR, Segment, Storage, StorageError, Token,
};
