//! What the process gives up before it looks at an image or listens to a guest.
//!
//! A guest, a front-end and an image file are untrusted; should one of them get to run code here, that code
//! finds little: no file but the disk's own (Landlock), no program to run and no system call that a disk
//! does not need (seccomp), no capability beyond access to files, and no way to get any of it back
//! (no_new_privs). All of it holds for the calling thread and those it starts, so [`enter`] comes before
//! the first thread. `--no-sandbox` leaves it out.

mod calls;
mod files;
mod rights;

use nix::unistd::{Gid, User, initgroups, setgid, setuid};
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Files and directories that stay within reach.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reach {
    /// Read.
    read: Vec<PathBuf>,
    /// Read, written and cut.
    write: Vec<PathBuf>,
    /// Directories where files are made, replaced and removed.
    files_in: Vec<PathBuf>,
    /// Directories where sockets are made and removed.
    sockets_in: Vec<PathBuf>,
}

impl Reach {
    /// What every daemon needs: who holds a lock, this boot's name, how many processors it may use.
    pub fn new() -> Reach {
        let read = ["/proc", "/sys/fs/cgroup", "/sys/devices/system/cpu"].map(PathBuf::from);
        Reach { read: read.to_vec(), ..Reach::default() }
    }

    /// A file that is read.
    pub fn read(&mut self, path: impl Into<PathBuf>) {
        self.read.push(path.into());
    }

    /// A file that is read and written.
    pub fn write(&mut self, path: impl Into<PathBuf>) {
        self.write.push(path.into());
    }

    /// A directory in which files are made, replaced and removed.
    pub fn files_in(&mut self, directory: impl Into<PathBuf>) {
        self.files_in.push(directory.into());
    }

    /// The name of a socket that is made and removed.
    pub fn socket(&mut self, path: &Path) {
        self.sockets_in.push(directory_of(path));
    }

    /// The name of a file that is made and replaced.
    pub fn file(&mut self, path: &Path) {
        self.files_in.push(directory_of(path));
    }
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Becomes the user, with the groups it has. Files and sockets are opened as this user from then on,
/// now and whenever the image is taken again.
pub fn become_user(name: &str) -> Result<(), String> {
    let failed = |error| format!("could not become user '{name}': {error}");
    let user = User::from_name(name).map_err(failed)?;
    let user = user.ok_or_else(|| format!("there is no user '{name}'"))?;
    if user.uid == nix::unistd::geteuid() && user.gid == Gid::effective() {
        return Ok(());
    }
    let text = CString::new(name).map_err(|_| "a user's name has no zero byte".to_owned())?;
    initgroups(&text, user.gid).map_err(failed)?;
    setgid(user.gid).map_err(failed)?;
    setuid(user.uid).map_err(failed)?;
    // The kernel made our own entries in /proc inaccessible, and we get at our socket through them.
    nix::sys::prctl::set_dumpable(true).map_err(failed)
}

/// Gives everything up but what is listed. What this host's kernel cannot do is said in the log.
pub fn enter(reach: &Reach) -> Result<(), String> {
    rights::drop_capabilities()?;
    files::confine(reach)?;
    calls::confine()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// P8: a thread in the sandbox gets at what it was given and at nothing else.
    #[test]
    fn p8_nothing_else_is_within_reach() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let at = |name: &str| dir.path().join(name);
        for name in ["logs", "run", "else"] {
            fs::create_dir(at(name)).expect("create");
        }
        for name in ["image", "backing", "other", "else/file"] {
            fs::write(at(name), "content").expect("write");
        }
        let mut reach = Reach::new();
        reach.write(at("image"));
        reach.read(at("backing"));
        reach.files_in(at("logs"));
        reach.socket(&at("run/s"));
        reach.read(at("missing"));
        let denied = |result: std::io::Result<()>| {
            result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        };
        // The sandbox is the thread's, so the other tests stay outside.
        let inside = || {
            enter(&reach).expect("entered");
            let open = fs::OpenOptions::new().read(true).write(true).open(at("image"));
            let image = open.expect("the image");
            image.set_len(3).expect("cut");
            fs::read(at("backing")).expect("read only");
            assert!(denied(fs::write(at("backing"), "x")));
            fs::write(at("logs/new"), "x").expect("made");
            fs::rename(at("logs/new"), at("logs/log")).expect("replaced");
            fs::remove_file(at("logs/log")).expect("removed");
            drop(UnixListener::bind(at("run/s")).expect("bound"));
            fs::remove_file(at("run/s")).expect("removed");
            fs::read_to_string("/proc/self/stat").expect("its own");
            // A thread may be started, and is inside too.
            let other = at("other");
            let reading = thread::spawn(move || fs::read(other).map(drop));
            assert!(denied(reading.join().expect("it ends")));
            for path in ["/etc/passwd", "/etc/hostname"] {
                assert!(denied(fs::read(path).map(drop)), "{path}");
            }
            assert!(denied(fs::read_dir(at("else")).map(drop)));
            assert!(denied(fs::write(at("run/file"), "x")));
            assert!(denied(fs::create_dir(at("logs/deeper"))));
            assert!(denied(TcpListener::bind("127.0.0.1:0").map(drop)));
        };
        thread::scope(|scope| scope.spawn(inside).join()).expect("as it should be");
        fs::read(at("other")).expect("outside nothing has changed");
    }

    #[test]
    fn users_that_do_not_exist() {
        assert!(become_user("no such user here").is_err());
    }
}
