//! `imgtool`: create, check, convert and inspect disk images.
//!
//! A command is an exit code and a text: `main` prints the one failure there is and ends with its
//! code; nothing else decides about either.

#![forbid(unsafe_code)]

mod commands;
mod copy;
mod destination;
mod device;
mod failure;
mod formats;
mod interrupt;
mod options;
mod output;
mod progress;
mod size;

use clap::Parser;
use clap::error::ErrorKind;
use std::ffi::OsString;
use std::process::ExitCode;

/// A bad command line, as qemu-img reports it.
const USAGE: u8 = 1;

fn main() -> ExitCode {
    // RUST_LOG=debug shows what is going on.
    env_logger::Builder::from_default_env().format_timestamp(None).init();
    let arguments = protect_negative_size(std::env::args_os().collect());
    let cli = match commands::Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody to tell if even that fails.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => USAGE.into(),
            };
        }
    };
    match cli.command.run() {
        Ok(code) => code.into(),
        Err(failure) if failure.broken_pipe => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.code.into()
        }
    }
}

/// `resize FILE -4M` means a size, not options: the last word gets a `--` before it.
fn protect_negative_size(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let resize = arguments.get(1).is_some_and(|command| command == "resize");
    let negative = arguments.last().is_some_and(|last| {
        let bytes = last.as_encoded_bytes();
        bytes.first() == Some(&b'-') && bytes.get(1).is_some_and(u8::is_ascii_digit)
    });
    if resize && negative && !arguments.iter().any(|argument| argument == "--") {
        arguments.insert(arguments.len() - 1, "--".into());
    }
    arguments
}
