//! The library's end of a connection.
//!
//! The back-end library only takes connections from a listening socket, and the front-end's must not be
//! its: the relay sits between them. So there is a socket that nobody else can reach: made at start-up
//! in a directory of our own, both removed at once, and connected to through a descriptor. Nothing has
//! to be made or found in the file system later, when a sandbox may forbid it; only /proc must be
//! there.

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::mkdtemp;
use std::env;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket without a name.
#[derive(Debug)]
pub struct PrivateListener {
    listener: UnixListener,
    /// Stands for the socket in the file system (O_PATH).
    place: OwnedFd,
}

impl PrivateListener {
    /// Makes one. `beside` is a directory to try when there is no place for temporary files.
    pub fn new(beside: Option<&Path>) -> io::Result<PrivateListener> {
        let fallback = [PathBuf::from("/run"), PathBuf::from("/dev/shm")];
        let places = [env::temp_dir()].into_iter().chain(fallback);
        let mut first_error = None;
        for place in places.chain(beside.map(Path::to_owned)) {
            match PrivateListener::new_in(&place) {
                Ok(made) => return Ok(made),
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        Err(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    fn new_in(place: &Path) -> io::Result<PrivateListener> {
        // Mode 0700: until the name is gone nobody else gets at it.
        let directory = mkdtemp(&place.join("vhost-daemon-XXXXXX"))?;
        let made = PrivateListener::bind(&directory);
        // An empty directory that stays does no harm.
        let _ = fs::remove_file(directory.join(NAME));
        let _ = fs::remove_dir(&directory);
        made
    }

    fn bind(directory: &Path) -> io::Result<PrivateListener> {
        // Through the descriptor, since a socket's name must be short and the path may be long.
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let room = open(directory, flags | OFlag::O_DIRECTORY, Mode::empty())?;
        let path = through(&room).join(NAME);
        let listener = UnixListener::bind(&path)?;
        // So that it can be connected to after a change of the user.
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        let place = open(&path, flags | OFlag::O_NOFOLLOW, Mode::empty())?;
        Ok(PrivateListener { listener, place })
    }

    /// The socket for the library, which keeps it no longer than a connection.
    pub fn listener(&self) -> io::Result<vhost::vhost_user::Listener> {
        Ok(self.listener.try_clone()?.into())
    }

    /// The other end of the connection that the library will accept next.
    pub fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(through(&self.place))
    }
}

const NAME: &str = "s";

fn through(fd: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn connects_although_no_name_is_left() {
        let long = tempfile::tempdir().expect("temporary directory");
        let long = long.path().join("d".repeat(200));
        fs::create_dir(&long).expect("create");
        let private = PrivateListener::new_in(&long).expect("made");
        assert_eq!(fs::read_dir(&long).expect("read").count(), 0, "nothing is left behind");
        for _ in 0..2 {
            let mut ours = private.connect().expect("connect");
            let (mut theirs, _) = private.listener.accept().expect("accept");
            ours.write_all(b"x").expect("write");
            let mut byte = [0];
            theirs.read_exact(&mut byte).expect("read");
        }
    }

    #[test]
    fn another_place_is_found() {
        assert!(PrivateListener::new_in(Path::new("/proc")).is_err());
        let beside = tempfile::tempdir().expect("temporary directory");
        PrivateListener::new(Some(beside.path())).expect("made");
    }
}
