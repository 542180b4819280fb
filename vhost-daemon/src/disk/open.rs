//! Opens the image that the command line names.

use crate::args::{Args, Format};
use crate::disk::exd::ExdDisk;
use crate::disk::raw::RawDisk;
use crate::disk::{Disk, Router};
use crate::io::IoSetup;
use crate::queue::record::Recorder;
use exd_file::lock::{LockError, Locked, lock, lock_for_qemu};
use exd_file::{FileError, FileStorage, HostFile, LockMode, OpenMode, boot_id, hints};
use exd_image::{HolderName, OpenOptions, SECTOR};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::gethostname;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between attempts to lock.
const PAUSE: Duration = Duration::from_millis(5);
/// A process that is exiting, in the flags of /proc/PID/stat.
const PF_EXITING: u64 = 4;

/// Opens and locks the image, or only opens it for a guest that is to come by migration.
pub fn open(args: &Args, router: &Arc<Router>) -> Result<Arc<dyn Disk>, String> {
    let path = args.blk_file.display();
    let failed = |error: &dyn std::fmt::Display| format!("{path}: {error}");
    let file = open_file(args).map_err(|error| failed(&error))?;
    leave_nonblocking(&file).map_err(|error| failed(&error))?;
    if !args.read_only && hints::copies_on_write(&file) {
        log::warn!(
            "{path}: btrfs copies each block that is overwritten; images are faster in a directory that \
             'chattr +C' was applied to before they were made"
        );
    }
    let wait = Duration::from_secs(args.lock_wait);
    let lock_mode = if args.read_only { LockMode::Reader } else { LockMode::Writer };
    if let Some(trace) = &args.record_trace {
        let recorder = Recorder::create(trace);
        router.record(recorder.map_err(|error| format!("{}: {error}", trace.display()))?);
    }
    let setup = IoSetup::new(args.io_engine, &file)?;
    // The source of a migration may have it still.
    let held = !args.incoming;
    let file = Arc::new(file);
    match args.format {
        Format::Exd => {
            if held {
                patiently(wait, || lock(&file, lock_mode, Duration::ZERO))?;
            }
            let options = OpenOptions {
                read_only: args.read_only,
                holder: Some(holder(args)),
                zero_ahead: args.zero_ahead.into(),
                ..OpenOptions::default()
            };
            let disk =
                ExdDisk::open(file, options, setup, router.clone(), held, wait, args.defrag_idle());
            Ok(Arc::new(disk.map_err(|error| failed(&error))?))
        }
        Format::Raw => {
            if held {
                patiently(wait, || lock_for_qemu(&file, lock_mode))?;
            }
            let disk = RawDisk::new(file, setup, args.read_only, router.clone(), held, wait);
            Ok(Arc::new(disk.map_err(|error| failed(&error))?))
        }
    }
}

fn open_file(args: &Args) -> Result<HostFile, FileError> {
    let path = args.blk_file.display();
    let mode = OpenMode { write: !args.read_only, direct: args.cache.is_direct() };
    let file = HostFile::open(&args.blk_file, mode)?;
    if mode.direct && !file.is_direct() {
        log::warn!("{path}: the file system has no direct I/O; the host's page cache is used");
    }
    let block = u64::from(args.logical_block_size.unwrap_or(512));
    let too_small = args.format == Format::Raw && block < file.geometry().alignment;
    if too_small && hints::direct_needs_blocks(&file) {
        // The guest is to see the sectors it was installed on.
        log::warn!(
            "{path}: btrfs has no direct I/O in sectors of {block} bytes; the host's page cache is used"
        );
        return HostFile::open(&args.blk_file, OpenMode { direct: false, ..mode });
    }
    if let Some(block) = too_small_blocks(args, &file) {
        let unit = file.geometry().alignment;
        log::warn!(
            "{path}: direct I/O takes whole units of {unit} bytes here, the image has blocks of {block}; \
             the host's page cache is used ('imgtool convert -O exd -o block_size={unit}' makes an image \
             for direct I/O)"
        );
        return HostFile::open(&args.blk_file, OpenMode { direct: false, ..mode });
    }
    Ok(file)
}

/// The block size of an EXD image, if it is smaller than what direct I/O on the file can write. Other
/// processes may have the image; what cannot be read is for its opening to report.
fn too_small_blocks(args: &Args, file: &HostFile) -> Option<u64> {
    let unit = file.geometry().alignment;
    if args.format != Format::Exd || args.read_only || !file.is_direct() || unit == SECTOR {
        return None;
    }
    let buffered = HostFile::open(&args.blk_file, OpenMode { write: false, direct: false }).ok()?;
    let mut storage = FileStorage::new(buffered).ok()?;
    let block = exd_image::peek(&mut storage).ok()?.block_size;
    (block < unit).then_some(block)
}

/// Repeats an attempt to lock for as long as the holder may be a dead process whose last writes the kernel
/// still carries out (P9).
fn patiently(wait: Duration, attempt: impl Fn() -> Result<(), LockError>) -> Result<(), String> {
    let deadline = Instant::now() + wait;
    let mut told = false;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(LockError::Locked(locked)) if !is_alive(&locked) && Instant::now() < deadline => {
                if !told {
                    log::info!("waiting for the lock of the image");
                    told = true;
                }
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The holder is known, and a process of this host that is not about to end.
fn is_alive(locked: &Locked) -> bool {
    let Some(holder) = &locked.holder else { return false };
    if holder.boot_id != boot_id() {
        return false;
    }
    let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", holder.pid)) else { return false };
    // After the name, which may contain anything: state, then numbers of which the seventh is the flags.
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let mut fields = rest.split_whitespace();
    let state = fields.next().unwrap_or("X");
    let flags: u64 = fields.nth(5).and_then(|text| text.parse().ok()).unwrap_or(0);
    !matches!(state, "Z" | "X") && flags & PF_EXITING == 0
}

/// Who holds the image, for others to see.
fn holder(args: &Args) -> HolderName {
    let host = gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let detail = args.socket_path.as_ref().map(|path| path.display().to_string());
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    HolderName {
        pid: std::process::id().into(),
        host,
        program: "vhost-daemon".to_owned(),
        detail: detail.unwrap_or_default(),
        started: since.map_or(0, |since| since.as_secs()),
    }
}

/// io_uring gives up early (EAGAIN) on a descriptor with O_NONBLOCK where the file system cannot tell
/// whether it would wait.
fn leave_nonblocking(file: &HostFile) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}
