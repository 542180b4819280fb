//! Host I/O on the image file.

pub mod uring;
