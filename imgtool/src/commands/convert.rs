//! `imgtool convert`.

use super::create::describe;
use crate::copy::{Plan, Source, copy, data_bytes};
use crate::destination::{self, Destination, open_device};
use crate::failure::{Context, During, Failure, Result};
use crate::formats::open::{OpenRequest, locate, open, open_located};
use crate::formats::{Format, Image, raw, stream};
use crate::interrupt::Interrupt;
use crate::options::{self, FormatOptions, Request};
use crate::output::emit;
use crate::progress::{Channel, Progress};
use crate::size::{SECTOR, round_up_to_sector, size_value};
use clap::Args;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Requests in flight that qemu-img allows.
const PARALLEL_MAX: u64 = 16;

/// The arguments of `convert`.
#[derive(Args, Debug)]
#[command(
    about = "Copy an image to another, converting the format",
    long_about = "Copy an image to another, converting the format. Several sources are put one after \
        another. Holes and zeroes are not copied. The new image takes its name when it is complete \
        and durable; a device has no partition table and no image header until then. '-' is \
        standard input or output, raw.",
    after_help = "Examples:\n  imgtool convert -p -O exd disk.qcow2 disk.exd\n  imgtool convert -O \
        qcow2 -o cluster_size=128k disk.exd disk.qcow2\n  imgtool convert -n -O raw disk.exd \
        /dev/vg0/disk\n  zcat disk.img.gz | imgtool convert -f raw -O exd - disk.exd"
)]
pub struct ConvertArgs {
    /// Format of the sources; guessed if not given
    #[arg(short = 'f', long = "source-format", visible_alias = "format", value_name = "SRC_FMT")]
    source_format: Option<String>,
    /// Format of the target: exd, raw or qcow2
    #[arg(short = 'O', long = "target-format", value_name = "TGT_FMT", default_value = "raw")]
    target_format: String,
    /// Options of the target format as NAME=VALUE,...; `-o help` lists them
    #[arg(
        short = 'o',
        long = "target-options",
        visible_alias = "options",
        value_name = "TGT_OPTS"
    )]
    options: Vec<String>,
    /// Runs of so many zero bytes become holes; 0 writes everything
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE", value_parser = size_value,
        default_value = "4k")]
    sparse_size: u64,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Write into a target that exists
    #[arg(short = 'n', long)]
    no_create: bool,
    /// The existing target reads as zeroes all over
    #[arg(long)]
    target_is_zero: bool,
    /// Open the sources although another process may write to them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Accepted as qemu-img's; reading and writing always overlap
    #[arg(short = 'm', long = "parallel", value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u64).range(1..=PARALLEL_MAX))]
    parallel: u64,
    /// Accepted as qemu-img's; has no effect
    #[arg(short = 'W', long = "oob-writes")]
    out_of_order: bool,
    /// Accepted as qemu-img's; the page cache is used, and the target synced at the end
    #[arg(short = 't', long = "target-cache", value_name = "CACHE")]
    target_cache: Option<CacheMode>,
    /// Accepted as qemu-img's; the page cache is used
    #[arg(short = 'T', long = "source-cache", value_name = "CACHE")]
    source_cache: Option<CacheMode>,
    /// The source images, then the target
    #[arg(value_name = "FILENAME", required_unless_present = "options")]
    filenames: Vec<PathBuf>,
}

/// qemu-img's names of cache modes.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum CacheMode {
    /// Direct I/O.
    None,
    /// The page cache.
    Writeback,
    /// The page cache, never synced.
    Unsafe,
    /// Direct I/O, synced after each write.
    Directsync,
    /// The page cache, synced after each write.
    Writethrough,
}

/// What to do, resolved.
struct Job {
    source_format: Option<String>,
    target_format: Format,
    options: FormatOptions,
    target: PathBuf,
    create: bool,
    target_is_zero: bool,
    force_share: bool,
    sparse: u64,
    progress: bool,
}

/// Runs `convert`.
pub fn run(args: ConvertArgs) -> Result<u8> {
    let target_format = Format::parse(&args.target_format)?;
    let options = match options::parse(target_format, &args.options)? {
        Request::Help => {
            emit(&options::help(target_format))?;
            return Ok(0);
        }
        Request::Options(options) => options,
    };
    let Some((target, sources)) = args.filenames.split_last().filter(|(_, rest)| !rest.is_empty())
    else {
        return Err(Failure::new("Must specify image file name"));
    };
    if args.target_is_zero && !args.no_create {
        return Err(Failure::new("--target-is-zero requires use of -n flag"));
    }
    if args.no_create && options != FormatOptions::default() {
        return Err(Failure::new(
            "-n and -o exclude each other: an existing image keeps its options",
        ));
    }
    let job = Job {
        source_format: args.source_format,
        target_format,
        options,
        target: target.clone(),
        create: !args.no_create,
        target_is_zero: args.target_is_zero,
        force_share: args.force_share,
        sparse: args.sparse_size - args.sparse_size % SECTOR,
        progress: args.progress && !args.quiet,
    };
    job.run(sources)?;
    Ok(0)
}

