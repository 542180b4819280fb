//! The commands: one file each, from arguments through resolved options and work to output.

pub mod check;
pub mod compare;
pub mod convert;
pub mod create;
pub mod defrag;
pub mod dump;
pub mod generate;
pub mod info;
pub mod map;
pub mod measure;
pub mod resize;

use crate::failure::Result;
use clap::{Parser, Subcommand};

/// Create, check, convert and inspect disk images.
#[derive(Parser, Debug)]
#[command(
    name = "imgtool",
    version,
    about = "Create, check, convert and inspect disk images",
    long_about = "Create, check, convert and inspect disk images in the formats exd, raw and \
        qcow2.\n\nOptions are spelled as qemu-img spells them. Sizes take the suffixes k, M, G, T, \
        P and E, which stand for powers of 1024.",
    propagate_version = true,
    after_help = "Examples:\n  imgtool create disk.exd 64G\n  imgtool convert -p -O exd disk.qcow2 \
        disk.exd\n  imgtool check disk.exd\n  imgtool info --output=json disk.exd"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands. What each says about itself stands with its arguments: a comment here would replace
/// it.
#[derive(Subcommand, Debug)]
pub enum Command {
    Create(create::CreateArgs),
    Info(info::InfoArgs),
    Check(check::CheckArgs),
    Convert(convert::ConvertArgs),
    Map(map::MapArgs),
    Resize(resize::ResizeArgs),
    Defrag(defrag::DefragArgs),
    Compare(compare::CompareArgs),
    Measure(measure::MeasureArgs),
    Dump(dump::DumpArgs),
    #[command(hide = true)]
    Generate(generate::GenerateArgs),
}

impl Command {
    /// Carries the command out and returns its exit code.
    pub fn run(self) -> Result<u8> {
        match self {
            Command::Create(args) => create::run(args),
            Command::Info(args) => info::run(args),
            Command::Check(args) => check::run(args),
            Command::Convert(args) => convert::run(args),
            Command::Map(args) => map::run(args),
            Command::Resize(args) => resize::run(args),
            Command::Defrag(args) => defrag::run(args),
            Command::Compare(args) => compare::run(args),
            Command::Measure(args) => measure::run(args),
            Command::Dump(args) => dump::run(args),
            Command::Generate(args) => generate::run(args),
        }
    }
}
