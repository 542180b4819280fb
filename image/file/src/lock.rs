//! The image lock (P9): advisory locks on the very descriptor that issues the writes.
//!
//! Open file description locks last as long as the description is open, which includes the time in
//! which the kernel still carries out writes of a process that was killed. They do not tell their
//! owner, so a holder record in the image does; it means something only while the lock is held.

use crate::aligned::AlignedBuf;
use crate::error::FileError;
use crate::file::HostFile;
use crate::owner;
use exd_format::{HOLDER_OFFSET, HOLDER_SIZE, Holder, SUPERBLOCK_SIZE, Superblock};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fmt;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// The byte that is locked. Advisory locks do not touch the content.
const LOCK_BYTE: i64 = 0;
/// QEMU's lock bytes (block/file-posix.c): one per permission in use, one per permission refused to
/// others.
const QEMU_USED: i64 = 100;
const QEMU_UNSHARED: i64 = 200;
const QEMU_CONSISTENT_READ: i64 = 0;
const QEMU_WRITE: i64 = 1;
const QEMU_RESIZE: i64 = 3;

/// Covers the superblocks and the holder record, from the start of the file so that any granularity
/// of direct I/O is met.
const FIXED_AREA_BYTES: usize = 65536;

const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_millis(20);

/// What the image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Reading: shared with other readers.
    Reader,
    /// Writing: shared with nobody.
    Writer,
}

/// The outcome of a failed attempt to lock.
#[derive(Debug)]
pub enum LockError {
    /// Somebody holds the lock.
    Locked(Box<Locked>),
    /// Locks do not work here.
    Failed(FileError),
}

/// Who keeps an image from being opened.
#[derive(Clone, Debug)]
pub struct Locked {
    /// What was asked for.
    pub mode: LockMode,
    /// The name of the file.
    pub path: String,
    /// Who holds it, as far as can be found out.
    pub holder: Option<Holder>,
}

impl fmt::Display for Locked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.mode {
            LockMode::Writer => "Failed to get \"write\" lock",
            LockMode::Reader => "Failed to get shared \"write\" lock",
        })?;
        write!(f, "\nIs another process using the image [{}]?", self.path)?;
        if let Some(holder) = &self.holder {
            write!(f, "\nIt is held by {}.", describe_holder(holder))?;
        }
        Ok(())
    }
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::Locked(locked) => locked.fmt(f),
            LockError::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for LockError {}

/// A holder in words: `vhost-daemon, process 4711 on host alpha (/run/vm1.sock)`.
pub fn describe_holder(holder: &Holder) -> String {
    let printable = |text: &str| text.escape_debug().to_string();
    let mut text = match holder.program.as_str() {
        "" => "an unnamed program".to_owned(),
        program => printable(program),
    };
    text += &format!(", process {}", holder.pid);
    if !holder.host.is_empty() {
        text += &format!(" on host {}", printable(&holder.host));
    }
    if !holder.detail.is_empty() {
        text += &format!(" ({})", printable(&holder.detail));
    }
    text
}

/// Locks the image, waiting up to `wait` for it to come free. The lock is held until the last
/// duplicate of the descriptor is closed; a lock already held through it changes its mode.
pub fn lock(file: &HostFile, mode: LockMode, wait: Duration) -> Result<(), LockError> {
    let kind = match mode {
        LockMode::Reader => libc::F_RDLCK,
        LockMode::Writer => libc::F_WRLCK,
    };
    let deadline = Instant::now() + wait;
    let mut pause = RETRY_MIN;
    while !try_lock(file, kind, LOCK_BYTE)? {
        let now = Instant::now();
        if now >= deadline {
            return Err(LockError::Locked(locked(file, mode)));
        }
        thread::sleep(pause.min(deadline - now));
        pause = (pause * 2).min(RETRY_MAX);
    }
    Ok(())
}

/// Gives the image lock up before the descriptor is closed.
pub fn unlock(file: &HostFile) -> Result<(), FileError> {
    set_lock(file, libc::F_UNLCK, LOCK_BYTE).map_err(cannot_lock)
}

