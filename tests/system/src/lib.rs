//! What the tests of the real programs share.

#![deny(unsafe_code)]

pub mod client;
pub mod confine;
pub mod daemon;
pub mod frontend;
pub mod history;
pub mod image;
pub mod private_disk;
pub mod programs;
pub mod wire;
pub mod workload;
