//! Tells the front-end that a ring cannot go on (vhost-user document, SET_VRING_ERR).

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::write;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The descriptors to signal, by the number of the ring.
#[derive(Debug, Default)]
pub struct RingErrors(Mutex<HashMap<u16, OwnedFd>>);

impl RingErrors {
    /// The front-end watches this descriptor, or none.
    pub fn set(&self, ring: u16, fd: Option<OwnedFd>) -> io::Result<()> {
        if let Some(fd) = fd {
            // Whatever it is: a ring's thread must not wait for it.
            let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            self.fds().insert(ring, fd);
        } else {
            self.fds().remove(&ring);
        }
        Ok(())
    }

    /// The ring cannot go on.
    pub fn signal(&self, ring: u16) {
        if let Some(fd) = self.fds().get(&ring) {
            // A full counter has been signalled already, and for other failures there is nobody to tell.
            let _ = write(fd, &1u64.to_le_bytes());
        }
    }

    fn fds(&self) -> MutexGuard<'_, HashMap<u16, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
