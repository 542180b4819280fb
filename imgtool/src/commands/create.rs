//! `imgtool create`.

use crate::destination;
use crate::failure::{Context, Failure, Result};
use crate::formats::Format;
use crate::options::{self, EXD_BLOCK_SIZE, FormatOptions, QCOW2_CLUSTER_SIZE, Request};
use crate::output::emit;
use crate::output::text::printable_path;
use crate::size::{image_size, round_up_to_sector};
use clap::Args;
use std::path::PathBuf;

/// The arguments of `create`.
#[derive(Args, Debug)]
#[command(
    about = "Create a new image",
    long_about = "Create a new image. An existing file of that name is replaced; one that is in use \
        is not.",
    after_help = "Examples:\n  imgtool create disk.exd 64G\n  imgtool create -o \
        block_size=64k,preallocation=metadata disk.exd 1T\n  imgtool create -f raw disk.img 10G\n  \
        imgtool create -f qcow2 -o help"
)]
pub struct CreateArgs {
    /// Format of the new image: exd, raw or qcow2
    #[arg(short, long, value_name = "FMT", default_value = "exd")]
    format: String,
    /// Options of the format as NAME=VALUE,...; `-o help` lists them
    #[arg(short = 'o', long = "options", value_name = "FMT_OPTS")]
    options: Vec<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The image to create
    #[arg(value_name = "FILENAME", required_unless_present = "options")]
    filename: Option<PathBuf>,
    /// Size of the disk
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
}

/// Runs `create`.
pub fn run(args: CreateArgs) -> Result<u8> {
    let named = |failure: Failure| match &args.filename {
        Some(path) => failure.about(path),
        None => failure,
    };
    let format = Format::parse(&args.format).map_err(named)?;
    let options = match options::parse(format, &args.options).map_err(named)? {
        Request::Help => {
            emit(&options::help(format))?;
            return Ok(0);
        }
        Request::Options(options) => options,
    };
    let Some(path) = &args.filename else {
        return Err(Failure::new("Expecting image file name"));
    };
    let size = resolve_size(args.size.as_deref(), &options).about(path)?;
    let announce = |options: &FormatOptions| match args.quiet {
        true => Ok(()),
        false => {
            let effective = describe(format, size, options);
            emit(&format!("Formatting '{}', {effective}\n", printable_path(path)))
        }
    };
    let (destination, image) = destination::start(path, format, size, options, &announce)?;
    image.finish().about(path)?;
    destination.commit().about(path)?;
    Ok(0)
}

fn resolve_size(argument: Option<&str>, options: &FormatOptions) -> Result<u64> {
    let size = match (argument, options.size) {
        (Some(_), Some(_)) => {
            return Err(Failure::new("the size is given twice, in '-o size=' and as an argument"));
        }
        (Some(text), None) => image_size(text)?,
        (None, Some(size)) => size,
        (None, None) => return Err(Failure::new("Image creation needs a size parameter")),
    };
    round_up_to_sector(size).ok_or_else(|| Failure::new("Image size must be less than 8 EiB!"))
}

/// `fmt=exd size=1048576 ...`: every option in effect.
pub fn describe(format: Format, size: u64, options: &FormatOptions) -> String {
    let mut text = format!("fmt={} size={size}", format.name());
    match format {
        Format::Exd => {
            text += &format!(" block_size={}", options.block_size.unwrap_or(EXD_BLOCK_SIZE));
        }
        Format::Qcow2 => {
            text += &format!(
                " cluster_size={} refcount_bits={}",
                options.block_size.unwrap_or(QCOW2_CLUSTER_SIZE),
                options.refcount_bits.unwrap_or(16)
            );
        }
        Format::Raw => {}
    }
    if format != Format::Raw || options.preallocation != options::Preallocation::Off {
        text += &format!(" preallocation={}", options.preallocation.name());
    }
    text
}
