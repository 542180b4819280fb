//! What a host file system does that costs an image more than it need, or does not tell.

#![allow(unsafe_code)]

use crate::file::HostFile;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use std::os::fd::{AsFd, AsRawFd};

/// FS_NOCOW_FL of <linux/fs.h>: what `chattr +C` sets.
const NOCOW: libc::c_long = 0x0080_0000;

nix::ioctl_read!(
    /// FS_IOC_GETFLAGS: the attributes that `lsattr` shows.
    get_flags,
    b'f',
    1,
    libc::c_long
);

/// The host copies each block when it is overwritten, and checksums it: btrfs, unless the file has the
/// attribute that `chattr +C` gives to new files of a directory. An overwrite then costs the host an
/// allocation and several writes of metadata, and the file falls into pieces.
pub fn copies_on_write(file: &HostFile) -> bool {
    if btrfs_block(file).is_none() {
        return false;
    }
    let mut flags = 0;
    // SAFETY: the descriptor is open and `flags` is the integer the kernel writes to (it writes an int
    // into the low bytes of a zeroed long; the rest stays zero).
    let asked = unsafe { get_flags(file.as_raw_fd(), &mut flags) };
    asked.is_ok() && flags & NOCOW == 0
}

/// The block size of the file's btrfs, if it lies on one. Direct I/O that is not made of whole blocks goes
/// through the page cache there, unasked. Where that meets true direct I/O under way the kernel fails the
/// next sync: "Page cache invalidation failure on direct I/O".
pub(crate) fn btrfs_block(file: impl AsFd) -> Option<u64> {
    let fs = fstatfs(file).ok()?;
    let is_btrfs = fs.filesystem_type() == BTRFS_SUPER_MAGIC;
    is_btrfs.then(|| u64::try_from(fs.block_size()).unwrap_or(4096))
}

/// Direct I/O on the file takes whole blocks of btrfs only.
pub fn direct_needs_blocks(file: &HostFile) -> bool {
    file.is_direct() && btrfs_block(file).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_on_any_file_system() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = HostFile::open_or_create(&dir.path().join("f"), false).expect("create");
        assert!(btrfs_block(&file).is_some() || !copies_on_write(&file));
    }
}
