//! Virtqueues: requests taken from the rings, checked, passed on and answered.

pub mod chain;
pub mod dirty_log;
pub mod errors;
#[cfg(any(test, feature = "fuzzing"))]
pub mod exercise;
pub mod inflight;
pub mod memory;
pub mod record;
pub mod request;
pub mod used;
pub mod worker;
