//! A file or block device of the host: opening, placing, shrinking, all by position.

use crate::error::FileError;
use crate::geometry;
use exd_image::Geometry;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{pread, preadv, pwrite, pwritev};
use nix::unistd::{Whence, lseek};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Most pieces in one vectored call (the kernel's UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenMode {
    /// For writing too.
    pub write: bool,
    /// Past the page cache (O_DIRECT), where the host can; see [`HostFile::is_direct`].
    pub direct: bool,
}

/// An open regular file or block device. All calls are positional and take `&self`: any number of
/// threads may use it at once.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    direct: bool,
    memory_alignment: u64,
    identity: [u8; 16],
}

impl HostFile {
    /// Opens an existing file or block device.
    pub fn open(path: &Path, mode: OpenMode) -> Result<HostFile, FileError> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode.write);
        Self::open_with(path, options, mode)
    }

    /// Opens for writing, creating the file (mode 0644 less the umask) where it does not exist. What an
    /// existing file holds stays: whoever means to replace it takes the lock first and then calls
    /// [`HostFile::discard_content`], so that an image in use is never cut.
    pub fn open_or_create(path: &Path, direct: bool) -> Result<HostFile, FileError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o644);
        Self::open_with(path, options, OpenMode { write: true, direct })
    }

    /// Creates a file that must not exist yet.
    pub fn create_new(path: &Path, direct: bool) -> Result<HostFile, FileError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o644);
        Self::open_with(path, options, OpenMode { write: true, direct })
    }

    fn open_with(
        path: &Path,
        mut options: OpenOptions,
        mode: OpenMode,
    ) -> Result<HostFile, FileError> {
        // O_NONBLOCK keeps the opening of a FIFO from hanging; it means nothing to files and devices.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let failed = |error| FileError::new("could not open", error);
        if mode.direct {
            match options.clone().custom_flags(flags | libc::O_DIRECT).open(path) {
                Ok(file) => return Self::from_file(file, path, true),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(failed(error)),
            }
            // A file that O_EXCL just made may exist although O_DIRECT was then refused.
            options.create_new(false);
        }
        let file = options.custom_flags(flags).open(path).map_err(failed)?;
        Self::from_file(file, path, false)
    }

    /// Takes over a file that is open already; `direct` tells whether it was opened with O_DIRECT.
    pub fn from_file(file: File, path: &Path, direct: bool) -> Result<HostFile, FileError> {
        let metadata = file.metadata().map_err(|e| FileError::new("could not stat", e))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(FileError::refused(
                io::ErrorKind::InvalidInput,
                "not a regular file or block device",
            ));
        }
        let fixed_length = kind.is_block_device();
        let (file, direct, offset, memory) = match direct.then(|| geometry::direct_alignment(&file))
        {
            Some(Some(found)) => (file, true, found.offset, found.memory),
            Some(None) => (Self::leave_direct(file)?, false, 512, 1),
            None => (file, false, 512, 1),
        };
        let geometry = Geometry {
            alignment: offset,
            host_block: geometry::host_block(&metadata, offset),
            fixed_length,
        };
        Ok(HostFile {
            identity: identity_of(&metadata),
            file,
            path: path.to_owned(),
            geometry,
            direct,
            memory_alignment: memory,
        })
    }

    /// Takes O_DIRECT off a descriptor of a file that accepts the flag but not the I/O.
    fn leave_direct(file: File) -> Result<File, FileError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let failed = |e: Errno| FileError::new("could not leave direct I/O", e);
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_DIRECT)).map_err(failed)?;
        Ok(file)
    }

    /// A second descriptor of the same open file: it holds the same locks, and keeps them.
    pub fn duplicate(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the image lies.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// I/O goes past the page cache: offsets and lengths must be multiples of
    /// [`Geometry::alignment`], addresses of [`HostFile::memory_alignment`].
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The unit of direct I/O on this file in bytes, although it may be open for the page cache; 512 if
    /// there is no direct I/O. An empty file may not tell: the kernel may have to be asked by reading.
    pub fn direct_unit(&self) -> u64 {
        if self.direct {
            return self.geometry.alignment;
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let file = HostFile::open(&path, OpenMode { write: false, direct: true });
        file.map_or(512, |file| file.geometry.alignment)
    }

    /// Required alignment of buffers in memory, in bytes.
    pub fn memory_alignment(&self) -> u64 {
        self.memory_alignment
    }

    /// It is a block device: its length is fixed and its content not known to be zero.
    pub fn is_block_device(&self) -> bool {
        self.geometry.fixed_length
    }

    /// Device and inode number, 8 bytes each, little-endian. A block device is the device it is, not
    /// the file system node that names it.
    pub fn identity(&self) -> [u8; 16] {
        self.identity
    }

    /// Metadata of the file.
    pub fn metadata(&self) -> Result<fs::Metadata, FileError> {
        self.file.metadata().map_err(|e| FileError::new("could not stat", e))
    }

    /// Current length in bytes.
    pub fn len(&self) -> io::Result<u64> {
        if self.geometry.fixed_length {
            let end = retry(|| lseek(&self.file, 0, Whence::SeekEnd))?;
            return u64::try_from(end).map_err(|_| Errno::EOVERFLOW.into());
        }
        Ok(self.file.metadata()?.len())
    }

    /// True for a file of no bytes.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads at `offset`; what lies past the end of the file reads as zeroes.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let position = position(offset, done)?;
            match retry(|| pread(&self.file, rest, position))? {
                0 => {
                    rest.fill(0);
                    return Ok(());
                }
                count => done += count,
            }
            if self.direct && !done.is_multiple_of(self.geometry.alignment as usize) {
                // The end of a file whose length is no multiple of the unit of direct I/O.
                if let Some(rest) = buffer.get_mut(done..) {
                    rest.fill(0);
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads at `offset` into several buffers; what lies past the end of the file reads as zeroes.
    pub fn read_vectored_at(&self, offset: u64, buffers: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        // Filled one after another when short: rare enough not to be worth more.
        let whole: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        let start = position(offset, 0)?;
        if buffers.len() <= PIECES_MAX && retry(|| preadv(&self.file, buffers, start))? == whole {
            return Ok(());
        }
        let mut done = 0;
        for buffer in buffers {
            self.read_at(position(offset, done)? as u64, buffer)?;
            done += buffer.len();
        }
        Ok(())
    }

    /// Writes all of `data` at `offset`.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let position = position(offset, done)?;
            match retry(|| pwrite(&self.file, rest, position))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Writes all pieces one after another at `offset`.
    pub fn write_vectored_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut rest = pieces;
        let mut done = 0;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let position = position(offset, done)?;
            let batch = &rest[..rest.len().min(PIECES_MAX)];
            match retry(|| pwritev(&self.file, batch, position))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    done += count;
                    IoSlice::advance_slices(&mut rest, count);
                }
            }
        }
        Ok(())
    }

    /// Gives the range back to the host; it reads as zeroes afterwards. On a block device it is
    /// zeroed by the device, where the device can, and fails with EOPNOTSUPP where it cannot.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, offset, len)
    }

    /// Makes the range read as zeroes without giving its space back, without writing where the host
    /// can.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(mode, offset, len)
    }

    /// Reserves space for the range; neither the content nor the length of the file changes. A block
    /// device has its space.
    pub fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.geometry.fixed_length {
            return Ok(());
        }
        self.fallocate(FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let len = libc::off_t::try_from(len).map_err(|_| Errno::EFBIG)?;
        let offset = position(offset, 0)?;
        Ok(retry(|| fallocate(&self.file, mode, offset, len))?)
    }

    /// Sets the length. EOPNOTSUPP on a block device.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        if self.geometry.fixed_length {
            return Err(Errno::EOPNOTSUPP.into());
        }
        self.file.set_len(len)
    }

    /// Makes what was written, punched, allocated and resized durable (fdatasync).
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Throws the content of a regular file away (length 0); a block device keeps its content.
    pub fn discard_content(&self) -> io::Result<()> {
        if self.geometry.fixed_length { Ok(()) } else { self.file.set_len(0) }
    }

    /// The first range at or after `offset` that holds data on the host; `None` when no data follows.
    /// Where the host cannot tell, all is data.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        if self.geometry.fixed_length {
            return Ok(Some(offset..len));
        }
        let from = position(offset, 0)?;
        let start = match retry(|| lseek(&self.file, from, Whence::SeekData)) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(offset..len)),
            Err(error) => return Err(error.into()),
        };
        let end = match retry(|| lseek(&self.file, start, Whence::SeekHole)) {
            Ok(end) => end as u64,
            // Cut by somebody meanwhile.
            Err(Errno::ENXIO) => len,
            Err(error) => return Err(error.into()),
        };
        let start = start as u64;
        Ok((start < end).then_some(start..end))
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Identity of this boot of the host, from /proc/sys/kernel/random/boot_id; zero where there is none.
pub fn boot_id() -> [u8; 16] {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()
        .and_then(|text| parse_uuid(text.trim()))
        .unwrap_or([0; 16])
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut digits = text.chars().filter(|c| *c != '-').map(|c| c.to_digit(16));
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        let (high, low) = (digits.next()??, digits.next()??);
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    digits.next().is_none().then_some(uuid)
}

