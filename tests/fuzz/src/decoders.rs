//! Every decoder of the codec on arbitrary bytes.

use crate::base::Base;
use crate::patch::Input;
use exd_format::{
    AreaPointer, CompletionLogHeader, CompletionSlot, Entry, Expected, ExpectedNode, Geometry,
    Holder, Node, NodePointer, Slot, SpaceList, Superblock, choose, classify, crc_of, examine,
    seal,
};

const HEADER: usize = 40;

/// What the structures are decoded against.
fn geometry() -> Geometry {
    static CHOICE: std::sync::OnceLock<Geometry> = std::sync::OnceLock::new();
    *CHOICE.get_or_init(|| {
        let bytes = Base::any(0).memory.bytes(0, 4096);
        Superblock::decode(&bytes, 0, None).expect("the base has a superblock").geometry()
    })
}

/// A structure of `len` bytes with the input as its content. An even `flags` makes header and checksum
/// right, so that the rest is looked at.
fn structure(input: &[u8], kind: &[u8; 4], address: u64, len: usize, flags: u8) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let from = if flags & 1 == 0 { HEADER } else { 0 };
    for (place, byte) in bytes[from..].iter_mut().zip(input) {
        *place = *byte;
    }
    if flags & 1 == 0 {
        bytes[..4].copy_from_slice(kind);
        bytes[8..16].copy_from_slice(&1u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&address.to_le_bytes());
        bytes[24..40].copy_from_slice(&geometry().uuid);
        seal(&mut bytes);
    }
    bytes
}

/// Decodes the bytes as whatever the first of them says. What is accepted is encoded to the same bytes.
pub fn decode(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.byte();
    let flags = input.byte();
    let rest = data.get(2..).unwrap_or_default();
    match kind % 8 {
        0 => superblock(rest, flags),
        1 => node(rest, flags),
        2 => space_list(rest, flags),
        3 => record(rest, flags),
        4 => holder(rest, flags),
        5 => log_header(rest, flags),
        6 => slot(rest),
        _ => entry(rest),
    }
}

fn superblock(input: &[u8], flags: u8) {
    let mut bytes = structure(input, b"EXDS", 0, 4096, flags);
    if flags & 2 != 0 {
        // A superblock in order with changes: offset and value of each.
        bytes = Base::any(flags >> 4).memory.bytes(0, 4096);
        for change in input.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
            bytes[at] = change[2];
        }
        seal(&mut bytes);
    }
    let first = Superblock::decode(&bytes, 0, None);
    if let Ok(found) = &first
        && found.read_only_reasons().is_empty()
        && found.version_minor == 0
    {
        assert_eq!(found.encode(0), bytes, "one encoding of every value");
    }
    let mut other = bytes;
    other[16..24].copy_from_slice(&4096u64.to_le_bytes());
    seal(&mut other);
    let _ = choose(first, Superblock::decode(&other, 1, None));
}

fn node(input: &[u8], flags: u8) {
    let geometry = geometry();
    let address = 1 << 17;
    let mut bytes = structure(input, b"EXDN", address, geometry.node_size() as usize, flags);
    if flags & 2 != 0 {
        bytes[56..58].copy_from_slice(&u16::from(flags >> 2).to_le_bytes());
        seal(&mut bytes);
    }
    let pointer = NodePointer { address, generation: 1, crc: crc_of(&bytes), level: bytes[58] };
    if let Ok(found) = Node::decode(&bytes, &ExpectedNode::root(pointer), &geometry) {
        assert_eq!(found.encode(bytes.len()), bytes, "one encoding of every value");
        for i in 0..1 + found.entries.len() {
            let _ = found.expected_child(i);
        }
    }
}

