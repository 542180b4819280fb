//! What can go wrong with an image as a whole. Requests on an open image fail with
//! [`crate::RequestError`].

use crate::storage::StorageError;
use exd_format::DecodeError;
use std::fmt;

/// The stable part of an [`Error`], to be matched on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ErrorKind {
    /// Not an EXD image at all.
    NotExd,
    /// Metadata is damaged (P6).
    Corrupt,
    /// The image needs features this program does not have; they are named.
    Unsupported(Vec<String>),
    /// The host failed.
    Storage(StorageError),
    /// What was asked for makes no sense or exceeds a limit.
    Invalid,
    /// The image can be opened read-only, but not for writing.
    ReadOnly,
    /// An earlier sync failed (P5).
    Failed,
}

/// An error with what was being done and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// What kind of error.
    pub kind: ErrorKind,
    /// What was being done, and with what result, as a phrase.
    pub context: String,
    /// Byte offset in the image file, where there is one.
    pub offset: Option<u64>,
}

impl Error {
    pub(crate) fn corrupt(offset: u64, what: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Corrupt, context: what.into(), offset: Some(offset) }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Invalid, context: what.into(), offset: None }
    }

    pub(crate) fn storage(error: StorageError, what: impl Into<String>, offset: u64) -> Self {
        Error { kind: ErrorKind::Storage(error), context: what.into(), offset: Some(offset) }
    }

    /// Turns a decoder's verdict on the structure at `offset` into an error of the image.
    pub(crate) fn decode(error: DecodeError, offset: u64) -> Self {
        match error {
            DecodeError::Corrupt { .. } => Error::corrupt(offset, error.to_string()),
            DecodeError::Foreign => {
                Error { kind: ErrorKind::NotExd, context: error.to_string(), offset: Some(offset) }
            }
            DecodeError::Unsupported { ref features, .. } => Error {
                kind: ErrorKind::Unsupported(features.clone()),
                context: error.to_string(),
                offset: Some(offset),
            },
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        if let ErrorKind::Storage(error) = &self.kind {
            write!(f, ": {error}")?;
        }
        if let Some(offset) = self.offset {
            write!(f, " (at byte {offset} of the image file)")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