fn identity_of(metadata: &fs::Metadata) -> [u8; 16] {
    let (device, inode) = if metadata.file_type().is_block_device() {
        (metadata.st_rdev(), 0)
    } else {
        (metadata.st_dev(), metadata.st_ino())
    };
    let mut identity = [0; 16];
    identity[..8].copy_from_slice(&device.to_le_bytes());
    identity[8..].copy_from_slice(&inode.to_le_bytes());
    identity
}

/// `offset + done` as the kernel's signed offset.
fn position(offset: u64, done: usize) -> io::Result<libc::off_t> {
    offset
        .checked_add(done as u64)
        .and_then(|sum| libc::off_t::try_from(sum).ok())
        .ok_or_else(|| Errno::EOVERFLOW.into())
}

/// Repeats a call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::AlignedBuf;

    fn scratch(direct: bool) -> (tempfile::TempDir, HostFile) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = HostFile::open_or_create(&dir.path().join("f"), direct).expect("create");
        (dir, file)
    }

    #[test]
    fn what_lies_past_the_end_reads_as_zeroes() {
        let (_dir, file) = scratch(false);
        file.write_at(0, &[7; 700]).expect("write");
        let mut buffer = [1; 1024];
        file.read_at(512, &mut buffer).expect("read");
        assert!(buffer[..188].iter().all(|b| *b == 7));
        assert!(buffer[188..].iter().all(|b| *b == 0));
    }

    #[test]
    fn direct_reads_end_at_an_odd_length() {
        let (_dir, file) = scratch(true);
        if !file.is_direct() {
            return;
        }
        let unit = file.geometry().alignment as usize;
        let memory = file.memory_alignment() as usize;
        let mut data = AlignedBuf::new(unit * 2, memory);
        data.fill(9);
        file.write_at(0, &data).expect("write");
        file.set_len(unit as u64 + 100).expect("cut");
        let mut back = AlignedBuf::new(unit * 4, memory);
        back.fill(1);
        file.read_at(0, &mut back).expect("read");
        assert!(back[..unit + 100].iter().all(|b| *b == 9));
        assert!(back[unit + 100..].iter().all(|b| *b == 0));
    }

    #[test]
    fn vectored_writes_and_reads_of_many_pieces() {
        let (_dir, file) = scratch(false);
        let pieces: Vec<Vec<u8>> = (0..3000u32).map(|i| vec![i as u8; 3]).collect();
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|p| IoSlice::new(p)).collect();
        file.write_vectored_at(5, &mut slices).expect("write");
        let mut back = vec![0; 9000];
        file.read_at(5, &mut back).expect("read");
        assert_eq!(back, pieces.concat());
        let (mut a, mut b) = (vec![0; 4000], vec![1; 6000]);
        let mut buffers = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
        file.read_vectored_at(5, &mut buffers).expect("read");
        assert_eq!(a, pieces.concat()[..4000]);
        assert_eq!(b[..5000], pieces.concat()[4000..]);
        assert!(b[5000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn holes_punches_and_allocation() {
        let (_dir, file) = scratch(false);
        file.set_len(1 << 20).expect("grow");
        assert_eq!(file.next_data(0).expect("seek"), None);
        file.write_at(65536, &[1; 8192]).expect("write");
        assert_eq!(file.next_data(0).expect("seek"), Some(65536..73728));
        assert_eq!(file.next_data(70000).expect("seek"), Some(70000..73728));
        assert_eq!(file.next_data(1 << 20).expect("seek"), None);
        file.punch(65536, 8192).expect("punch");
        let mut back = [1; 8192];
        file.read_at(65536, &mut back).expect("read");
        assert_eq!(back, [0; 8192]);
        file.allocate(1 << 20, 65536).expect("allocate");
        assert_eq!(file.len().expect("length"), 1 << 20);
    }

    #[test]
    fn opening_for_writing_keeps_what_is_there() {
        let (dir, file) = scratch(false);
        file.write_at(0, b"keep").expect("write");
        let again = HostFile::open_or_create(&dir.path().join("f"), false).expect("open");
        assert_eq!(again.len().expect("length"), 4);
        assert_eq!(again.identity(), file.identity());
        again.discard_content().expect("cut");
        assert!(file.is_empty().expect("length"));
    }

    #[test]
    fn directories_and_devices_without_position_are_refused() {
        assert!(HostFile::open(Path::new("/dev/null"), OpenMode::default()).is_err());
        assert!(HostFile::open(Path::new("/"), OpenMode::default()).is_err());
    }

    #[test]
    fn boot_id_is_read() {
        assert_eq!(parse_uuid("00000000-0000-0000-0000-0000000000ff").map(|u| u[15]), Some(255));
        assert_eq!(parse_uuid("xyz"), None);
        assert_ne!(boot_id(), [0; 16]);
    }
}