impl Job {
    fn run(&self, paths: &[PathBuf]) -> Result<()> {
        let interrupt = Interrupt::install().during("could not take signals over")?;
        let mut sources = Vec::new();
        for path in paths {
            sources.push(self.open_source(path)?);
        }
        // The sum of the sizes; unknown if a stream takes part.
        let size = sources.iter().try_fold(0u64, |sum, source| match source {
            Source::Image(_, image) => sum.checked_add(image.size()),
            Source::Stream(..) => None,
        });
        let mut progress = self.start_progress(&mut sources, size)?;
        let (destination, mut target) = self.open_target(size)?;
        let plan = Plan {
            sparse: self.sparse,
            target_is_zero: self.target_reads_zero(),
            grow: self.create && size.is_none(),
            count_data_only: self.sparse > 0,
        };
        copy(sources, target.as_mut(), plan, &interrupt, &mut progress).about(&self.target)?;
        target.finish().about(&self.target)?;
        interrupt.check()?;
        destination.commit().about(&self.target)?;
        progress.finish();
        Ok(())
    }

    fn open_source(&self, path: &Path) -> Result<Source> {
        let raw = self.source_format.as_deref().is_none_or(|format| format == "raw");
        if raw && stream::is_stream(path) {
            return Ok(Source::Stream(path.to_owned(), stream::source(path).about(path)?));
        }
        let request = OpenRequest {
            format: self.source_format.as_deref(),
            write: false,
            force_share: self.force_share,
        };
        Ok(Source::Image(path.to_owned(), open(path, request)?))
    }

    fn start_progress(&self, sources: &mut [Source], size: Option<u64>) -> Result<Progress> {
        if !self.progress {
            return Ok(Progress::silent());
        }
        let mut total = 0u64;
        for source in sources {
            if let Source::Image(path, image) = source {
                let bytes = match self.sparse {
                    0 => image.size(),
                    _ => data_bytes(image.as_mut()).about(path)?,
                };
                total = total.saturating_add(bytes);
            }
        }
        let total = if size.is_none() { 0 } else { total };
        let channel =
            if stream::is_stream(&self.target) { Channel::Stderr } else { Channel::Stdout };
        Ok(Progress::new(total, channel))
    }

    fn open_target(&self, size: Option<u64>) -> Result<(Destination, Box<dyn Image>)> {
        if self.create {
            let wanted = match self.options.size {
                Some(given) => round_up_to_sector(given),
                None => Some(size.unwrap_or(0)),
            };
            let wanted =
                wanted.ok_or_else(|| Failure::new("Image size must be less than 8 EiB!"))?;
            if size.is_some_and(|size| size > wanted) {
                return Err(Failure::on(&self.target, "output file is smaller than input file"));
            }
            let announce = |options: &FormatOptions| {
                log::debug!("creating: {}", describe(self.target_format, wanted, options));
                Ok(())
            };
            let options = self.options.clone();
            return destination::start(
                &self.target,
                self.target_format,
                wanted,
                options,
                &announce,
            );
        }
        let image = self.open_existing().about(&self.target)?;
        if size.is_some_and(|size| image.size() < size) {
            return Err(Failure::on(&self.target, "output file is smaller than input file"));
        }
        Ok((Destination::in_place(), image))
    }

    /// The target of `-n`.
    fn open_existing(&self) -> Result<Box<dyn Image>> {
        if self.target_format == Format::Raw && is_block_device(&self.target) {
            let file = open_device(&self.target, Format::Raw)?;
            return raw::open_unfinished(file);
        }
        if stream::is_stream(&self.target) {
            return Err(Failure::new("-n needs a file or block device"));
        }
        let request = OpenRequest {
            format: Some(self.target_format.name()),
            write: true,
            force_share: false,
        };
        open_located(locate(&self.target, request)?, true)
    }

    /// The target reads as zeroes where nothing is written.
    fn target_reads_zero(&self) -> bool {
        match self.create {
            // A device holds what it held, and a stream has no holes; an EXD image on a device
            // knows what it has not written.
            true => {
                self.target_format != Format::Raw
                    || !(is_block_device(&self.target) || stream::is_stream(&self.target))
            }
            false => self.target_is_zero,
        }
    }
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
