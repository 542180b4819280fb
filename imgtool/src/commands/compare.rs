//! `imgtool compare`.

use crate::copy::{CHUNK_BYTES, is_zero};
use crate::failure::{Context, Failure, Result};
use crate::formats::Image;
use crate::formats::open::{OpenRequest, open};
use crate::output::emit;
use crate::progress::{Channel, Progress};
use clap::Args;
use std::path::{Path, PathBuf};

const DIFFERENT: u8 = 1;
const CANNOT_OPEN: u8 = 2;
const CANNOT_MAP: u8 = 3;
const CANNOT_READ: u8 = 4;

/// The arguments of `compare`.
#[derive(Args, Debug)]
#[command(
    about = "Compare the content of two images",
    long_about = "Compare the content of two images. Exit code: 0 the same, 1 different, 2 an image \
        could not be opened, 3 its map could not be read, 4 its data could not be read.",
    after_help = "Example:\n  imgtool compare disk.qcow2 disk.exd"
)]
pub struct CompareArgs {
    /// Format of the first image; guessed if not given
    #[arg(short = 'f', long = "a-format", value_name = "FMT")]
    first_format: Option<String>,
    /// Format of the second image; guessed if not given
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<String>,
    /// Sizes and allocation must be the same too
    #[arg(short, long)]
    strict: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Open the images although another process may write to them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The first image
    #[arg(value_name = "FILENAME1")]
    first: PathBuf,
    /// The second image
    #[arg(value_name = "FILENAME2")]
    second: PathBuf,
}

/// How two images compare.
enum Verdict {
    Same,
    ContentAt(u64),
    AllocationAt(u64),
    Size,
}

/// An image, its path and a buffer.
struct Side<'a> {
    path: &'a Path,
    image: Box<dyn Image>,
    buffer: Vec<u8>,
}

/// Runs `compare`.
pub fn run(args: CompareArgs) -> Result<u8> {
    let open_side = |path: &Path, format: &Option<String>| -> Result<Box<dyn Image>> {
        let request =
            OpenRequest { format: format.as_deref(), write: false, force_share: args.force_share };
        open(path, request).map_err(|failure| failure.with_code(CANNOT_OPEN))
    };
    let side = |path, image| Side { path, image, buffer: vec![0; CHUNK_BYTES] };
    let mut first = side(&args.first, open_side(&args.first, &args.first_format)?);
    let mut second = side(&args.second, open_side(&args.second, &args.second_format)?);
    let mut progress = match args.progress && !args.quiet {
        true => Progress::new(first.image.size().max(second.image.size()), Channel::Stdout),
        false => Progress::silent(),
    };
    let sizes_differ = first.image.size() != second.image.size();
    let verdict = match sizes_differ && args.strict {
        true => Verdict::Size,
        false => compare(&mut first, &mut second, args.strict, &mut progress)?,
    };
    if matches!(verdict, Verdict::Same) {
        progress.finish();
    }
    let (text, code) = match verdict {
        Verdict::Same => ("Images are identical.".to_owned(), 0),
        Verdict::ContentAt(offset) => (format!("Content mismatch at offset {offset}!"), DIFFERENT),
        Verdict::AllocationAt(offset) => {
            (format!("Strict mode: Offset {offset} allocation mismatch!"), DIFFERENT)
        }
        Verdict::Size => ("Strict mode: Image size mismatch!".to_owned(), DIFFERENT),
    };
    if !args.quiet {
        if sizes_differ && !args.strict {
            emit("Warning: Image size mismatch!\n")?;
        }
        emit(&format!("{text}\n"))?;
    }
    Ok(code)
}

fn compare<'a>(
    first: &mut Side<'a>,
    second: &mut Side<'a>,
    strict: bool,
    progress: &mut Progress,
) -> Result<Verdict> {
    let common = first.image.size().min(second.image.size());
    let mut offset = 0;
    while offset < common {
        let a = first.piece(offset, common - offset)?;
        let b = second.piece(offset, common - offset)?;
        let len = a.1.min(b.1);
        if strict && a.0 != b.0 {
            return Ok(Verdict::AllocationAt(offset));
        }
        let len = match (a.0, b.0) {
            (true, true) => len,
            _ => {
                let len = len.min(CHUNK_BYTES as u64);
                if let Some(at) =
                    differs(first.read(offset, len, a.0)?, second.read(offset, len, b.0)?)
                {
                    return Ok(Verdict::ContentAt(offset + at as u64));
                }
                len
            }
        };
        offset += len;
        progress.advance(len);
    }
    let longer = if first.image.size() > common { first } else { second };
    rest_is_zero(longer, common, progress)
}

fn rest_is_zero(side: &mut Side<'_>, start: u64, progress: &mut Progress) -> Result<Verdict> {
    let mut offset = start;
    while offset < side.image.size() {
        let (zero, len) = side.piece(offset, side.image.size() - offset)?;
        let len = if zero { len } else { len.min(CHUNK_BYTES as u64) };
        if !zero {
            let data = side.read(offset, len, false)?;
            if !is_zero(data) {
                let at = data.iter().position(|byte| *byte != 0).unwrap_or(0);
                return Ok(Verdict::ContentAt(offset + at as u64));
            }
        }
        offset += len;
        progress.advance(len);
    }
    Ok(Verdict::Same)
}

impl Side<'_> {
    /// Whether the disk is stored as zeroes from `offset` on, and for how long.
    fn piece(&mut self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let piece = self
            .image
            .piece(offset, len)
            .map_err(|failure: Failure| failure.with_code(CANNOT_MAP))
            .about(self.path)?;
        Ok((piece.state.is_zero(), piece.len))
    }

    fn read(&mut self, offset: u64, len: u64, zero: bool) -> Result<&[u8]> {
        let part = &mut self.buffer[..len as usize];
        match zero {
            true => part.fill(0),
            false => self
                .image
                .read(offset, part)
                .map_err(|failure| failure.with_code(CANNOT_READ))
                .about(self.path)?,
        }
        Ok(part)
    }
}

fn differs(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}
