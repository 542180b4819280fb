//! The listening socket: where it comes from and what is left behind.

#![allow(unsafe_code)]

use nix::fcntl::{AtFlags, Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen as start,
    socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Group, fchownat};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Takes over a descriptor whose former owner gave up closing it.
pub fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers pass a descriptor that is open, that nobody else closes, and that they do not
    // use after the returned value is gone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Who may connect to a socket that we make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Permissions {
    /// The mode.
    pub mode: u32,
    /// The group, by name or number.
    pub group: Option<String>,
}

impl Default for Permissions {
    fn default() -> Self {
        Permissions { mode: 0o600, group: None }
    }
}

impl Permissions {
    /// The same with the group as a number.
    pub fn looked_up(self) -> io::Result<Permissions> {
        let gid = self.gid()?;
        Ok(Permissions { group: gid.map(|gid| gid.to_string()), ..self })
    }

    fn gid(&self) -> io::Result<Option<Gid>> {
        let Some(group) = &self.group else { return Ok(None) };
        if let Ok(number) = group.parse() {
            return Ok(Some(Gid::from_raw(number)));
        }
        let found = Group::from_name(group)?;
        let unknown =
            || io::Error::new(ErrorKind::NotFound, format!("there is no group '{group}'"));
        Ok(Some(found.ok_or_else(unknown)?.gid))
    }
}

/// A socket that others connect to.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    /// The name we made, with the device and inode it had then.
    made: Option<(PathBuf, u64, u64)>,
}

impl Socket {
    /// Makes a socket of this name. A stale one, on which nobody listens, is replaced. At no time may more
    /// people connect than in the end.
    pub fn bind(path: &Path, permissions: &Permissions) -> io::Result<Socket> {
        let gid = permissions.gid()?;
        // Two that start together must not take each other's new socket for a stale one.
        let _turn = lock_directory(path)?;
        let listener = match listen(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && remove_stale(path)? => {
                listen(path)?
            }
            other => other?,
        };
        let name = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let made = name.metadata()?;
        let socket = Socket { listener, made: Some((path.to_owned(), made.dev(), made.ino())) };
        if !made.file_type().is_socket() {
            return Err(io::Error::new(ErrorKind::AddrInUse, "the name is another file's by now"));
        }
        if let Some(gid) = gid {
            fchownat(&name, "", None, Some(gid), AtFlags::AT_EMPTY_PATH)?;
        }
        if permissions.mode != 0o600 {
            // Through the descriptor: the name could be made a link to somebody else's file.
            let name = format!("/proc/self/fd/{}", name.as_raw_fd());
            fs::set_permissions(name, fs::Permissions::from_mode(permissions.mode))?;
        }
        Ok(socket)
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

/// Listens on a new name, mode 0600. A socket's file gets the mode that its descriptor had before, less
/// the umask: no mask of the process need be changed, and nobody sees another mode.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    start(&fd, Backlog::new(BACKLOG)?)?;
    Ok(UnixListener::from(fd))
}

/// Keeps others of our kind from looking at the names in the directory of `path`.
fn lock_directory(path: &Path) -> io::Result<Option<Flock<File>>> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match File::open(directory) {
        Ok(file) => Ok(Flock::lock(file, FlockArg::LockExclusive).ok()),
        // One may make names in a directory that one may not read.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(None),
        Err(error) => Err(error),
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

    fn bind(path: &Path) -> io::Result<Socket> {
        Socket::bind(path, &Permissions::default())
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("metadata").permissions().mode() & 0o777
    }

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("s");
        let first = bind(&path).expect("bind");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(bind(&path).expect_err("live").kind(), ErrorKind::AddrInUse);
        // Without its owner's clean end the name stays.
        let mut first = first;
        first.made = None;
        drop(first);
        let second = bind(&path).expect("stale");
        fs::remove_file(&path).expect("remove");
        fs::write(&path, "mine").expect("write");
        drop(second);
        assert!(path.exists(), "not ours any more");
        assert_eq!(bind(&path).expect_err("a file").kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn mode_and_group() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("s");
        let group = nix::unistd::getgid();
        for name in [Some(group.to_string()), None] {
            let permissions = Permissions { mode: 0o660, group: name };
            let socket = Socket::bind(&path, &permissions).expect("bind");
            assert_eq!(mode(&path), 0o660);
            assert_eq!(fs::metadata(&path).expect("metadata").gid(), group.as_raw());
            drop(socket);
            assert!(!path.exists());
        }
        let permissions = Permissions { mode: 0o660, group: Some("no such group".to_owned()) };
        let error = Socket::bind(&path, &permissions).expect_err("no such group");
        assert!(error.to_string().contains("no such group"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn inherited_descriptors_are_checked() {
        assert!(Socket::inherit(1).is_err());
        assert!(Socket::inherit(9999).is_err());
    }
}
