//! What the tests of the real programs share.

#![deny(unsafe_code)]

pub mod client;
pub mod daemon;
pub mod programs;
