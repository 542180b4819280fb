//! The completion log: a small mapped file beside the image that outlives the process (P2).
//!
//! Stores reach the page cache of the host at once, so they survive SIGKILL without a system call.
//! What is stored is the engine's business; this module finds a safe place for the file, creates it
//! so that a store cannot fail, reads what an earlier owner left, and removes it.

use crate::mapping::map_shared;
use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::geteuid;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names the directory for completion logs, before any other choice.
pub const RUNTIME_DIR_VARIABLE: &str = "EXD_RUNTIME_DIR";
/// Longest log that is believed, in bytes.
const LOG_BYTES_MAX: u64 = 1 << 30;
/// Longest path the superblock has room for, in bytes.
pub const PATH_BYTES_MAX: usize = 702;

/// Why the completion log cannot be used, with the remedy.
#[derive(Debug)]
pub struct LogError {
    /// The text for the user.
    pub text: String,
    /// The cause.
    pub source: io::Error,
}

impl std::fmt::Display for LogError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for LogError {}

impl LogError {
    fn new(path: &Path, what: &str, remedy: &str, source: io::Error) -> Self {
        let path = path.to_string_lossy().escape_debug().to_string();
        LogError { text: format!("completion log '{path}': {what}: {source}; {remedy}"), source }
    }
}

/// Keeps the completion log of one open image. Shared by the threads that serve it.
#[derive(Debug)]
pub struct LogKeeper {
    image: PathBuf,
    image_owner: u32,
    current: Mutex<Option<Log>>,
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    device: u64,
    inode: u64,
    mapping: MmapMut,
}

impl LogKeeper {
    /// For the image of this name, which belongs to the user `image_owner`.
    pub fn new(image: &Path, image_owner: u32) -> Self {
        let image = fs::canonicalize(image).unwrap_or_else(|_| image.to_owned());
        LogKeeper { image, image_owner, current: Mutex::new(None) }
    }

    /// Makes the directory ready where the log will be created; `None` if there is none. Afterwards the
    /// rest of the file system may be put out of reach.
    pub fn prepare(&self) -> Option<PathBuf> {
        let ready = |directory: &Directory| directory.prepare().is_ok();
        self.directories().into_iter().find(ready).map(|directory| directory.path)
    }

    /// The files that [`LogKeeper::read`] would look at. An image cannot make it any file it likes.
    pub fn candidates(&self, uuid: [u8; 16], named: &str) -> Vec<PathBuf> {
        let name = file_name(uuid);
        let named = Some(PathBuf::from(named)).filter(|path| path.ends_with(&name));
        let directories = self.directories().into_iter();
        named.into_iter().chain(directories.map(|found| found.path.join(&name))).collect()
    }

