//! What the guest that uses an image believes about its cache, for the process that serves it next.
//!
//! A guest that migrates keeps its belief and tells nobody: one that believes in a write-through cache
//! sends no flushes, and whoever serves it with a volatile cache loses what it relies on. So whoever serves
//! a guest locks one of two bytes of the file, for as long as its own end of the guest is there, and whoever
//! takes a guest over looks. Locks need no cleaning up, and say the same of a raw file, of a device and of
//! an image.

use crate::error::FileError;
use crate::file::HostFile;
use crate::lock::{cannot_lock, is_locked, set_lock};

/// Read-locked: a guest believes that what it writes may be lost until it flushes.
const BELIEVES_VOLATILE: i64 = 300;
/// Read-locked: a guest may believe that what it wrote is durable.
const MAY_BELIEVE_DURABLE: i64 = 301;

/// Tells others what the guest believes: whether there is a volatile cache. `None`: there is no guest.
pub fn tell(file: &HostFile, volatile: Option<bool>) -> Result<(), FileError> {
    // First what is right now: between the two, both say what is safe.
    let (on, off) = match volatile {
        Some(true) => (Some(BELIEVES_VOLATILE), &[MAY_BELIEVE_DURABLE][..]),
        Some(false) => (Some(MAY_BELIEVE_DURABLE), &[BELIEVES_VOLATILE][..]),
        None => (None, &[BELIEVES_VOLATILE, MAY_BELIEVE_DURABLE][..]),
    };
    if let Some(byte) = on {
        set_lock(file, libc::F_RDLCK, byte).map_err(cannot_lock)?;
    }
    off.iter().try_for_each(|byte| set_lock(file, libc::F_UNLCK, *byte).map_err(cannot_lock))
}

/// What others tell: true only if a guest is known to believe in a volatile cache, and none may believe
/// otherwise. `None`: nobody knows of a guest. What this descriptor tells itself does not count.
pub fn told(file: &HostFile) -> Result<Option<bool>, FileError> {
    if is_locked(file, libc::F_WRLCK, MAY_BELIEVE_DURABLE)? {
        return Ok(Some(false));
    }
    Ok(is_locked(file, libc::F_WRLCK, BELIEVES_VOLATILE)?.then_some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_doubtful_guest_counts() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let open = || HostFile::open_or_create(&dir.path().join("image"), false).expect("open");
        let (source, other, target) = (open(), open(), open());
        assert_eq!(told(&target).expect("query"), None);
        tell(&target, Some(true)).expect("told");
        assert_eq!(told(&target).expect("query"), None, "its own");
        assert_eq!(told(&source).expect("query"), Some(true));
        tell(&source, Some(true)).expect("told");
        tell(&other, Some(false)).expect("told");
        assert_eq!(told(&target).expect("query"), Some(false));
        tell(&other, Some(true)).expect("told");
        assert_eq!(told(&target).expect("query"), Some(true));
        tell(&other, None).expect("told");
        drop(source);
        assert_eq!(told(&target).expect("query"), None);
    }
}
