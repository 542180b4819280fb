//! The listening socket: where it comes from and what is left behind.

#![allow(unsafe_code)]

use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Takes over a descriptor whose former owner gave up closing it.
pub fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers pass a descriptor that is open, that nobody else closes, and that they do not
    // use after the returned value is gone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A socket that front-ends connect to.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    /// The name we made, with the device and inode it had then.
    made: Option<(PathBuf, u64, u64)>,
}

impl Socket {
    /// Makes a socket of this name, mode 0600. A stale one, on which nobody listens, is replaced.
    pub fn bind(path: &Path) -> io::Result<Socket> {
        let old = umask(Mode::from_bits_truncate(0o177));
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && remove_stale(path)? => {
                UnixListener::bind(path)
            }
            other => other,
        };
        umask(old);
        let listener = listener?;
        let made = fs::symlink_metadata(path)?;
        Ok(Socket { listener, made: Some((path.to_owned(), made.dev(), made.ino())) })
    }

    /// Uses an inherited descriptor, which must be a listening socket.
    pub fn inherit(fd: RawFd) -> io::Result<Socket> {
        if fd <= 2 {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a descriptor to inherit"));
        }
        // SAFETY: borrowed for the question alone; the kernel answers EBADF if it is not open.
        let question = unsafe { BorrowedFd::borrow_raw(fd) };
        if !getsockopt(&question, sockopt::AcceptConn)? {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a listening socket"));
        }
        let listener = UnixListener::from(adopt(fd));
        listener.set_nonblocking(false)?;
        Ok(Socket { listener, made: None })
    }

    /// Takes the next front-end; waits for one.
    pub fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept()?.0)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Socket {
    /// Removes the name, unless it is somebody else's by now.
    fn drop(&mut self) {
        let Some((path, device, inode)) = &self.made else { return };
        if fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (*device, *inode)) {
            // Nothing depends on it: the next start replaces a stale socket.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes the socket if nobody listens on it. False if somebody may.
fn remove_stale(path: &Path) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("s");
        let first = Socket::bind(&path).expect("bind");
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(Socket::bind(&path).expect_err("live").kind(), ErrorKind::AddrInUse);
        // Without its owner's clean end the name stays.
        let mut first = first;
        first.made = None;
        drop(first);
        let second = Socket::bind(&path).expect("stale");
        fs::remove_file(&path).expect("remove");
        fs::write(&path, "mine").expect("write");
        drop(second);
        assert!(path.exists(), "not ours any more");
        assert_eq!(Socket::bind(&path).expect_err("a file").kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn inherited_descriptors_are_checked() {
        assert!(Socket::inherit(1).is_err());
        assert!(Socket::inherit(9999).is_err());
    }
}
