//! Images made and examined without any of the programs.

use exd_file::lock::lock;
use exd_file::{FileStorage, HostFile, LockMode, OpenMode};
use exd_image::check::{self, Report};
use exd_image::{CreateOptions, OpenOptions, blocking};
use std::path::Path;
use std::time::Duration;

/// How long the kernel may take to land the writes of a dead process.
const LANDING: Duration = Duration::from_secs(300);

/// Makes an image, in blocks of 4 KiB: unaligned writes have blocks in part and share them.
pub fn create(path: &Path, virtual_size: u64) {
    create_in_blocks(path, virtual_size, BLOCK_SIZES[1]);
}

/// imgtool's default, and a size with which unaligned writes share blocks.
pub const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// Makes an image in blocks of so many bytes.
pub fn create_in_blocks(path: &Path, virtual_size: u64, block_size: u32) {
    create_with(path, &CreateOptions { virtual_size, block_size, ..CreateOptions::default() });
}

/// Makes an image of any kind.
pub fn create_with(path: &Path, options: &CreateOptions) {
    let file = HostFile::open_or_create(path, false).expect("create");
    lock(&file, LockMode::Writer, Duration::ZERO).expect("lock");
    let mut storage = FileStorage::new(file).expect("storage");
    let uuid = std::array::from_fn(|_| fastrand::u8(..));
    exd_image::create(&mut storage, &CreateOptions { uuid, ..options.clone() }).expect("create");
}

fn storage(path: &Path, write: bool) -> FileStorage {
    let file = HostFile::open(path, OpenMode { write, direct: false }).expect("open");
    let mode = if write { LockMode::Writer } else { LockMode::Reader };
    lock(&file, mode, LANDING).expect("lock");
    FileStorage::new(file).expect("storage")
}

/// Examines an image; writes nothing.
pub fn check(path: &Path) -> Report {
    check::check(&mut storage(path, false)).expect("examined")
}

/// Opens an image as imgtool does.
pub fn open(path: &Path, read_only: bool) -> blocking::Image<FileStorage> {
    let options = OpenOptions { read_only, completion_log: false, ..OpenOptions::default() };
    blocking::Image::open(storage(path, !read_only), options).expect("open")
}

/// P4: no corruption, no leak.
pub fn assert_clean(path: &Path) {
    let report = check(path);
    assert!(report.is_clean(), "check finds {report:?}");
}
