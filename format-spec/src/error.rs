//! Why bytes were refused.

use std::borrow::Cow;
use std::fmt;

/// Why a structure could not be decoded. Failing to read the bytes is the caller's own error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DecodeError {
    /// The bytes are not what a correct writer left: damage, or a hostile image.
    Corrupt {
        /// The structure, in words.
        structure: &'static str,
        /// Byte offset of the offending field within the structure.
        offset: u64,
        /// What is wrong with it.
        what: Cow<'static, str>,
    },
    /// A valid superblock that asks for something this code does not have.
    Unsupported {
        /// What is missing, by name.
        features: Vec<String>,
        /// Generation of the superblock that asks for it.
        generation: u64,
    },
    /// No superblock and nothing that was one: probably not an EXD image.
    Foreign,
}

impl DecodeError {
    /// A corruption of `structure` at `offset` in it.
    pub fn corrupt(
        structure: &'static str,
        offset: usize,
        what: impl Into<Cow<'static, str>>,
    ) -> DecodeError {
        DecodeError::Corrupt { structure, offset: offset as u64, what: what.into() }
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Corrupt { structure, offset, what } => {
                write!(f, "{structure} is corrupt at byte {offset} of it: {what}")
            }
            DecodeError::Unsupported { features, .. } => {
                write!(f, "the image needs unsupported features: {}", features.join(", "))
            }
            DecodeError::Foreign => write!(f, "not an EXD superblock"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// Shorthand of the validators: `Ok` if the condition holds, else a corruption.
pub(crate) fn ensure(
    condition: bool,
    structure: &'static str,
    offset: usize,
    what: &'static str,
) -> Result<(), DecodeError> {
    if condition { Ok(()) } else { Err(DecodeError::corrupt(structure, offset, what)) }
}
