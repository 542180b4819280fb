//! Opens the image that the command line names.

use crate::args::{Args, Format};
use crate::disk::{Disk, Router};
use crate::raw::RawDisk;
use exd_file::lock::lock_for_qemu;
use exd_file::{HostFile, LockMode, OpenMode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::sync::Arc;

/// Opens and locks the image.
pub fn open(args: &Args, router: &Arc<Router>) -> Result<Arc<dyn Disk>, String> {
    let path = args.blk_file.display();
    let failed = |error: &dyn std::fmt::Display| format!("{path}: {error}");
    let mode = OpenMode { write: !args.read_only, direct: args.cache.is_direct() };
    let file = HostFile::open(&args.blk_file, mode).map_err(|error| failed(&error))?;
    leave_nonblocking(&file).map_err(|error| failed(&error))?;
    if mode.direct && !file.is_direct() {
        log::warn!("{path}: the file system has no direct I/O; the host's page cache is used");
    }
    let lock = if args.read_only { LockMode::Reader } else { LockMode::Writer };
    match args.format {
        Format::Exd => {
            let _ = router;
            Err("not yet".to_owned())
        }
        Format::Raw => {
            lock_for_qemu(&file, lock).map_err(|error| error.to_string())?;
            let disk = RawDisk::new(Arc::new(file), args.read_only);
            Ok(Arc::new(disk.map_err(|error| failed(&error))?))
        }
    }
}

/// io_uring gives up early (EAGAIN) on a descriptor with O_NONBLOCK where the file system cannot tell
/// whether it would wait.
fn leave_nonblocking(file: &HostFile) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}
