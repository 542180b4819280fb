//! The on-disk codec of EXD, a crash-safe virtual disk image format.
//!
//! Bytes to types and back, and nothing else: no I/O, no `unsafe`, no panic on any input, no
//! allocation larger than the bytes handed in. The normative text is `SPEC.md` beside this crate;
//! a test compares its tables with the offsets declared here.
//!
//! * `encode` seals the checksum. It asserts that what it is given is valid: writing an invalid
//!   structure would be a bug of ours.
//! * `decode` checks everything that can be checked without reading anything else, and accepts
//!   only bytes that `encode` would have produced (there is one encoding of each value).
#![forbid(unsafe_code)]

#[macro_use]
mod fields;

mod checksum;
mod completion_log;
mod error;
mod extent;
pub mod features;
mod header;
mod holder;
mod journal;
mod node;
mod space;
mod superblock;
#[cfg(test)]
mod testing;

pub use checksum::{crc_of, seal};
pub use completion_log::{
    COMPLETION_LOG_HEADER_SIZE, COMPLETION_SLOT_SIZE, CompletionLogHeader, CompletionSlot,
    FLAG_SYNC_FAILED, LogSlot, SLOT_COUNT_MAX,
};
pub use error::DecodeError;
pub use extent::{Extent, ExtentState};
pub use fields::FieldInfo;
pub use header::{HEADER_SIZE, StructureType};
pub use holder::{HOLDER_OFFSET, HOLDER_SIZE, Holder};
pub use journal::{
    ENTRY_SIZE, Entry, EntryKind, Expected, FLAG_KEEP, FLAG_MORE, JournalRecord,
    RECORD_ENTRIES_OFFSET, RECORD_MAX, RecordSummary, Slot, SlotCase, SlotFacts, classify,
    contradicts_end, decide, entries_per_record, examine, length_for,
};
pub use node::{
    ENTRIES_OFFSET, EXTENT_SIZE, ExpectedNode, INTERNAL_ENTRY_SIZE, InternalEntry, LEVEL_MAX, Node,
    NodeEntries, NodePointer, TREE_END, internal_capacity, leaf_capacity,
};
pub use space::{
    SPACE_ENTRIES_OFFSET, SPACE_LIST_MAX, SPACE_RANGE_SIZE, SpaceKind, SpaceList, SpaceRange,
};
pub use superblock::{
    AreaPointer, COUNTER_MAX, Choice, FIXED_AREA, Geometry, JournalSegment, MAGIC, Preallocation,
    RING_MAX, SEGMENT_ALIGN, SEGMENTS_MAX, SUPERBLOCK_SIZE, State, Superblock, VERSION_MAJOR,
    VERSION_MINOR, choose,
};

/// Bytes in a sector: the unit of physical addresses in extents and entries.
pub const SECTOR: u64 = 512;
/// Smallest block: 512 bytes.
pub const BLOCK_BITS_MIN: u8 = 9;
/// Largest block: 64 KiB.
pub const BLOCK_BITS_MAX: u8 = 16;
/// Block of an image made without naming one: 4 KiB.
pub const BLOCK_BITS_DEFAULT: u8 = 12;
/// Smallest alignment of journal records: 512 bytes.
pub const RECORD_BITS_MIN: u8 = 9;
/// Largest alignment of journal records: 64 KiB.
pub const RECORD_BITS_MAX: u8 = 16;
/// Default alignment of journal records: 4 KiB.
pub const RECORD_BITS_DEFAULT: u8 = 12;
/// Smallest tree node: 4 KiB.
pub const NODE_BITS_MIN: u8 = 12;
/// Largest tree node: 64 KiB.
pub const NODE_BITS_MAX: u8 = 16;
/// Default size of a tree node: 4 KiB.
pub const NODE_BITS_DEFAULT: u8 = 12;
/// Alignment in bytes of everything that is metadata except journal segments and records.
pub const METADATA_ALIGN: u64 = 4096;
/// Largest virtual disk in bytes.
pub const VIRTUAL_SIZE_MAX: u64 = 1 << 56;
/// End of what a physical address can name, in bytes (48 bits of sectors).
pub const PHYSICAL_END: u64 = 1 << 57;

/// The tables of field offsets, one module for each structure, as in `SPEC.md`.
pub mod layout {
    pub use crate::completion_log::{completion_log_layout, completion_slot_layout};
    pub use crate::extent::extent_layout;
    pub use crate::header::header_layout;
    pub use crate::holder::holder_layout;
    pub use crate::journal::{entry_layout, record_layout};
    pub use crate::node::{internal_entry_layout, node_layout, node_pointer_layout};
    pub use crate::space::{space_list_layout, space_range_layout};
    pub use crate::superblock::{area_pointer_layout, segment_layout, superblock_layout};
}
