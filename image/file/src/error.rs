//! Errors of files, with the words a user needs.

use exd_image::StorageError;
use nix::errno::Errno;
use std::fmt;
use std::io;

/// What was tried with a file and how it failed. The text does not repeat the file's name: whoever
/// prints it knows which file it asked for.
#[derive(Debug)]
pub struct FileError {
    /// What failed, as a sentence without the reason, for instance `could not open`.
    pub what: String,
    /// The reason.
    pub source: io::Error,
}

impl FileError {
    /// An error of the operating system.
    pub fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        FileError { what: what.into(), source: source.into() }
    }

    /// A refusal of our own; the text says it all.
    pub fn refused(kind: io::ErrorKind, text: impl Into<String>) -> Self {
        FileError { what: String::new(), source: io::Error::new(kind, text.into()) }
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.what.is_empty() {
            return self.source.fmt(f);
        }
        write!(f, "{}: {}", self.what, describe(&self.source))
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl From<FileError> for StorageError {
    fn from(error: FileError) -> Self {
        storage_error(&error.source)
    }
}

/// The reason alone, without the `(os error N)` that std appends.
fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_owned(),
        None => error.to_string(),
    }
}

/// Sorts an error of the operating system into the engine's classes.
pub fn storage_error(error: &io::Error) -> StorageError {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StorageError::NoSpace,
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => StorageError::Unsupported,
        Some(code) => StorageError::Io(code),
        None => StorageError::Io(libc::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let class = |code| storage_error(&io::Error::from_raw_os_error(code));
        assert_eq!(class(libc::ENOSPC), StorageError::NoSpace);
        assert_eq!(class(libc::EDQUOT), StorageError::NoSpace);
        assert_eq!(class(libc::EOPNOTSUPP), StorageError::Unsupported);
        assert_eq!(class(libc::EIO), StorageError::Io(libc::EIO));
    }

    #[test]
    fn text_has_no_error_number() {
        let error = FileError::new("could not open", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.to_string(), "could not open: No such file or directory");
    }
}
