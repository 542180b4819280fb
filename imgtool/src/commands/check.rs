//! `imgtool check`.

use crate::failure::{Context, Failure, Result};
use crate::formats::exd::{engine_failure, storage};
use crate::formats::open::{OpenRequest, locate};
use crate::formats::{Format, exd};
use crate::output::check::{CheckResult, repair_text, text};
use crate::output::text::printable;
use crate::output::{OutputFormat, emit, json};
use clap::{Args, ValueEnum};
use exd_file::FileStorage;
use exd_image::check::{Report, check, repair};
use std::path::{Path, PathBuf};

/// The format has no check, as qemu-img reports it.
const NO_CHECK: u8 = 63;
/// Unit of the leaks reported, in bytes.
const LEAK_UNIT: u64 = 4096;

/// The arguments of `check`.
#[derive(Args, Debug)]
#[command(
    about = "Check an image for damage and wasted space",
    long_about = "Check an image for damage and for host space that belongs to nothing. Without -r \
        nothing is written. Exit code: 0 consistent (after the repair, with -r), 1 the check \
        failed, 2 damaged, 3 only wasted space, 63 the format has no check.",
    after_help = "Examples:\n  imgtool check disk.exd\n  imgtool check -r leaks disk.exd\n  imgtool \
        check --output=json disk.exd"
)]
pub struct CheckArgs {
    /// Format of the image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Repair wasted space only, or all
    #[arg(short, long, value_enum, value_name = "leaks|all")]
    repair: Option<Repair>,
    /// How to print
    #[arg(long, value_enum, value_name = "human|json", default_value_t)]
    output: OutputFormat,
    /// Open the image although another process may write to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
}

/// What to repair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Repair {
    /// Wasted space.
    Leaks,
    /// Everything that can be.
    All,
}

/// Runs `check`.
pub fn run(args: CheckArgs) -> Result<u8> {
    if args.repair.is_some() && args.force_share {
        return Err(Failure::new("force-share=on can only be used with read-only images"));
    }
    let request = OpenRequest {
        format: args.format.as_deref(),
        write: args.repair.is_some(),
        force_share: args.force_share,
    };
    let located = locate(&args.filename, request)?;
    if located.format != Format::Exd {
        let text = match located.format {
            Format::Qcow2 => "imgtool does not check qcow2 images; use 'qemu-img check'",
            _ => "This image format does not support checks",
        };
        return Err(Failure::on(&args.filename, text).with_code(NO_CHECK));
    }
    exd::read_superblock_for_check(&located.file).about(&args.filename)?;
    let mut storage = storage(located.file).about(&args.filename)?;
    let (result, repaired) = examine(&args, &mut storage).about(&args.filename)?;
    print(&args, &result, repaired)?;
    Ok(result.exit_code())
}

/// Checks, repairs if asked to, and checks again. True if something was repaired.
fn examine(args: &CheckArgs, storage: &mut FileStorage) -> Result<(CheckResult, bool)> {
    let before = check_once(storage)?;
    report_findings(args, &before);
    let mut result = result_of(&args.filename, &before);
    let Some(what) = args.repair else { return Ok((result, false)) };
    if result.corruptions == 0 && result.leaks == 0 {
        return Ok((result, false));
    }
    let notes = storage.notes();
    let repaired =
        repair(storage, what == Repair::All).map_err(|error| engine_failure(&error, &notes))?;
    result = result_of(&args.filename, &repaired.report);
    result.leaks_fixed = repaired.leaked_bytes_fixed.div_ceil(LEAK_UNIT);
    result.corruptions_fixed = repaired.corruptions_fixed;
    let repaired = result.leaks_fixed > 0 || result.corruptions_fixed > 0;
    Ok((result, repaired))
}

fn check_once(storage: &mut FileStorage) -> Result<Report> {
    let notes = storage.notes();
    check(storage).map_err(|error| engine_failure(&error, &notes))
}

/// One line for each problem, on standard error.
fn report_findings(args: &CheckArgs, report: &Report) {
    if args.quiet {
        return;
    }
    for finding in &report.corruptions {
        let place = finding.offset.map(|offset| format!(" at offset {offset}"));
        eprintln!("ERROR{}: {}", place.unwrap_or_default(), printable(&finding.what));
    }
    for range in &report.leaks {
        eprintln!("Leaked space at offset {}: {} bytes", range.start, range.end - range.start);
    }
}

fn result_of(path: &Path, report: &Report) -> CheckResult {
    CheckResult {
        filename: path.to_string_lossy().into_owned(),
        format: Format::Exd.name().to_owned(),
        image_end_offset: Some(report.image_end),
        corruptions: report.corruption_count,
        leaks: report.leaked_bytes.div_ceil(LEAK_UNIT),
        total_clusters: report.virtual_size.div_ceil(report.block_size.max(1)),
        allocated_clusters: report.allocated_blocks,
        fragmented_clusters: report.fragments,
        ..CheckResult::default()
    }
}

fn print(args: &CheckArgs, result: &CheckResult, repaired: bool) -> Result<()> {
    match args.output {
        OutputFormat::Json => emit(&json(result)?),
        OutputFormat::Human if args.quiet => Ok(()),
        OutputFormat::Human => {
            if repaired {
                emit(&repair_text(result))?;
            }
            emit(&text(result))
        }
    }
}
