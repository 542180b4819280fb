//! `imgtool measure`.

use crate::failure::{Context, Failure, Result};
use crate::formats::open::{OpenRequest, open};
use crate::formats::{Format, Image};
use crate::options::{self, EXD_BLOCK_SIZE, Preallocation, QCOW2_CLUSTER_SIZE, Request};
use crate::output::measure::{Measure, text};
use crate::output::{OutputFormat, emit, json};
use crate::size::{round_up_to_sector, size_value};
use clap::Args;
use std::path::PathBuf;

/// The arguments of `measure`.
#[derive(Args, Debug)]
#[command(
    about = "Calculate the file size a new image needs",
    long_about = "Calculate the file size a new image needs at most: for a disk of a given size, or \
        for the content of an existing image.",
    after_help = "Examples:\n  imgtool measure -O exd --size 100G\n  imgtool measure -O qcow2 disk.exd"
)]
pub struct MeasureArgs {
    /// Format of the new image: exd, raw or qcow2
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options of the new image; `-o help` lists them
    #[arg(short = 'o', long = "target-options", value_name = "OPTS")]
    options: Vec<String>,
    /// Size of the disk of the new image
    #[arg(long, value_name = "SIZE", value_parser = size_value, conflicts_with = "filename")]
    size: Option<u64>,
    /// Format of the existing image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to print
    #[arg(long, value_enum, value_name = "human|json", default_value_t)]
    output: OutputFormat,
    /// Open the image although another process may write to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The existing image
    #[arg(value_name = "FILENAME")]
    filename: Option<PathBuf>,
}

/// What is to be stored.
#[derive(Clone, Copy)]
struct Content {
    /// Bytes of the disk.
    size: u64,
    /// Bytes of data, in whole clusters.
    data: u64,
    /// Separate runs of data.
    runs: u64,
}

/// Space in EXD images is given out in pieces of so many bytes at least, although blocks may be smaller.
const SMALLEST_PIECE: u64 = 4096;

/// Runs `measure`.
pub fn run(args: MeasureArgs) -> Result<u8> {
    let format = Format::parse(&args.target_format)?;
    let options = match options::parse(format, &args.options)? {
        Request::Help => {
            emit(&options::help(format))?;
            return Ok(0);
        }
        Request::Options(options) => options,
    };
    let default = if format == Format::Exd { EXD_BLOCK_SIZE } else { QCOW2_CLUSTER_SIZE };
    let cluster = u64::from(options.block_size.unwrap_or(default));
    let mut content = match (&args.filename, args.size.or(options.size)) {
        (Some(path), None) => {
            let request = OpenRequest {
                format: args.format.as_deref(),
                write: false,
                force_share: args.force_share,
            };
            content_of(open(path, request)?.as_mut(), cluster).about(path)?
        }
        (None, Some(size)) => {
            let size = round_up_to_sector(size)
                .ok_or_else(|| Failure::new("Image size must be less than 8 EiB!"))?;
            Content { size, data: 0, runs: 0 }
        }
        _ => return Err(Failure::new("Either --size N or one filename must be specified.")),
    };
    let piece = if format == Format::Exd { cluster.max(SMALLEST_PIECE) } else { cluster };
    let whole = Content {
        size: content.size,
        data: content.size.next_multiple_of(cluster),
        runs: content.size.div_ceil(piece),
    };
    if matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full) {
        content = whole;
    }
    let bits = u64::from(options.refcount_bits.unwrap_or(16));
    let bytes = |content: Content| match format {
        Format::Raw => content.size,
        Format::Exd => exd_bytes(content),
        Format::Qcow2 => qcow2_bytes(content, cluster, bits),
    };
    let measure = Measure { required: bytes(content), fully_allocated: bytes(whole) };
    emit(&match args.output {
        OutputFormat::Human => text(&measure),
        OutputFormat::Json => json(&measure)?,
    })?;
    Ok(0)
}

/// Counts the clusters of an image that hold data, and their runs.
fn content_of(image: &mut dyn Image, cluster: u64) -> Result<Content> {
    let size = image.size();
    let mut content = Content { size, data: 0, runs: 0 };
    let (mut offset, mut counted) = (0, 0);
    while offset < size {
        let piece = image.piece(offset, size - offset)?;
        let end = offset + piece.len;
        if !piece.state.is_zero() {
            let first = (offset - offset % cluster).max(counted);
            let last = end.next_multiple_of(cluster);
            content.runs += u64::from(first > counted || content.runs == 0);
            content.data += last.saturating_sub(first);
            counted = last.max(counted);
        }
        offset = end;
    }
    Ok(content)
}

/// An upper bound for EXD: fixed area, journal, first room for metadata, data, and two generations of the tree and the space
/// list with one extent per run, nodes half full.
fn exd_bytes(content: Content) -> u64 {
    const FIXED_BYTES: u64 = 65536 + 262_144 + 262_144;
    const NODE_BYTES: u64 = 4096;
    const EXTENTS_PER_NODE: u64 = (NODE_BYTES - 64) / 24 / 2;
    let nodes = content.runs.div_ceil(EXTENTS_PER_NODE);
    // Inner nodes are fewer than a fiftieth of the leaves.
    let tree = (nodes + nodes / 50 + 4).saturating_mul(NODE_BYTES);
    let space = 64 + content.runs.saturating_mul(16);
    (FIXED_BYTES + content.data).saturating_add(2 * (tree + space)).next_multiple_of(NODE_BYTES)
}

/// The metadata of qcow2: header, L1 and L2 tables, reference counts of everything.
fn qcow2_bytes(content: Content, cluster: u64, refcount_bits: u64) -> u64 {
    let l2_tables = content.size.div_ceil(cluster).div_ceil(cluster / 8);
    let l1 = (l2_tables * 8).next_multiple_of(cluster);
    let fixed = cluster + l1 + l2_tables * cluster + content.data;
    let per_block = cluster * 8 / refcount_bits;
    // Reference counts count themselves: repeat until it settles.
    let mut counts = 0;
    loop {
        let blocks = (fixed + counts).div_ceil(cluster).div_ceil(per_block);
        let next = blocks * cluster + (blocks * 8).next_multiple_of(cluster);
        if next <= counts {
            return fixed + counts;
        }
        counts = next;
    }
}