    /// What an earlier owner left, whole. `named` is where the superblock says it is (may be empty);
    /// if nothing is there, the places where it would be created now are tried.
    pub fn read(&self, uuid: [u8; 16], named: &str) -> Result<Option<Vec<u8>>, LogError> {
        if !named.is_empty() {
            let path = Path::new(named);
            match self.read_file(path) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    let remedy = "the image was not closed cleanly and its last completed writes \
                        may be in this file: open the image as the user who owns it, or remove the \
                        file to give those writes up";
                    return Err(LogError::new(path, "could not be read", remedy, error));
                }
            }
        }
        for directory in self.directories() {
            match self.read_file(&directory.path.join(file_name(uuid))) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if is_absent(&error) => {}
                Err(error) => {
                    log::warn!("completion log in {}: ignored: {error}", directory.path.display())
                }
            }
        }
        Ok(None)
    }

    /// Creates the log with `first` as its first content and `len` bytes in all, in place of an
    /// earlier one, and returns where it is.
    pub fn create(&self, uuid: [u8; 16], first: &[u8], len: usize) -> Result<String, LogError> {
        assert!(first.len() <= len, "the log holds its first content");
        let mut refusal = None;
        for directory in self.directories() {
            let path = directory.path.join(file_name(uuid));
            match self.create_in(&directory, &path, first, len) {
                Ok(text) => return Ok(text),
                Err(error) => {
                    let remedy = "set EXD_RUNTIME_DIR to a directory of yours on this host";
                    let error = LogError::new(&path, "could not be created", remedy, error);
                    if directory.required {
                        return Err(error);
                    }
                    log::debug!("{error}");
                    refusal = Some(error);
                }
            }
        }
        Err(refusal.unwrap_or_else(|| {
            let error = io::Error::from(ErrorKind::NotFound);
            LogError::new(&self.image, "no directory for it", "set EXD_RUNTIME_DIR", error)
        }))
    }

    /// Stores bytes. Survives the death of the process from the moment the call returns.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let mut current = self.current();
        let log = current.as_mut().expect("stores follow the creation of the log");
        log.mapping[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Removes the log, unless somebody has put another file in its place. What cannot be removed is
    /// left: it names its epoch and does no harm.
    pub fn remove(&self) {
        let Some(log) = self.current().take() else { return };
        match fs::symlink_metadata(&log.path) {
            Ok(found) if (found.dev(), found.ino()) == (log.device, log.inode) => {
                if let Err(error) = fs::remove_file(&log.path) {
                    log::warn!("could not remove {}: {error}", log.path.display());
                }
            }
            _ => {}
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Log>> {
        // A panic elsewhere leaves the log as usable as it was: it has no state but its bytes.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the log may be, best first.
    fn directories(&self) -> Vec<Directory> {
        if let Some(path) = env::var_os(RUNTIME_DIR_VARIABLE).filter(|path| !path.is_empty()) {
            return vec![Directory {
                path: path.into(),
                create: true,
                private: true,
                required: true,
            }];
        }
        let mut choices = Vec::new();
        let mut private = |path: PathBuf| {
            choices.push(Directory { path, create: true, private: true, required: false });
        };
        if geteuid().is_root() {
            private("/run/exd".into());
        }
        if let Some(path) = env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
            private(Path::new(&path).join("exd"));
        }
        let beside = self.image.parent().unwrap_or(Path::new("/")).to_owned();
        choices.push(Directory { path: beside, create: false, private: false, required: false });
        choices
    }

    fn create_in(
        &self,
        directory: &Directory,
        path: &Path,
        first: &[u8],
        len: usize,
    ) -> io::Result<String> {
        directory.prepare()?;
        let path = directory.path.canonicalize()?.join(path.file_name().unwrap_or(OsStr::new("")));
        let text = path
            .to_str()
            .filter(|text| text.len() <= PATH_BYTES_MAX)
            .ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidFilename, "path too long or not UTF-8")
            })?
            .to_owned();
        let (temporary, file) = create_exclusively(&path)?;
        let made = fill(&file, first, len).and_then(|()| {
            let mapping = map_shared(&file, len)?;
            let metadata = file.metadata()?;
            fs::rename(&temporary, &path)?;
            Ok(Log { path: path.clone(), device: metadata.dev(), inode: metadata.ino(), mapping })
        });
        match made {
            Ok(log) => {
                *self.current() = Some(log);
                Ok(text)
            }
            Err(error) => {
                // The first error is the one that matters.
                let _ = fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Reads a log that may have been put there by anybody: a regular file, no link, owned by us, by
    /// root or by the owner of the image, writable to nobody else.
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)?;
        let metadata = file.metadata()?;
        let owner = metadata.uid();
        let trusted = [0, geteuid().as_raw(), self.image_owner].contains(&owner);
        if !metadata.is_file() || !trusted || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                ErrorKind::PermissionDenied,
                format!("not a regular file of a trusted owner (owner {owner})"),
            ));
        }
        if metadata.len() > LOG_BYTES_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, "too long to be a completion log"));
        }
        let mut bytes = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// A candidate for the log's directory.
struct Directory {
    path: PathBuf,
    /// Made (mode 0711: sockets may lie below, for others) where it does not exist.
    create: bool,
    /// Must be ours alone.
    private: bool,
    /// A failure here is final: the user chose it.
    required: bool,
}

