//! Which process of this host holds locks on a file. Nobody can be asked (the owner of an open file
//! description's lock is -1 in `/proc/locks`), but of each descriptor the kernel shows the locks.

use crate::file::{HostFile, boot_id};
use exd_format::Holder;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

/// Another process with locks on the file, if there is one that we may look at. Only root may look at
/// another user's.
pub fn find(file: &HostFile) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let identity = (metadata.st_dev(), metadata.st_ino());
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        let other = pid != std::process::id() && has_locked(&process.path(), identity)?;
        other.then(|| describe(&process.path(), pid))
    })
}

/// The process has locks on the file with these device and inode numbers.
fn has_locked(process: &Path, identity: (u64, u64)) -> Option<bool> {
    let descriptors = fs::read_dir(process.join("fd")).ok()?;
    Some(descriptors.filter_map(Result::ok).any(|descriptor| {
        let is_same = fs::metadata(descriptor.path())
            .is_ok_and(|metadata| (metadata.st_dev(), metadata.st_ino()) == identity);
        is_same
            && fs::read_to_string(process.join("fdinfo").join(descriptor.file_name()))
                .is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    }))
}

fn describe(process: &Path, pid: u32) -> Holder {
    let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Holder {
        epoch: 0,
        uuid: [0; 16],
        pid: pid.into(),
        started: 0,
        boot_id: boot_id(),
        host: String::new(),
        program: program.trim_end().to_owned(),
        detail: String::new(),
    }
}
