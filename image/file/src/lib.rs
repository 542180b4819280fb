//! EXD images on real files and block devices: the blocking half of the engine's storage trait, the
//! image lock and the mapped completion log.
//!
//! [`HostFile`] is the part that knows how to open, place and shrink; it has no state of its own and
//! serves any number of threads. [`FileStorage`] drives an image with blocking calls. A driver that
//! submits its reads and writes in some other way keeps [`HostFile`], [`lock`] and [`LogKeeper`] and
//! brings its own implementation of the trait.

#![deny(unsafe_code)]

pub mod aligned;
pub mod caching;
pub mod completion_log;
mod error;
pub mod file;
mod geometry;
pub mod hints;
pub mod lock;
mod mapping;
mod owner;
pub mod storage;

pub use aligned::AlignedBuf;
pub use completion_log::LogKeeper;
pub use error::{FileError, storage_error};
pub use file::{HostFile, OpenMode, boot_id};
pub use lock::{LockMode, Locked};
pub use storage::FileStorage;
