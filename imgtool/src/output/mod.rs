//! What imgtool prints: text for people, JSON with qemu-img's keys for programs.

pub mod check;
pub mod info;
pub mod map;
pub mod measure;
pub mod text;

use crate::failure::{Failure, Result, reason};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use std::io::{self, ErrorKind, Write};

/// `--output`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum OutputFormat {
    /// Text for people.
    #[default]
    Human,
    /// One JSON document.
    Json,
}

/// Prints to standard output.
pub fn emit(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| Failure {
        broken_pipe: error.kind() == ErrorKind::BrokenPipe,
        ..Failure::new(format_args!("could not write to standard output: {}", reason(&error)))
    })
}

/// Prints a warning to standard error.
pub fn warn(text: &str) {
    eprintln!("imgtool: warning: {text}");
}

/// A JSON document, indented by 4, with a line end.
pub fn json<T: Serialize>(value: &T) -> Result<String> {
    let mut bytes = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| Failure::new(format_args!("could not make JSON: {error}")))?;
    bytes.push(b'\n');
    String::from_utf8(bytes).map_err(|_| Failure::new("could not make JSON: not UTF-8"))
}
