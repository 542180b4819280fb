//! Raw data through pipes, terminals and other files without positions.

use super::{Image, Piece, State};
use crate::failure::{During, Failure, Result};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

static ZEROES: [u8; 65536] = [0; 65536];

/// True for the names of standard input and output, and for files that can only be read or written
/// from front to back.
pub fn is_stream(path: &Path) -> bool {
    if path == Path::new("-") {
        return true;
    }
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_fifo() || kind.is_char_device() || kind.is_socket()
    })
}

/// Opens a stream to read a raw disk from.
pub fn source(path: &Path) -> Result<Box<dyn Read + Send>> {
    let file = match path == Path::new("-") {
        true => io::stdin().as_fd().try_clone_to_owned().map(File::from),
        false => File::open(path),
    };
    Ok(Box::new(file.during("could not open")?))
}

/// A raw image that is written from front to back, zeroes included.
pub struct StreamTarget {
    file: File,
    size: u64,
    position: u64,
}

/// Opens a stream to write a raw disk of `size` bytes to.
pub fn target(path: &Path, size: u64) -> Result<Box<dyn Image>> {
    let file = match path == Path::new("-") {
        true => io::stdout().as_fd().try_clone_to_owned().map(File::from),
        false => File::options().write(true).open(path),
    };
    Ok(Box::new(StreamTarget { file: file.during("could not open")?, size, position: 0 }))
}

impl StreamTarget {
    fn write_zeroes_to(&mut self, end: u64) -> Result<()> {
        while self.position < end {
            let count = (end - self.position).min(ZEROES.len() as u64);
            self.write_next(&ZEROES[..count as usize])?;
        }
        Ok(())
    }

    fn write_next(&mut self, data: &[u8]) -> Result<()> {
        let position = self.position;
        self.file.write_all(data).during(format_args!("could not write at offset {position}"))?;
        self.position += data.len() as u64;
        Ok(())
    }
}

impl Image for StreamTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&mut self, _offset: u64, len: u64) -> Result<Piece> {
        Ok(Piece { len, state: State::Data, physical: None, depth: 0 })
    }

    fn read(&mut self, _offset: u64, _buffer: &mut [u8]) -> Result<()> {
        Err(Failure::new("cannot read back what went into a stream"))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        assert!(offset >= self.position, "a stream is written from front to back");
        self.write_zeroes_to(offset)?;
        self.write_next(data)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes_to(offset + len)
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.size = size;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.write_zeroes_to(self.size)?;
        self.file.flush().during("could not write")
    }
}
