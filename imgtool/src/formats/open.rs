//! Opening existing images: probing, locking, and the file's own details.

use super::{Format, Image, exd, qcow2, raw};
use crate::failure::{Context, During, Failure, Result};
use crate::output::info::{Child, Empty, FileInfo, FormatSpecific};
use crate::size::round_up_to_sector;
use exd_file::lock::{LockError, lock, lock_for_qemu};
use exd_file::{HostFile, LockMode, OpenMode};
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenRequest<'a> {
    /// The format, or `None` to guess it.
    pub format: Option<&'a str>,
    /// For writing too.
    pub write: bool,
    /// Open it although another process may write to it (`-U`).
    pub force_share: bool,
}

/// An image file that is open and locked, its format known.
pub struct Located {
    /// The file.
    pub file: HostFile,
    /// Given or guessed.
    pub format: Format,
    /// The format was guessed.
    pub guessed: bool,
}

/// Opens and locks an image file and finds out its format.
pub fn locate(path: &Path, request: OpenRequest<'_>) -> Result<Located> {
    locate_here(path, request).about(path)
}

fn locate_here(path: &Path, request: OpenRequest<'_>) -> Result<Located> {
    let given = request.format.map(Format::parse).transpose()?;
    let mode = OpenMode { write: request.write, direct: false };
    let file = HostFile::open(path, mode).map_err(Failure::new)?;
    let format = match given {
        Some(format) => format,
        None => probe(&file)?,
    };
    if !request.force_share {
        let mode = if request.write { LockMode::Writer } else { LockMode::Reader };
        lock_image(&file, mode, format)?;
    }
    Ok(Located { file, format, guessed: given.is_none() })
}

/// Takes the locks that keep others away: ours, and QEMU's on formats that QEMU opens.
pub fn lock_image(file: &HostFile, mode: LockMode, format: Format) -> Result<()> {
    let failed = |error: LockError| Failure::new(error);
    lock(file, mode, Duration::ZERO).map_err(failed)?;
    if format != Format::Exd {
        lock_for_qemu(file, mode).map_err(failed)?;
    }
    Ok(())
}

/// Opens an image.
pub fn open(path: &Path, request: OpenRequest<'_>) -> Result<Box<dyn Image>> {
    open_located(locate(path, request)?, request.write).about(path)
}

/// Opens an image whose file is open already.
pub fn open_located(located: Located, write: bool) -> Result<Box<dyn Image>> {
    match located.format {
        Format::Exd => exd::open(located.file, write),
        Format::Raw => raw::open(located.file),
        Format::Qcow2 => qcow2::open(located.file, write),
    }
}

/// Guesses the format: EXD by either superblock, qcow2 by its magic, else raw.
pub fn probe(file: &HostFile) -> Result<Format> {
    let mut start = vec![0; 8192];
    file.read_at(0, &mut start).during("could not read at offset 0")?;
    if exd::is_exd(&start) {
        return Ok(Format::Exd);
    }
    let qcow2 = start.starts_with(&super::qcow2_header::MAGIC);
    Ok(if qcow2 { Format::Qcow2 } else { Format::Raw })
}

/// Bytes the host has allocated for the file.
pub fn actual_size(file: &HostFile) -> Result<u64> {
    let metadata = file.metadata().map_err(Failure::new)?;
    Ok(metadata.st_blocks().saturating_mul(512))
}

/// The file below an image, for `info`.
pub fn file_child(file: &HostFile, filename: &str) -> Result<Child> {
    let device = file.is_block_device();
    let len = file.len().during("could not find out the length")?;
    let info = FileInfo {
        children: Vec::new(),
        virtual_size: round_up_to_sector(len).unwrap_or(len),
        filename: filename.to_owned(),
        format: if device { "host_device" } else { "file" }.to_owned(),
        actual_size: actual_size(file)?,
        format_specific: match device {
            true => FormatSpecific::HostDevice(Empty {}),
            false => FormatSpecific::File(Empty {}),
        },
        dirty_flag: false,
    };
    Ok(Child { name: "file".to_owned(), info })
}
