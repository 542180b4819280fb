//! Finds out what offsets, lengths and addresses a host file takes.

#![allow(unsafe_code)]

use crate::aligned::AlignedBuf;
use crate::hints;
use nix::sys::uio::pread;
use std::ffi::CStr;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::linux::fs::MetadataExt;

/// The coarsest granularity that is believed; EXD places nothing at a coarser one.
const ALIGNMENT_MAX: u64 = 65536;

/// Granularity of direct I/O in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DirectAlignment {
    /// Of offsets and lengths in the file.
    pub offset: u64,
    /// Of addresses in memory.
    pub memory: u64,
}

/// The granularity of direct I/O on `file`, which was opened with O_DIRECT: from the kernel (statx)
/// where it tells, else by trying and by what is known of the file system. `None` if the file does no
/// direct I/O after all.
pub(crate) fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    match ask_kernel(file) {
        Some(DirectAlignment { offset: 0, .. }) => None,
        Some(told) => {
            Some(DirectAlignment { offset: told.offset.max(512), memory: told.memory.max(512) })
        }
        None => {
            let offset = probe(file)?.max(hints::btrfs_block(file).unwrap_or(0));
            Some(DirectAlignment { offset, memory: offset.max(4096) })
        }
    }
    .filter(|alignment| {
        let sane = |value: u64| value.is_power_of_two() && value <= ALIGNMENT_MAX;
        sane(alignment.offset) && sane(alignment.memory)
    })
}

fn ask_kernel(file: &File) -> Option<DirectAlignment> {
    let empty: &CStr = c"";
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is a C string, and `answer` is as large as the kernel
    // expects; all-zero bytes are a valid `statx`.
    let statx = unsafe {
        let result = libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        );
        if result != 0 {
            return None;
        }
        answer.assume_init()
    };
    if statx.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    Some(DirectAlignment {
        offset: statx.stx_dio_offset_align.into(),
        memory: statx.stx_dio_mem_align.into(),
    })
}

/// The smallest power of two at which a read is not refused. A read at the end of a file may succeed
/// before its alignment is looked at, so a short answer proves nothing and 4096 is the least then.
fn probe(file: &File) -> Option<u64> {
    let mut buffer = AlignedBuf::new(ALIGNMENT_MAX as usize, ALIGNMENT_MAX as usize);
    let mut alignment = 512;
    while alignment <= ALIGNMENT_MAX {
        let window = buffer.get_mut(..alignment as usize)?;
        match pread(file, window, alignment as libc::off_t) {
            Ok(count) if count as u64 == alignment => return Some(alignment),
            Ok(_) => return Some(alignment.max(4096)),
            Err(_) => alignment *= 2,
        }
    }
    None
}

/// The allocation unit of the host in bytes: a power of two from 512 to 65536.
pub(crate) fn host_block(metadata: &fs::Metadata, alignment: u64) -> u64 {
    let block = match metadata.st_blksize() {
        size if size.is_power_of_two() => size,
        _ => 4096,
    };
    block.clamp(alignment.max(512), ALIGNMENT_MAX.max(alignment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_a_buffered_file_finds_the_smallest_unit() {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(1 << 20).expect("grow");
        assert_eq!(probe(&file), Some(512));
    }

    #[test]
    fn probing_an_empty_file_is_cautious() {
        let file = tempfile::tempfile().expect("temporary file");
        assert_eq!(probe(&file), Some(4096));
    }
}
