//! How a command fails: a text for standard error and an exit code.

use std::fmt;
use std::io;
use std::path::Path;

use crate::output::text::printable_path;

/// What commands return.
pub type Result<T> = std::result::Result<T, Failure>;

/// A failed command. Printed once, by `main`, as `imgtool: FILE: TEXT`.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// The file it is about, ready to print.
    pub file: Option<String>,
    /// What failed, with offset and remedy.
    pub text: String,
    /// Nobody reads our output any more; nothing is printed.
    pub broken_pipe: bool,
}

impl Failure {
    /// A failure that is not about a file in particular. Exit code 1.
    pub fn new(text: impl fmt::Display) -> Self {
        Failure { code: 1, file: None, text: text.to_string(), broken_pipe: false }
    }

    /// A failure about a file. Exit code 1.
    pub fn on(path: &Path, text: impl fmt::Display) -> Self {
        Failure::new(text).about(path)
    }

    /// Names the file, unless one is named already.
    pub fn about(mut self, path: &Path) -> Self {
        self.file.get_or_insert_with(|| printable_path(path));
        self
    }

    /// The same failure with another exit code.
    pub fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "imgtool: {file}: {}", self.text),
            None => write!(f, "imgtool: {}", self.text),
        }
    }
}

/// Puts the file's name, or what was being done, to an error on its way up.
pub trait Context<T> {
    /// Names the file.
    fn about(self, path: &Path) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn about(self, path: &Path) -> Result<T> {
        self.map_err(|failure| failure.about(path))
    }
}

/// Says what was being done when a call of the operating system failed.
pub trait During<T> {
    /// `what` is a phrase such as `could not write at offset 512`.
    fn during(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure::new(format_args!("{what}: {}", reason(&error))))
    }
}

/// The reason in an I/O error, without the `(os error N)` that std appends.
pub fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_owned(),
        None => error.to_string(),
    }
}
