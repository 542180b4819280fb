//! Raw images: files and block devices that hold the bytes of the disk.

use super::{Image, Piece, State};
use crate::failure::{During, Failure, Result};
use crate::options::{FormatOptions, Preallocation};
use crate::size::round_up_to_sector;
use exd_file::HostFile;
use nix::errno::Errno;
use std::io;

/// What is kept back from a device until all the rest is there: partition tables and the magic of
/// every common image format and file system lie in it.
const WITHHELD_BYTES: u64 = 65536;
const ZEROES_BYTES: usize = 1 << 20;

/// A raw image.
pub struct RawImage {
    file: HostFile,
    size: u64,
    /// The start of a device that is being filled.
    withheld: Option<Vec<u8>>,
}

/// Opens an existing raw image.
pub fn open(file: HostFile) -> Result<Box<dyn Image>> {
    let len = file.len().during("could not find out the length")?;
    let size = round_up_to_sector(len).ok_or_else(|| Failure::new("the file is too long"))?;
    Ok(Box::new(RawImage { file, size, withheld: None }))
}

/// Opens an existing block device to fill it: it is marked unfinished (its start is zero) until
/// [`Image::finish`].
pub fn open_unfinished(file: HostFile) -> Result<Box<dyn Image>> {
    let size = file.len().during("could not find out the length")?;
    let withheld = vec![0; size.min(WITHHELD_BYTES) as usize];
    file.write_at(0, &withheld).during("could not mark the device unfinished")?;
    file.sync().during("could not mark the device unfinished")?;
    Ok(Box::new(RawImage { file, size, withheld: Some(withheld) }))
}

/// Makes a raw image.
pub fn create(file: HostFile, size: u64, options: &FormatOptions) -> Result<Box<dyn Image>> {
    if file.is_block_device() {
        let mut image = open_unfinished(file)?;
        if image.size() < size {
            return Err(Failure::new(format_args!(
                "the device has {} bytes, {size} are needed",
                image.size()
            )));
        }
        if options.preallocation == Preallocation::Full {
            image.write_zeroes(0, size)?;
        }
        return Ok(image);
    }
    file.set_len(size).during(format_args!("could not set the length to {size}"))?;
    let image = RawImage { file, size, withheld: None };
    image.preallocate(0, size, options.preallocation)?;
    Ok(Box::new(image))
}

impl RawImage {
    fn preallocate(&self, from: u64, to: u64, mode: Preallocation) -> Result<()> {
        match mode {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => self
                .file
                .allocate(from, to - from)
                .during(format_args!("could not allocate {} bytes", to - from)),
            Preallocation::Full => self.write_zero_bytes(from, to - from),
        }
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> Result<()> {
        let zeroes = vec![0; (len as usize).min(ZEROES_BYTES)];
        while len > 0 {
            let count = len.min(zeroes.len() as u64);
            self.write_file(offset, &zeroes[..count as usize])?;
            offset += count;
            len -= count;
        }
        Ok(())
    }

    fn write_file(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_at(offset, data).during(format_args!("could not write at offset {offset}"))
    }

    /// Zeroes without writing them, where the host can.
    fn zero_file(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let cannot = |error: &io::Error| {
            matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
        };
        let done = match self.file.is_block_device() {
            true => self.file.zero(offset, len),
            false => self.file.punch(offset, len),
        };
        match done {
            Err(error) if cannot(&error) => self.write_zero_bytes(offset, len),
            other => other.during(format_args!("could not zero at offset {offset}")),
        }
    }

    /// How much of a range at `offset` belongs to the withheld start.
    fn withheld_part(&self, offset: u64, len: u64) -> u64 {
        let held = self.withheld.as_ref().map_or(0, Vec::len) as u64;
        held.saturating_sub(offset).min(len)
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&mut self, offset: u64, len: u64) -> Result<Piece> {
        let data = self
            .file
            .next_data(offset)
            .during(format_args!("could not look for data at offset {offset}"))?;
        let (state, found) = match data {
            None => (State::Unwritten, len),
            Some(range) if range.start > offset => (State::Unwritten, range.start - offset),
            // The last sector of a file of odd length is whole to the guest.
            Some(range) => (State::Data, range.end.next_multiple_of(512) - offset),
        };
        Ok(Piece { len: found.min(len), state, physical: Some(offset), depth: 0 })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file
            .read_at(offset, buffer)
            .during(format_args!("could not read at offset {offset}"))?;
        let held = self.withheld_part(offset, buffer.len() as u64) as usize;
        if let (Some(withheld), Some(start)) = (&self.withheld, buffer.get_mut(..held)) {
            let from = offset as usize;
            start.copy_from_slice(&withheld[from..from + held]);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let held = self.withheld_part(offset, data.len() as u64) as usize;
        let (start, rest) = data.split_at(held);
        if let (Some(withheld), false) = (&mut self.withheld, start.is_empty()) {
            let from = offset as usize;
            withheld[from..from + held].copy_from_slice(start);
        }
        if rest.is_empty() { Ok(()) } else { self.write_file(offset + held as u64, rest) }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        let held = self.withheld_part(offset, len);
        if let (Some(withheld), 1..) = (&mut self.withheld, held) {
            withheld[offset as usize..(offset + held) as usize].fill(0);
        }
        self.zero_file(offset + held, len - held)
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.file.set_len(size).map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Failure::new("Cannot resize a block device"),
            _ => {
                let error = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                Failure::new(format_args!("could not set the length to {size}: {}", error.desc()))
            }
        })?;
        self.size = size;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.file.sync().during("could not sync")?;
        if let Some(start) = self.withheld.take() {
            self.write_file(0, &start)?;
            self.file.sync().during("could not sync")?;
        }
        Ok(())
    }
}

/// Reserves space for a part of an existing raw file; for `resize --preallocation`.
pub fn preallocate(file: HostFile, from: u64, to: u64, mode: Preallocation) -> Result<()> {
    let image = RawImage { file, size: to, withheld: None };
    image.preallocate(from, to, mode)
}