/// Who holds a lock that keeps `file` from being opened in `mode`; takes none itself. A lock held
/// through the same descriptor does not count.
pub fn conflict(file: &HostFile, mode: LockMode) -> Result<Option<Box<Locked>>, FileError> {
    let kind = match mode {
        LockMode::Reader => libc::F_RDLCK,
        LockMode::Writer => libc::F_WRLCK,
    };
    Ok(is_locked(file, kind, LOCK_BYTE)?.then(|| locked(file, mode)))
}

/// Takes QEMU's lock bytes on a raw file, so that QEMU and its tools notice who uses it, and refuses
/// if they hold it in a way that conflicts. For as long as the descriptor is open.
pub fn lock_for_qemu(file: &HostFile, mode: LockMode) -> Result<(), LockError> {
    let used: &[i64] = match mode {
        LockMode::Reader => &[QEMU_CONSISTENT_READ],
        LockMode::Writer => &[QEMU_CONSISTENT_READ, QEMU_WRITE],
    };
    let unshared = [QEMU_WRITE, QEMU_RESIZE];
    let ours = used
        .iter()
        .map(|permission| QEMU_USED + permission)
        .chain(unshared.map(|permission| QEMU_UNSHARED + permission));
    let theirs = used
        .iter()
        .map(|permission| QEMU_UNSHARED + permission)
        .chain(unshared.map(|permission| QEMU_USED + permission));
    // First take, then look: of two that start together at least one sees the other.
    for byte in ours.clone() {
        set_lock(file, libc::F_RDLCK, byte).map_err(|e| LockError::Failed(cannot_lock(e)))?;
    }
    for byte in theirs {
        if is_locked(file, libc::F_WRLCK, byte).map_err(LockError::Failed)? {
            for byte in ours {
                set_lock(file, libc::F_UNLCK, byte)
                    .map_err(|e| LockError::Failed(cannot_lock(e)))?;
            }
            return Err(LockError::Locked(refused(file, mode, owner::find(file))));
        }
    }
    Ok(())
}

/// Gives QEMU's lock bytes up before the descriptor is closed.
pub fn unlock_for_qemu(file: &HostFile) -> Result<(), FileError> {
    for base in [QEMU_USED, QEMU_UNSHARED] {
        for permission in [QEMU_CONSISTENT_READ, QEMU_WRITE, QEMU_RESIZE] {
            set_lock(file, libc::F_UNLCK, base + permission).map_err(cannot_lock)?;
        }
    }
    Ok(())
}

/// The holder record of an image, whether it means anything or not.
pub fn read_holder(file: &HostFile) -> Option<Holder> {
    let mut fixed_area = AlignedBuf::new(FIXED_AREA_BYTES, FIXED_AREA_BYTES);
    file.read_at(0, &mut fixed_area).ok()?;
    let part = |offset: u64, len: usize| {
        let start = usize::try_from(offset).ok()?;
        fixed_area.get(start..start.checked_add(len)?)
    };
    let superblock = (0..2).find_map(|slot| {
        let bytes = part(Superblock::slot_address(slot), SUPERBLOCK_SIZE)?;
        Superblock::decode(bytes, slot, None).ok()
    })?;
    Holder::decode(part(HOLDER_OFFSET, HOLDER_SIZE)?, &superblock.uuid).ok()
}

fn locked(file: &HostFile, mode: LockMode) -> Box<Locked> {
    // The record tells more, but it is the last writer's, and who stands in the way may only read.
    let record = read_holder(file);
    let holder = match owner::find(file) {
        Some(owner) if record.as_ref().is_none_or(|record| record.pid != owner.pid) => Some(owner),
        _ => record,
    };
    refused(file, mode, holder)
}

fn refused(file: &HostFile, mode: LockMode, holder: Option<Holder>) -> Box<Locked> {
    let path = file.path().to_string_lossy().escape_debug().to_string();
    Box::new(Locked { mode, path, holder })
}

fn try_lock(file: &HostFile, kind: i32, byte: i64) -> Result<bool, LockError> {
    match set_lock(file, kind, byte) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(LockError::Failed(cannot_lock(error))),
    }
}

