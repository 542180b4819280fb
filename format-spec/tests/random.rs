//! P8: structures with fields overwritten at random and the checksum made right again. Nothing may
//! panic, and what is accepted must encode to the very same bytes.

use exd_format::layout::*;
use exd_format::*;

#[path = "../examples/specimen.rs"]
mod specimen;

/// xorshift64: the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A number of the kind that breaks arithmetic.
    fn number(&mut self) -> u64 {
        let near = (self.next() % 5).wrapping_sub(2);
        match self.below(4) {
            0 => near,
            1 => (1_u64 << self.below(64)).wrapping_add(near),
            2 => u64::MAX.wrapping_add(near),
            _ => self.next(),
        }
    }

    /// Overwrites up to four fields, mostly ones that exist, and makes the checksum right.
    fn damage(&mut self, bytes: &mut [u8], fields: &[FieldInfo]) {
        for _ in 0..=self.below(4) {
            let (offset, size) = if self.below(3) == 0 {
                (self.below(bytes.len() - 8), 1 + self.below(8))
            } else {
                let field = fields[self.below(fields.len())];
                (field.offset, field.size.min(8))
            };
            let number = self.number().to_le_bytes();
            bytes[offset..offset + size].copy_from_slice(&number[..size]);
        }
        seal(bytes);
    }
}

const ROUNDS: usize = 40_000;

fn each_damaged(
    seed: u64,
    index: usize,
    fields: &[FieldInfo],
    mut decode: impl FnMut(&[u8]) -> Option<Vec<u8>>,
) {
    let (_, _, good) = &specimen::structures()[index];
    assert_eq!(decode(good).as_ref(), Some(good), "the undamaged structure is accepted");
    let mut random = Random(seed);
    let mut accepted = 0;
    for round in 0..ROUNDS {
        let mut bytes = good.clone();
        random.damage(&mut bytes, fields);
        if let Some(again) = decode(&bytes) {
            assert!(again == bytes, "round {round}: accepted, but encodes otherwise");
            accepted += 1;
        }
    }
    assert!(accepted > 0, "the damage gets past the checksum");
}

fn superblock() -> Superblock {
    Superblock::decode(&specimen::structures()[0].2, 1, None).expect("valid")
}

/// The fields of a structure and of its first two entries.
fn with_entries(
    fields: &[FieldInfo],
    first: usize,
    entry: &[FieldInfo],
    size: usize,
) -> Vec<FieldInfo> {
    let mut all = fields.to_vec();
    for index in 0..2 {
        all.extend(
            entry
                .iter()
                .map(|field| FieldInfo { offset: first + index * size + field.offset, ..*field }),
        );
    }
    all
}

#[test]
fn p8_superblocks() {
    let mut fields = superblock_layout::FIELDS.to_vec();
    for at in [superblock_layout::space_list, superblock_layout::snapshots] {
        fields.extend(
            area_pointer_layout::FIELDS
                .iter()
                .map(|field| FieldInfo { offset: at + field.offset, ..*field }),
        );
    }
    each_damaged(1, 0, &fields, |bytes| {
        let found = Superblock::decode(bytes, 1, None).ok()?;
        if !found.read_only_reasons().is_empty() {
            return Some(bytes.to_vec());
        }
        Some(found.encode(1))
    });
}

#[test]
fn p8_records() {
    let fields = with_entries(
        record_layout::FIELDS,
        RECORD_ENTRIES_OFFSET,
        entry_layout::FIELDS,
        ENTRY_SIZE,
    );
    let superblock = superblock();
    let expected = Expected {
        geometry: superblock.geometry(),
        epoch: 1,
        sequence: 1,
        chain: 0,
        applied: 0,
        through: 0,
        record_bits: 12,
        room: 4096,
    };
    each_damaged(2, 1, &fields, |bytes| {
        examine(bytes, 65536, &superblock.uuid, 12, 4096);
        match classify(bytes, 65536, &expected) {
            Slot::Apply { record, .. } => Some(record.encode()),
            _ => None,
        }
    });
}

#[test]
fn p8_nodes() {
    let fields =
        with_entries(node_layout::FIELDS, ENTRIES_OFFSET, extent_layout::FIELDS, EXTENT_SIZE);
    let superblock = superblock();
    let geometry = superblock.geometry();
    for level in 0..=1 {
        each_damaged(3 + u64::from(level), 2, &fields, |bytes| {
            // As if the parent had been forged to fit.
            let pointer = NodePointer { crc: crc_of(bytes), level, ..superblock.root };
            let node = Node::decode(bytes, &ExpectedNode::root(pointer), &geometry);
            if level == 1 {
                // Extents read as children: nearly always refused, never a panic.
                drop(node);
                return Some(bytes.to_vec());
            }
            node.ok().map(|node| node.encode(4096))
        });
    }
}

#[test]
fn p8_space_lists() {
    let fields = with_entries(
        space_list_layout::FIELDS,
        SPACE_ENTRIES_OFFSET,
        space_range_layout::FIELDS,
        SPACE_RANGE_SIZE,
    );
    let superblock = superblock();
    each_damaged(5, 3, &fields, |bytes| {
        let pointer = AreaPointer { crc: crc_of(bytes), ..superblock.space_list };
        let list = SpaceList::decode(bytes, &pointer, &superblock.geometry()).ok()?;
        Some(list.encode(Some(pointer.length)))
    });
}

#[test]
fn p8_arbitrary_bytes() {
    let mut random = Random(6);
    let superblock = superblock();
    let geometry = superblock.geometry();
    let uuid = &superblock.uuid;
    for _ in 0..ROUNDS {
        let len = random.below(200);
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        let pointer = AreaPointer { length: len as u64, ..superblock.space_list };
        assert!(Superblock::decode(&bytes, 0, None).is_err());
        assert!(Holder::decode(&bytes, uuid).is_err());
        assert!(CompletionLogHeader::decode(&bytes, uuid).is_err());
        assert!(Node::decode(&bytes, &ExpectedNode::root(superblock.root), &geometry).is_err());
        assert!(SpaceList::decode(&bytes, &pointer, &geometry).is_err());
        assert!(!matches!(CompletionSlot::decode(&bytes, uuid, 1), Ok(Some(_))));
        assert_eq!(examine(&bytes, 0, uuid, 9, len as u64), None);
    }
}
