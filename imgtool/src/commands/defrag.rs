//! `imgtool defrag`.

use crate::failure::{Context, Failure, Result};
use crate::formats::Format;
use crate::formats::exd::{self, Defragmented};
use crate::formats::open::{OpenRequest, locate};
use crate::interrupt::Interrupt;
use crate::output::{OutputFormat, emit, json};
use crate::progress::{Channel, Progress};
use clap::Args;
use std::path::PathBuf;

/// The arguments of `defrag`.
#[derive(Args, Debug)]
#[command(
    about = "Move scattered data of an image together",
    long_about = "Move scattered data of an image together, so that reading the disk in order reads \
        the image file in order. Only data whose pieces are short is moved, at most 1 MiB at a time, \
        through the journal: an interruption at any moment leaves a sound image, and another run goes \
        on. Images made with preallocation keep their space and are left as they are.",
    after_help = "Examples:\n  imgtool defrag disk.exd\n  imgtool defrag -p disk.exd\n  imgtool defrag \
        --output=json disk.exd"
)]
pub struct DefragArgs {
    /// Format of the image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// How to print
    #[arg(long, value_enum, value_name = "human|json", default_value_t)]
    output: OutputFormat,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
}

/// Runs `defrag`.
pub fn run(args: DefragArgs) -> Result<u8> {
    let done = defragment(&args).about(&args.filename)?;
    if !args.quiet {
        match args.output {
            OutputFormat::Json => emit(&json(&done)?)?,
            OutputFormat::Human => emit(&format!(
                "{} extents before, {} now; {} moved\n",
                done.extents_before,
                done.extents_after,
                indicatif::BinaryBytes(done.moved_bytes)
            ))?,
        }
    }
    Ok(0)
}

fn defragment(args: &DefragArgs) -> Result<Defragmented> {
    let request = OpenRequest { format: args.format.as_deref(), write: true, force_share: false };
    let located = locate(&args.filename, request)?;
    if located.format != Format::Exd {
        return Err(Failure::new(format_args!(
            "only exd images can be defragmented, and this one is {}",
            located.format.name()
        )));
    }
    let interrupt = Interrupt::install().map_err(Failure::new)?;
    let mut progress = None;
    let done = exd::defragment(located.file, |total, step| {
        let progress = progress.get_or_insert_with(|| match args.progress && !args.quiet {
            true => Progress::new(total, Channel::Stderr),
            false => Progress::silent(),
        });
        progress.advance(step);
        !interrupt.is_wanted()
    })?;
    if let Some(progress) = progress {
        progress.finish();
    }
    interrupt.check_saying("interrupted; the image is sound, and another run goes on")?;
    Ok(done)
}
