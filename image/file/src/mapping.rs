//! A file mapped for writing.

#![allow(unsafe_code)]

use memmap2::{MmapMut, MmapOptions};
use std::fs::File;
use std::io;

/// Maps the first `len` bytes of `file`, shared and writable, with its pages already present.
///
/// The file must have been created by this process under a name nobody else writes to, and its
/// space must be reserved: both hold for the completion log, whose caller this is.
pub(crate) fn map_shared(file: &File, len: usize) -> io::Result<MmapMut> {
    // SAFETY: the file was just created by us (O_EXCL, mode 0600, in a directory of ours) and is at
    // least `len` bytes long, so nothing else changes or cuts it while it is mapped. A process of
    // the same user that cut it anyway would cause SIGBUS, not undefined behaviour in our memory: we
    // only ever store through the mapping and never hand out references to it.
    unsafe { MmapOptions::new().len(len).populate().map_mut(file) }
}
