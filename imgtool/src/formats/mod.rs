//! Image formats behind one face.

pub mod exd;
pub mod exd_dump;
pub mod open;
pub mod qcow2;
pub mod qcow2_header;
pub mod raw;
pub mod stream;

use crate::failure::{Failure, Result};
use crate::options::FormatOptions;
use exd_file::HostFile;

/// A format imgtool reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// EXD.
    Exd,
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name used on the command line and in output.
    pub fn name(self) -> &'static str {
        match self {
            Format::Exd => "exd",
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format of that name.
    pub fn parse(name: &str) -> Result<Format> {
        match name {
            "exd" => Ok(Format::Exd),
            "raw" | "file" | "host_device" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(Failure::new(format_args!(
                "Unknown file format '{}'; imgtool knows exd, raw and qcow2",
                name.escape_debug()
            ))),
        }
    }
}

/// How a range of the virtual disk is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Not at all; reads as zeroes.
    Hole,
    /// Space without data; reads as zeroes.
    Unwritten,
    /// Known to be zeroes, without data.
    Zero,
    /// As data.
    Data,
    /// As data in another form.
    Compressed,
}

impl State {
    /// The range reads as zeroes.
    pub fn is_zero(self) -> bool {
        matches!(self, State::Hole | State::Unwritten | State::Zero)
    }
}

/// A range of the virtual disk that is stored in one way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Bytes; at least 1.
    pub len: u64,
    /// How it is stored.
    pub state: State,
    /// Where it lies in the image file, in bytes.
    pub physical: Option<u64>,
    /// In which image of the backing chain; 0 is the image itself.
    pub depth: u32,
}

/// An open image. Offsets and lengths are bytes of the virtual disk.
pub trait Image: Send {
    /// Size of the virtual disk.
    fn size(&self) -> u64;

    /// How the disk is stored from `offset` on, for at most `len` bytes; both inside the disk.
    fn piece(&mut self, offset: u64, len: u64) -> Result<Piece>;

    /// Reads all of `buffer`.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Writes all of `data`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()>;

    /// Makes the range read as zeroes, giving its space back where that is possible.
    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()>;

    /// Changes the size of the virtual disk.
    fn resize(&mut self, size: u64) -> Result<()>;

    /// Everything written is durable and the image closed cleanly. An image that is dropped instead
    /// counts as interrupted.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Makes a new image in `file`, whose content does not matter, and opens it for writing.
pub fn create(
    format: Format,
    file: HostFile,
    size: u64,
    options: &FormatOptions,
) -> Result<Box<dyn Image>> {
    match format {
        Format::Exd => exd::create(file, size, options),
        Format::Raw => raw::create(file, size, options),
        Format::Qcow2 => qcow2::create(file, size, options),
    }
}
