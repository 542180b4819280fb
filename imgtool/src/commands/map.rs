//! `imgtool map`.

use crate::failure::{Context, Result};
use crate::formats::open::{OpenRequest, open};
use crate::formats::{Image, Piece, State};
use crate::output::map::{MapEntry, json, push, text};
use crate::output::{OutputFormat, emit};
use crate::size::size_value;
use clap::Args;
use std::path::PathBuf;

/// The arguments of `map`.
#[derive(Args, Debug)]
#[command(
    about = "Show where the data of an image lies",
    long_about = "Show where the data of an image lies. The text form lists data only; JSON lists \
        every range: an EXD extent that is allocated but unwritten reads as zeroes and has an offset.",
    after_help = "Examples:\n  imgtool map disk.exd\n  imgtool map --output=json --start-offset=1G \
        --max-length=64M disk.exd"
)]
pub struct MapArgs {
    /// Format of the image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to print
    #[arg(long, value_enum, value_name = "human|json", default_value_t)]
    output: OutputFormat,
    /// First byte to show
    #[arg(short, long, value_name = "OFFSET", value_parser = size_value, default_value = "0")]
    start_offset: u64,
    /// Number of bytes to show
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = size_value)]
    max_length: Option<u64>,
    /// Open the image although another process may write to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
}

/// Runs `map`.
pub fn run(args: MapArgs) -> Result<u8> {
    let request =
        OpenRequest { format: args.format.as_deref(), write: false, force_share: args.force_share };
    let mut image = open(&args.filename, request)?;
    let end =
        image.size().min(args.start_offset.saturating_add(args.max_length.unwrap_or(u64::MAX)));
    let entries = entries(image.as_mut(), args.start_offset, end).about(&args.filename)?;
    emit(&match args.output {
        OutputFormat::Human => {
            text(&entries, &args.filename.to_string_lossy()).about(&args.filename)?
        }
        OutputFormat::Json => json(&entries)?,
    })?;
    Ok(0)
}

/// The ranges of `start .. end`.
fn entries(image: &mut dyn Image, start: u64, end: u64) -> Result<Vec<MapEntry>> {
    let mut entries = Vec::new();
    let mut offset = start;
    while offset < end {
        let piece = image.piece(offset, end - offset)?;
        push(&mut entries, entry(offset, &piece));
        offset += piece.len;
    }
    Ok(entries)
}

fn entry(start: u64, piece: &Piece) -> MapEntry {
    MapEntry {
        start,
        length: piece.len,
        depth: piece.depth,
        present: piece.state != State::Hole,
        zero: piece.state.is_zero(),
        data: !piece.state.is_zero(),
        compressed: piece.state == State::Compressed,
        offset: piece.physical,
    }
}
