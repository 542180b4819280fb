//! The header that every metadata structure begins with.

use crate::checksum;
use crate::error::{DecodeError, ensure};
use crate::fields::{Id16, U32, U64, get_at, located};

/// Bytes of the common header.
pub const HEADER_SIZE: usize = header_layout::SIZE;

structure! {
    /// The common header, as far as its reader does not know it already.
    pub struct Header, header_layout, 40; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// Checkpoint generation or epoch, whichever the structure says.
        generation: u64 as U64 = 8,
        /// Byte offset of the structure in its own file.
        address: u64 as U64 = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
    }
}

/// The four characters a structure begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StructureType {
    /// `EXDS`
    Superblock,
    /// `EXDH`
    Holder,
    /// `EXDN`
    Node,
    /// `EXDJ`
    JournalRecord,
    /// `EXDF`
    SpaceList,
    /// `EXDL`
    CompletionLog,
    /// `EXDT`, not used yet
    SnapshotTable,
    /// `EXDB`, not used yet
    BitmapDirectory,
    /// `EXDE`, not used yet
    EncryptionArea,
    /// `EXDC`, not used yet
    CompressedChunk,
}

impl StructureType {
    /// The characters on disk.
    pub const fn tag(self) -> [u8; 4] {
        match self {
            StructureType::Superblock => *b"EXDS",
            StructureType::Holder => *b"EXDH",
            StructureType::Node => *b"EXDN",
            StructureType::JournalRecord => *b"EXDJ",
            StructureType::SpaceList => *b"EXDF",
            StructureType::CompletionLog => *b"EXDL",
            StructureType::SnapshotTable => *b"EXDT",
            StructureType::BitmapDirectory => *b"EXDB",
            StructureType::EncryptionArea => *b"EXDE",
            StructureType::CompressedChunk => *b"EXDC",
        }
    }

    /// The structure in words, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            StructureType::Superblock => "superblock",
            StructureType::Holder => "holder record",
            StructureType::Node => "tree node",
            StructureType::JournalRecord => "journal record",
            StructureType::SpaceList => "space list",
            StructureType::CompletionLog => "completion log",
            StructureType::SnapshotTable => "snapshot table",
            StructureType::BitmapDirectory => "bitmap directory",
            StructureType::EncryptionArea => "encryption area",
            StructureType::CompressedChunk => "compressed chunk",
        }
    }

    /// Whether `bytes` begin with this type's characters.
    pub(crate) fn begins(self, bytes: &[u8]) -> bool {
        bytes.starts_with(&self.tag())
    }
}

/// Writes type and checksum around the fields already in place.
pub(crate) fn finish(kind: StructureType, bytes: &mut [u8]) {
    bytes[..4].copy_from_slice(&kind.tag());
    checksum::seal(bytes);
}

/// Checks type, checksum, and, where the reader knows them, address and uuid; in that order, so
/// that damage is reported as damage.
pub(crate) fn check(
    kind: StructureType,
    bytes: &[u8],
    address: u64,
    uuid: Option<&[u8; 16]>,
) -> Result<(), DecodeError> {
    let name = kind.name();
    ensure(kind.begins(bytes), name, header_layout::kind, "wrong type")?;
    let crc = get_at::<U32>(bytes, header_layout::crc).map_err(located(name))?;
    ensure(crc == checksum::compute(bytes), name, header_layout::crc, "checksum mismatch")?;
    let found = get_at::<U64>(bytes, header_layout::address).map_err(located(name))?;
    if found != address {
        return Err(DecodeError::corrupt(
            name,
            header_layout::address,
            format!("belongs at byte {found}, found at {address}"),
        ));
    }
    let found = get_at::<Id16>(bytes, header_layout::uuid).map_err(located(name))?;
    ensure(
        uuid.is_none_or(|uuid| *uuid == found),
        name,
        header_layout::uuid,
        "belongs to another image",
    )
}
