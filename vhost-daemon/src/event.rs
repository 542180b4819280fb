//! An eventfd that wakes a thread.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// Something has happened; how often does not matter.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// An event that has not happened.
    pub fn new() -> io::Result<Event> {
        Ok(Event(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// It happens.
    pub fn signal(&self) {
        // The counter can only be full if it has been signalled already.
        let _ = self.0.write(1);
    }

    /// Forgets that it happened.
    pub fn clear(&self) {
        // Nothing to read: it did not happen.
        let _ = self.0.read();
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
