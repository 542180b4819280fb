//! What the tests of several structures share.

use crate::error::DecodeError;
use crate::{Geometry, JournalSegment, NodePointer, Preallocation, State, Superblock, seal};

pub(crate) const UUID: [u8; 16] = *b"an image's uuid.";

/// A superblock of an image in use with a tree and a two-segment ring.
pub(crate) fn superblock() -> Superblock {
    Superblock {
        generation: 7,
        uuid: UUID,
        version_minor: 0,
        block_bits: 12,
        record_bits: 12,
        node_bits: 12,
        state: State::InUse,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        autoclear: 0,
        virtual_size: 1 << 30,
        epoch: 3,
        applied: 41,
        root: NodePointer { address: 0x80000, generation: 6, crc: 0x1234_5678, level: 1 },
        extent_count: 170,
        node_count: 3,
        journal_tail: 0x12000,
        tail_sequence: 20,
        tail_chain: 0xABCD,
        space_list: crate::AreaPointer { address: 0x81000, length: 4096, crc: 9 },
        data_end: 0x100_0000,
        birth: 2,
        preallocation: Preallocation::Metadata,
        snapshots: Default::default(),
        bitmaps: Default::default(),
        encryption: Default::default(),
        created: 1_700_000_000,
        flags: 0,
        segments: vec![
            JournalSegment { offset: 0x40000, length: 0x40000 },
            JournalSegment { offset: 0x10000, length: 0x10000 },
        ],
        backing_path: String::new(),
        backing_format: String::new(),
        data_file_path: String::new(),
        completion_log_path: "/run/exd/log".to_owned(),
    }
}

pub(crate) fn geometry() -> Geometry {
    superblock().geometry()
}

/// Flips each bit of `bytes` in turn; `accepted` must be false for all of them.
pub(crate) fn each_bit_flip(bytes: &[u8], accepted: impl Fn(&[u8]) -> bool) {
    let mut damaged = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(!accepted(&damaged), "flip of bit {} of byte {} not seen", bit % 8, bit / 8);
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(accepted(&damaged), "the undamaged bytes are accepted");
}

/// Flips each bit, makes the checksum right again and hands the bytes over: nothing may panic, and
/// what is accepted must encode to the same bytes.
pub(crate) fn each_sealed_flip(bytes: &[u8], reencode: impl Fn(&[u8]) -> Option<Vec<u8>>) {
    for bit in 0..bytes.len() * 8 {
        if (4..8).contains(&(bit / 8)) {
            continue; // The checksum itself.
        }
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        seal(&mut damaged);
        if let Some(again) = reencode(&damaged) {
            assert!(again == damaged, "bit {} of byte {}: two encodings", bit % 8, bit / 8);
        }
    }
}

/// Overwrites bytes at `offset` and makes the checksum right again.
pub(crate) fn patched(bytes: &[u8], offset: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[offset..offset + patch.len()].copy_from_slice(patch);
    seal(&mut bytes);
    bytes
}

/// The text of a corruption; panics on anything else.
#[track_caller]
pub(crate) fn corruption<T: std::fmt::Debug>(result: Result<T, DecodeError>) -> String {
    match result {
        Err(error @ DecodeError::Corrupt { .. }) => error.to_string(),
        other => panic!("expected a corruption, got {other:?}"),
    }
}
