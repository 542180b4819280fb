//! Prints the worked example of `SPEC.md`. A test compares the two.

use exd_format::{
    Entry, Extent, ExtentState, JournalRecord, JournalSegment, Node, NodeEntries, Preallocation,
    SpaceKind, SpaceList, SpaceRange, State, Superblock, TREE_END,
};

/// The structures of the example and the byte offsets where they lie.
pub fn structures() -> Vec<(&'static str, u64, Vec<u8>)> {
    let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
    let extent =
        |logical, physical, state, length| Extent { logical, physical, state, length, birth: 1 };
    let leaf = Node {
        generation: 3,
        address: 0x20000,
        uuid,
        first: 0,
        end: TREE_END,
        level: 0,
        entries: NodeEntries::Leaf(vec![
            extent(0, 288, ExtentState::Written, 1),
            extent(16, 296, ExtentState::Unwritten, 4),
        ]),
    };
    let leaf_bytes = leaf.encode(4096);
    let list = SpaceList {
        generation: 3,
        address: 0x21000,
        uuid,
        ranges: vec![SpaceRange { start: 328, kind: SpaceKind::Open, sectors: 24 }],
    };
    let list_bytes = list.encode(None);
    let record = JournalRecord {
        epoch: 1,
        address: 0x10000,
        uuid,
        sequence: 1,
        durable: 0,
        through: 2,
        length: 4096,
        chain: 0,
        entries: vec![Entry::map(5, 328, 1, 1), Entry::convert(16, 296, 1, 1)],
    };
    let superblock = Superblock {
        generation: 3,
        uuid,
        version_minor: 0,
        block_bits: 12,
        record_bits: 12,
        node_bits: 12,
        state: State::InUse,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        autoclear: 0,
        virtual_size: 1 << 20,
        epoch: 1,
        applied: 0,
        root: leaf.pointer(&leaf_bytes),
        extent_count: 2,
        node_count: 1,
        journal_tail: 0,
        tail_sequence: 1,
        tail_chain: 0,
        space_list: list.pointer(&list_bytes),
        data_end: 180_224,
        birth: 1,
        preallocation: Preallocation::Off,
        snapshots: Default::default(),
        bitmaps: Default::default(),
        encryption: Default::default(),
        created: 1_700_000_000,
        flags: 0,
        segments: vec![JournalSegment { offset: 0x10000, length: 0x10000 }],
        backing_path: String::new(),
        backing_format: String::new(),
        data_file_path: String::new(),
        completion_log_path: String::new(),
    };
    vec![
        ("superblock, slot 1", 4096, superblock.encode(1)),
        ("journal record", record.address, record.encode()),
        ("leaf", leaf.address, leaf_bytes),
        ("space list", list.address, list_bytes),
    ]
}

/// The lines of 16 bytes that are not all zero, with the file offset in front of each.
pub fn dump() -> String {
    let mut text = String::new();
    for (name, address, bytes) in structures() {
        text += &format!("# {name}\n");
        for (index, line) in bytes.chunks(16).enumerate() {
            if line.iter().any(|&byte| byte != 0) {
                text += &format!("{:05x} ", address as usize + index * 16);
                for byte in line {
                    text += &format!(" {byte:02x}");
                }
                text.push('\n');
            }
        }
    }
    text
}

#[allow(dead_code)]
fn main() {
    print!("{}", dump());
}