impl Directory {
    fn prepare(&self) -> io::Result<()> {
        if self.create {
            match DirBuilder::new().mode(0o711).create(&self.path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let metadata = fs::metadata(&self.path)?;
        if !metadata.is_dir() {
            return Err(ErrorKind::NotADirectory.into());
        }
        let ours = metadata.uid() == geteuid().as_raw();
        if self.private && (!ours || metadata.mode() & 0o022 != 0) {
            return Err(io::Error::new(
                ErrorKind::PermissionDenied,
                "the directory is not ours or others may write to it",
            ));
        }
        Ok(())
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The log's file name: the image's UUID in its usual text form, `.exdlog`.
pub fn file_name(uuid: [u8; 16]) -> String {
    let mut name = String::with_capacity(43);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            name.push('-');
        }
        name += &format!("{byte:02x}");
    }
    name + ".exdlog"
}

/// A new empty file beside `path` under a name of its own.
fn create_exclusively(path: &Path) -> io::Result<(PathBuf, File)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or(OsStr::new("log")).to_owned();
    name.push(format!(".{}.{count}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&temporary)
    };
    let file = match open() {
        // Left by a dead process that had our number.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary)?;
            open()?
        }
        other => other?,
    };
    Ok((temporary, file))
}

/// Gives the file its length, its space and its first content. The rest is written with zeroes, not
/// only allocated: a store into it then needs nothing more from the file system.
fn fill(file: &File, first: &[u8], len: usize) -> io::Result<()> {
    let length = libc::off_t::try_from(len).map_err(|_| ErrorKind::FileTooLarge)?;
    // Best effort: the zeroes written below reserve the space too.
    let _ = fallocate(file, FallocateFlags::empty(), 0, length);
    file.write_all_at(first, 0)?;
    let zeroes = [0; 65536];
    let mut offset = first.len();
    while offset < len {
        let count = (len - offset).min(zeroes.len());
        file.write_all_at(&zeroes[..count], offset as u64)?;
        offset += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const UUID: [u8; 16] = [0xab; 16];

    /// A keeper whose log lies beside the image, whatever the environment says.
    fn keeper(dir: &Path) -> (LogKeeper, Directory) {
        let keeper = LogKeeper::new(&dir.join("image"), geteuid().as_raw());
        let directory =
            Directory { path: dir.to_owned(), create: true, private: true, required: true };
        (keeper, directory)
    }

    fn create(keeper: &LogKeeper, directory: &Directory) -> io::Result<String> {
        keeper.create_in(directory, &directory.path.join(file_name(UUID)), b"head", 10000)
    }

    /// P2: what was stored is there for whoever reads the file, without a sync or an orderly end.
    #[test]
    fn p2_stores_outlive_the_keeper() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (first, directory) = keeper(dir.path());
        let path = create(&first, &directory).expect("create");
        first.store(9000, b"entry");
        drop(first);
        let bytes = keeper(dir.path()).0.read(UUID, &path).expect("readable").expect("present");
        assert_eq!(bytes.len(), 10000);
        assert_eq!(&bytes[..4], b"head");
        assert_eq!(&bytes[9000..9005], b"entry");
        assert!(bytes[4..9000].iter().all(|b| *b == 0));
    }

    #[test]
    fn created_private_and_removed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (keeper, directory) = keeper(dir.path());
        let path = create(&keeper, &directory).expect("create");
        assert_eq!(fs::metadata(&path).expect("exists").mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1, "no temporary left");
        keeper.remove();
        assert!(!Path::new(&path).exists());
        assert!(keeper.read_file(Path::new(&path)).is_err_and(|error| is_absent(&error)));
    }

    #[test]
    fn a_successor_replaces_the_log_and_its_predecessor_leaves_it_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (first, directory) = keeper(dir.path());
        let path = create(&first, &directory).expect("create");
        let (second, _) = keeper(dir.path());
        create(&second, &directory).expect("replace");
        first.remove();
        assert!(Path::new(&path).exists());
        second.remove();
        assert!(!Path::new(&path).exists());
    }

    /// P8: a link or a file that others may write is not followed and not believed.
    #[test]
    fn p8_planted_files_are_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (keeper, directory) = keeper(dir.path());
        let target = dir.path().join("target");
        fs::write(&target, b"victim").expect("write");
        let path = dir.path().join(file_name(UUID));
        symlink(&target, &path).expect("link");
        assert!(keeper.read(UUID, path.to_str().expect("UTF-8")).is_err());
        create(&keeper, &directory).expect("replaces the link, not its target");
        assert_eq!(fs::read(&target).expect("read"), b"victim");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("chmod");
        let error = keeper.read(UUID, path.to_str().expect("UTF-8")).expect_err("refused");
        assert!(error.to_string().contains("remove the file"), "{error}");
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
        let (keeper, directory) = keeper(dir.path());
        assert!(create(&keeper, &directory).is_err());
    }

    #[test]
    fn names() {
        let mut uuid = [0; 16];
        uuid[0] = 1;
        uuid[15] = 255;
        assert_eq!(file_name(uuid), "01000000-0000-0000-0000-0000000000ff.exdlog");
    }
}
