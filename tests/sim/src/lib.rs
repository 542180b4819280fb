//! The storage simulator and the crash tests of the engine.
#![forbid(unsafe_code)]

pub mod api {
    //! What is used of the engine's interface.
    pub use exd_image::fast::{Access, FilePart, Ticket};
    pub use exd_image::{
        Completion, Done, Geometry, Op, Request, RequestError, RequestId, SECTOR, Segment, Storage,
        StorageError, Token,
    };
}

pub mod damage;
pub mod engine;
pub mod explore;
pub mod faults;
pub mod host_file;
pub mod interleave;
pub mod model;
pub mod real;
pub mod session;
pub mod stamp;
pub mod storage;
pub mod toy;
pub mod workload;
