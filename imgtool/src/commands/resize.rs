//! `imgtool resize`.

use crate::failure::{Context, Failure, Result};
use crate::formats::open::{OpenRequest, locate, open_located};
use crate::formats::{Format, Image, raw};
use crate::options::{Preallocation, preallocation};
use crate::output::{emit, warn};
use crate::size::{image_size, round_up_to_sector};
use clap::Args;
use std::path::PathBuf;

/// The arguments of `resize`.
#[derive(Args, Debug)]
#[command(
    about = "Change the size of an image's disk",
    long_about = "Change the size of an image's disk: to SIZE, or by +SIZE or -SIZE. The partitions \
        and file systems in it are not changed.",
    after_help = "Examples:\n  imgtool resize disk.exd +10G\n  imgtool resize --shrink disk.exd 20G\n  \
        imgtool resize --shrink disk.exd -512M"
)]
pub struct ResizeArgs {
    /// Format of the image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Make the disk smaller, giving up the data past its new end
    #[arg(long)]
    shrink: bool,
    /// Reserve the new space: off, falloc or full (raw only)
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
    /// New size, or the change with + or - before it
    #[arg(value_name = "[+-]SIZE", allow_hyphen_values = true)]
    size: String,
}

/// Runs `resize`.
pub fn run(args: ResizeArgs) -> Result<u8> {
    resize(&args).about(&args.filename)?;
    if !args.quiet {
        emit("Image resized.\n")?;
    }
    Ok(0)
}

fn resize(args: &ResizeArgs) -> Result<()> {
    let request = OpenRequest { format: args.format.as_deref(), write: true, force_share: false };
    let located = locate(&args.filename, request)?;
    let format = located.format;
    if located.guessed && format == Format::Raw {
        // A guest that writes an image header into its raw disk would have it taken for an image.
        warn("the format was not given and guessed to be raw; '-f raw' says so");
    }
    let mode = preallocation(format, &args.preallocation)?;
    if mode != Preallocation::Off && format != Format::Raw {
        return Err(Failure::new(format_args!(
            "--preallocation is not supported for format {}; new space is allocated when written",
            format.name()
        )));
    }
    let mut image = open_located(located, true)?;
    let old = image.size();
    let resized = change(image.as_mut(), &args.size, args.shrink);
    // A refusal, too, leaves the image closed cleanly.
    image.finish()?;
    let size = resized?;
    if mode != Preallocation::Off && size > old {
        let located = locate(&args.filename, request)?;
        raw::preallocate(located.file, old, size, mode)?;
    }
    Ok(())
}

/// Changes the size if that is allowed, and returns it.
fn change(image: &mut dyn Image, text: &str, shrink: bool) -> Result<u64> {
    let size = new_size(text, image.size())?;
    if size < image.size() && !shrink {
        warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        );
        return Err(Failure::new("Use the --shrink option to perform a shrink operation."));
    }
    image.resize(size)?;
    Ok(size)
}

/// The size that `text` asks for, given the old one.
fn new_size(text: &str, old: u64) -> Result<u64> {
    let not_positive = || Failure::new("New image size must be positive");
    let size = if let Some(more) = text.strip_prefix('+') {
        old.checked_add(image_size(more)?)
    } else if let Some(less) = text.strip_prefix('-') {
        Some(old.checked_sub(image_size(less)?).ok_or_else(not_positive)?)
    } else {
        Some(image_size(text)?)
    };
    match size.and_then(round_up_to_sector) {
        Some(0) => Err(not_positive()),
        Some(size) => Ok(size),
        None => Err(Failure::new("Image size must be less than 8 EiB!")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_and_relative_sizes() {
        let size = |text| new_size(text, 1 << 20).ok();
        assert_eq!(size("2M"), Some(2 << 20));
        assert_eq!(size("+1k"), Some((1 << 20) + 1024));
        assert_eq!(size("-512k"), Some(512 << 10));
        assert_eq!(size("1000"), Some(1024));
        assert_eq!(size("-1M"), None);
        assert_eq!(size("-2M"), None);
        assert_eq!(size("0"), None);
        assert_eq!(size("+-1"), None);
        assert_eq!(size("+8E"), None);
    }
}
