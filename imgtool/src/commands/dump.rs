//! `imgtool dump`: the metadata of an EXD image as it lies there.

use crate::failure::{Context, Result};
use crate::formats::exd_dump::dump;
use crate::formats::open::{OpenRequest, locate};
use crate::output::{emit, json};
use clap::Args;
use std::path::PathBuf;

/// The arguments of `dump`.
#[derive(Args, Debug)]
#[command(
    about = "Print the metadata of an EXD image as JSON, for debugging",
    long_about = "Print the metadata of an EXD image as JSON: superblocks, holder record, journal \
        records, tree nodes, space list. For debugging; the keys may change.",
    after_help = "Example:\n  imgtool dump -U disk.exd | jq .superblocks"
)]
pub struct DumpArgs {
    /// Open the image although another process may write to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
}

/// Runs `dump`.
pub fn run(args: DumpArgs) -> Result<u8> {
    let request = OpenRequest { format: Some("exd"), write: false, force_share: args.force_share };
    let located = locate(&args.filename, request)?;
    let dump = dump(&located.file).about(&args.filename)?;
    emit(&json(&dump)?)?;
    Ok(0)
}
