//! Virtqueues: requests taken from the rings, checked, passed on and answered.

pub mod memory;
pub mod record;
pub mod request;
pub mod worker;
