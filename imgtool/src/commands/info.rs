//! `imgtool info`.

use crate::failure::{Context, Result};
use crate::formats::open::{Located, OpenRequest, actual_size, file_child, locate};
use crate::formats::{Format, exd, qcow2};
use crate::output::info::{FormatSpecific, ImageInfo, text};
use crate::output::{OutputFormat, emit, json};
use clap::Args;
use std::path::{Path, PathBuf};

/// The arguments of `info`.
#[derive(Args, Debug)]
#[command(
    about = "Show what an image is",
    long_about = "Show what an image is. Of an image that another process has open, '-U' shows what \
        the superblock says, and who has it open.",
    after_help = "Examples:\n  imgtool info disk.exd\n  imgtool info --output=json -f qcow2 \
        disk.qcow2\n  imgtool info -U in-use.exd"
)]
pub struct InfoArgs {
    /// Format of the image; guessed if not given
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// How to print
    #[arg(long, value_enum, value_name = "human|json", default_value_t)]
    output: OutputFormat,
    /// Open the image although another process may write to it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Show the whole backing chain
    #[arg(long)]
    backing_chain: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    filename: PathBuf,
}

/// Runs `info`.
pub fn run(args: InfoArgs) -> Result<u8> {
    let mut chain = Vec::new();
    let mut next = Some((args.filename.clone(), args.format.clone()));
    while let Some((path, format)) = next.take() {
        let request =
            OpenRequest { format: format.as_deref(), write: false, force_share: args.force_share };
        let info = gather(&path, request)?;
        if args.backing_chain && chain.len() < 64 {
            let backing = info.full_backing_filename.clone();
            next = backing.map(|path| (PathBuf::from(path), info.backing_filename_format.clone()));
        }
        chain.push(info);
    }
    let output = match (args.output, args.backing_chain) {
        (OutputFormat::Human, _) => chain.iter().map(text).collect::<Vec<_>>().join("\n"),
        (OutputFormat::Json, true) => json(&chain)?,
        (OutputFormat::Json, false) => json(&chain.first())?,
    };
    emit(&output)?;
    Ok(0)
}

fn gather(path: &Path, request: OpenRequest<'_>) -> Result<ImageInfo> {
    let located = locate(path, request)?;
    describe(&located, path).about(path)
}

fn describe(located: &Located, path: &Path) -> Result<ImageInfo> {
    let filename = path.to_string_lossy().into_owned();
    let file = &located.file;
    let mut info = ImageInfo {
        children: vec![file_child(file, &filename)?],
        filename,
        actual_size: Some(actual_size(file)?),
        format: located.format.name().to_owned(),
        ..ImageInfo::default()
    };
    match located.format {
        Format::Raw => {
            info.virtual_size = info.children.first().map_or(0, |child| child.info.virtual_size);
        }
        Format::Qcow2 => qcow2::describe(&qcow2::read_header(file)?, file, &mut info),
        Format::Exd => {
            exd::describe(&exd::read_superblock(file)?, &mut info);
            if let Some(FormatSpecific::Exd(data)) = &mut info.format_specific {
                data.holder = exd::holder(file)?;
            }
        }
    }
    Ok(info)
}