fn space_list(input: &[u8], flags: u8) {
    let address = 1 << 17;
    let len = 4096 * (1 + usize::from(flags >> 6));
    let mut bytes = structure(input, b"EXDF", address, len, flags);
    if flags & 2 != 0 {
        bytes[48..56].copy_from_slice(&(len as u64).to_le_bytes());
        seal(&mut bytes);
    }
    let pointer = AreaPointer { address, length: len as u64, crc: crc_of(&bytes) };
    if let Ok(found) = SpaceList::decode(&bytes, &pointer, &geometry()) {
        assert_eq!(found.encode(Some(len as u64)), bytes, "one encoding of every value");
    }
}

fn record(input: &[u8], flags: u8) {
    let geometry = geometry();
    let address = 65536;
    let len = 512 * (1 + usize::from(flags >> 4));
    let mut bytes = structure(input, b"EXDJ", address, len, flags);
    if flags & 2 != 0 {
        bytes[64..68].copy_from_slice(&(len as u32).to_le_bytes());
        seal(&mut bytes);
    }
    let number = |at: usize| {
        bytes[at..].first_chunk().map_or(0, |field: &[u8; 8]| u64::from_le_bytes(*field))
    };
    let (sequence, through) = (number(40), number(56));
    let expected = Expected {
        geometry,
        record_bits: 9,
        room: len as u64,
        epoch: 1,
        sequence,
        chain: u32::from_le_bytes([bytes[68], bytes[69], bytes[70], bytes[71]]),
        through: if flags & 4 != 0 { 0 } else { through.saturating_sub(1) },
        applied: if flags & 8 != 0 { 0 } else { through },
    };
    let _ = examine(&bytes, address, &geometry.uuid, 9, len as u64);
    if let Slot::Apply { record, .. } = classify(&bytes, address, &expected) {
        assert_eq!(record.encode(), bytes, "one encoding of every value");
        assert!(record.numbered().count() <= len / 24, "no more entries than fit");
    }
}

fn holder(input: &[u8], flags: u8) {
    let bytes = structure(input, b"EXDH", 8192, 4096, flags);
    if let Ok(found) = Holder::decode(&bytes, &geometry().uuid) {
        assert_eq!(found.encode(), bytes, "one encoding of every value");
    }
}

fn log_header(input: &[u8], flags: u8) {
    let mut bytes = structure(input, b"EXDL", 0, 4096, flags);
    if flags & 2 != 0 {
        bytes[76..80].copy_from_slice(&40u32.to_le_bytes());
        crate::patch::seal_log(&mut bytes);
    }
    if let Ok(found) = CompletionLogHeader::decode(&bytes, &geometry().uuid) {
        assert_eq!(found.encode(), bytes, "one encoding of every value");
        assert!(found.file_length() <= 4096 + (40 << 24), "a log is of bounded length");
        let _ = found.slot_offset(u64::MAX);
    }
}

fn slot(input: &[u8]) {
    let _ = CompletionSlot::decode(input, &geometry().uuid, 1);
    let bytes = full::<40>(input);
    let _ = CompletionSlot::classify(&bytes, &geometry(), 1, 1);
}

fn full<const N: usize>(input: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| input.get(i).copied().unwrap_or(0))
}

fn entry(input: &[u8]) {
    // A slot in order around the entry, so that it is looked at.
    let geometry = geometry();
    let mut log = vec![0; 4096 + 40];
    log[24..40].copy_from_slice(&geometry.uuid);
    log[4096..4120].copy_from_slice(&full::<24>(input));
    log[4120] = 1;
    log[4128] = 1;
    crate::patch::seal_log(&mut log);
    let found = CompletionSlot::classify(&log[4096..], &geometry, 1, 1);
    if let exd_format::LogSlot::Apply(entry) = found {
        check_entry(&entry, &geometry, input);
    }
}

fn check_entry(entry: &Entry, geometry: &Geometry, input: &[u8]) {
    assert_eq!(entry.to_bytes(), full::<24>(input), "one encoding of every value");
    let _ = (entry.place(geometry.block_bits), entry.is_space(), entry.keeps(), entry.has_more());
}
