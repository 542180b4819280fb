//! Measures EXD against raw files and qcow2: the same client, the same disk, taking turns.

#![deny(unsafe_code)]

pub mod backend;
pub mod client;
pub mod drive;
pub mod goals;
pub mod host;
pub mod installer;
pub mod measure;
pub mod plot;
pub mod readme;
pub mod report;
pub mod session;
pub mod stats;
pub mod trace;
pub mod workload;

/// What went wrong, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// Result of everything here.
pub type Result<T> = std::result::Result<T, Error>;