pub(crate) fn set_lock(file: &HostFile, kind: i32, byte: i64) -> nix::Result<()> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, byte))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn is_locked(file: &HostFile, kind: i32, byte: i64) -> Result<bool, FileError> {
    let mut query = range(kind, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut query)).map_err(cannot_lock)?;
    Ok(i32::from(query.l_type) != libc::F_UNLCK)
}

fn range(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // Must be 0 for locks of an open file description.
        l_pid: 0,
    }
}

pub(crate) fn cannot_lock(error: Errno) -> FileError {
    FileError::new(
        "could not lock (the file system must support advisory locks)",
        io::Error::from(error),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::OpenMode;

    fn open(dir: &tempfile::TempDir) -> HostFile {
        HostFile::open_or_create(&dir.path().join("image"), false).expect("open")
    }

    /// P9: two writers never, a writer and a reader never, two readers may.
    #[test]
    fn p9_writers_exclude_everyone_and_readers_share() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b, c) = (open(&dir), open(&dir), open(&dir));
        lock(&a, LockMode::Writer, Duration::ZERO).expect("free");
        assert!(matches!(lock(&b, LockMode::Writer, Duration::ZERO), Err(LockError::Locked(_))));
        assert!(matches!(lock(&b, LockMode::Reader, Duration::ZERO), Err(LockError::Locked(_))));
        drop(a);
        lock(&b, LockMode::Reader, Duration::ZERO).expect("free again");
        lock(&c, LockMode::Reader, Duration::ZERO).expect("readers share");
        assert!(conflict(&c, LockMode::Writer).expect("query").is_some());
        assert!(conflict(&c, LockMode::Reader).expect("query").is_none());
        assert!(lock(&c, LockMode::Writer, Duration::ZERO).is_err());
        unlock(&b).expect("unlock");
        lock(&c, LockMode::Writer, Duration::ZERO).expect("the last reader becomes the writer");
    }

    /// P9: a duplicate of the descriptor keeps the lock, as the kernel's own reference does while it
    /// carries out writes of a dead process.
    #[test]
    fn p9_a_duplicate_keeps_the_lock() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let a = open(&dir);
        lock(&a, LockMode::Writer, Duration::ZERO).expect("free");
        let duplicate = std::os::fd::AsFd::as_fd(&a).try_clone_to_owned().expect("duplicate");
        drop(a);
        let b = open(&dir);
        assert!(lock(&b, LockMode::Writer, Duration::ZERO).is_err());
        drop(duplicate);
        lock(&b, LockMode::Writer, Duration::ZERO).expect("free");
    }

    #[test]
    fn waiting_takes_the_lock_when_it_comes_free() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b) = (open(&dir), open(&dir));
        lock(&a, LockMode::Writer, Duration::ZERO).expect("free");
        thread::scope(|scope| {
            let waiter = scope.spawn(|| lock(&b, LockMode::Writer, Duration::from_secs(60)));
            drop(a);
            waiter.join().expect("no panic").expect("locked");
        });
    }

    #[test]
    fn the_text_names_lock_and_image() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b) = (open(&dir), open(&dir));
        lock(&a, LockMode::Writer, Duration::ZERO).expect("free");
        let text = lock(&b, LockMode::Reader, Duration::ZERO).expect_err("held").to_string();
        assert!(
            text.starts_with("Failed to get shared \"write\" lock\nIs another process"),
            "{text}"
        );
    }

    #[test]
    fn qemu_bytes_exclude_a_second_writer() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (a, b) = (open(&dir), open(&dir));
        lock_for_qemu(&a, LockMode::Writer).expect("free");
        assert!(lock_for_qemu(&b, LockMode::Writer).is_err());
        assert!(lock_for_qemu(&b, LockMode::Reader).is_err());
        unlock_for_qemu(&a).expect("unlock");
        lock_for_qemu(&b, LockMode::Writer).expect("handed over");
        assert!(lock_for_qemu(&a, LockMode::Writer).is_err());
        unlock_for_qemu(&b).expect("unlock");
        drop(a);
        lock_for_qemu(&b, LockMode::Reader).expect("free");
        let c = HostFile::open(&dir.path().join("image"), OpenMode::default()).expect("open");
        lock_for_qemu(&c, LockMode::Reader).expect("readers share");
    }
}
