//! Nodes of the extent tree.

use crate::error::{DecodeError, ensure};
use crate::extent::{Extent, extent_layout};
use crate::fields::{Id16, U8, U16, U32, U64, check_zero, get_at, located, put_at};
use crate::header::{self, StructureType};
use crate::superblock::{FIXED_AREA, Geometry};
use crate::{METADATA_ALIGN, checksum};

/// Highest level a node can have; leaves have level 0.
pub const LEVEL_MAX: u8 = 15;
/// No node covers blocks at or past this one.
pub const TREE_END: u64 = 1 << 63;
/// Byte offset of the first entry in a node.
pub const ENTRIES_OFFSET: usize = node_layout::SIZE;
/// Bytes of an extent in a leaf.
pub const EXTENT_SIZE: usize = extent_layout::SIZE;
/// Bytes of an entry of an internal node.
pub const INTERNAL_ENTRY_SIZE: usize = internal_entry_layout::SIZE;

const NAME: &str = "tree node";

/// Extents that fit into a leaf of `node_size` bytes.
pub const fn leaf_capacity(node_size: usize) -> usize {
    node_size.saturating_sub(ENTRIES_OFFSET) / EXTENT_SIZE
}

/// Children that fit into an internal node of `node_size` bytes.
pub const fn internal_capacity(node_size: usize) -> usize {
    node_size.saturating_sub(ENTRIES_OFFSET) / INTERNAL_ENTRY_SIZE
}

structure! {
    /// Where a node lies and how to know it. All zero: there is none.
    #[derive(Copy, Default, Hash)]
    pub struct NodePointer, node_pointer_layout, 24; {
        /// Byte offset in the image file, a multiple of 4096.
        address: u64 as U64 = 0,
        /// Generation in the node's header.
        generation: u64 as U64 = 8,
        /// Checksum in the node's header.
        crc: u32 as U32 = 16,
        /// Level of the node.
        level: u8 as U8 = 20,
        [3] = 21,
    }
}
nested!(NodePointer, node_pointer_layout);

impl NodePointer {
    /// Whether it points at nothing.
    pub fn is_none(&self) -> bool {
        self.address == 0
    }

    /// Checks a pointer that lies at `offset` in `structure`.
    pub(crate) fn validate(
        &self,
        geometry: &Geometry,
        structure: &'static str,
        offset: usize,
    ) -> Result<(), DecodeError> {
        ensure(
            self.address.is_multiple_of(METADATA_ALIGN)
                && self.address >= FIXED_AREA
                && self
                    .address
                    .checked_add(geometry.node_size())
                    .is_some_and(|end| end <= geometry.data_end),
            structure,
            offset,
            "node pointer outside the image's data or not aligned to 4096",
        )?;
        ensure(
            (1..=geometry.generation).contains(&self.generation),
            structure,
            offset + node_pointer_layout::generation,
            "node pointer of an impossible generation",
        )?;
        ensure(
            self.level <= LEVEL_MAX,
            structure,
            offset + node_pointer_layout::level,
            "node level above 15",
        )
    }
}

structure! {
    /// An entry of an internal node: a child and the first block it covers.
    #[derive(Copy)]
    pub struct InternalEntry, internal_entry_layout, 32; {
        /// First block the child covers.
        key: u64 as U64 = 0,
        /// The child.
        child: NodePointer as NodePointer = 8,
    }
}
nested!(InternalEntry, internal_entry_layout);

/// What a node holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeEntries {
    /// Level 0: extents, sorted and disjoint.
    Leaf(Vec<Extent>),
    /// Level 1 and above: children, sorted by key.
    Internal(Vec<InternalEntry>),
}

impl Default for NodeEntries {
    fn default() -> NodeEntries {
        NodeEntries::Leaf(Vec::new())
    }
}

impl NodeEntries {
    /// Number of entries.
    pub fn len(&self) -> usize {
        match self {
            NodeEntries::Leaf(extents) => extents.len(),
            NodeEntries::Internal(children) => children.len(),
        }
    }

    /// Whether there are none (which no node on disk may have).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn capacity(&self, node_size: usize) -> usize {
        match self {
            NodeEntries::Leaf(_) => leaf_capacity(node_size),
            NodeEntries::Internal(_) => internal_capacity(node_size),
        }
    }
}

structure! {
    /// A node of the extent tree.
    pub struct Node, node_layout, 64; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// The checkpoint that wrote it.
        generation: u64 as U64 = 8,
        /// Its byte offset in the image file.
        address: u64 as U64 = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        /// First block it covers.
        first: u64 as U64 = 40,
        /// One past the last block it covers.
        end: u64 as U64 = 48,
        (count: U16) = 56,
        /// 0 for a leaf.
        level: u8 as U8 = 58,
        [5] = 59,
    }
    also {
        /// Extents or children.
        entries: NodeEntries,
    }
}

/// What a reader knows of a node before reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpectedNode {
    /// The pointer that leads to it.
    pub pointer: NodePointer,
    /// The first block it covers: its key in the parent, 0 for the root.
    pub first: u64,
    /// It covers nothing at or past this block: the next key in the parent or the parent's end;
    /// [`TREE_END`] for the root.
    pub end: u64,
}

impl ExpectedNode {
    /// What is known of the root.
    pub fn root(pointer: NodePointer) -> ExpectedNode {
        ExpectedNode { pointer, first: 0, end: TREE_END }
    }
}

impl Node {
    /// The pointer to this node, given its encoding.
    pub fn pointer(&self, encoded: &[u8]) -> NodePointer {
        NodePointer {
            address: self.address,
            generation: self.generation,
            crc: checksum::crc_of(encoded),
            level: self.level,
        }
    }

    /// What is known of child number `index` before reading it.
    pub fn expected_child(&self, index: usize) -> Option<ExpectedNode> {
        let NodeEntries::Internal(children) = &self.entries else { return None };
        let entry = children.get(index)?;
        let end = children.get(index + 1).map_or(self.end, |next| next.key);
        Some(ExpectedNode { pointer: entry.child, first: entry.key, end })
    }

    /// The `node_size` bytes of the node, sealed. Asserts that the node is well formed.
    pub fn encode(&self, node_size: usize) -> Vec<u8> {
        assert!(
            self.entries.len() <= self.entries.capacity(node_size),
            "too many entries for a node"
        );
        if let Err(error) = self.validate_shape() {
            panic!("encoding an invalid node: {error}");
        }
        let mut bytes = vec![0; node_size];
        self.put_fields(&mut bytes);
        put_at::<U16>(&(self.entries.len() as u16), &mut bytes, node_layout::count);
        match &self.entries {
            NodeEntries::Leaf(extents) => {
                for (index, extent) in extents.iter().enumerate() {
                    put_at::<Extent>(extent, &mut bytes, ENTRIES_OFFSET + index * EXTENT_SIZE);
                }
            }
            NodeEntries::Internal(children) => {
                for (index, child) in children.iter().enumerate() {
                    let at = ENTRIES_OFFSET + index * INTERNAL_ENTRY_SIZE;
                    put_at::<InternalEntry>(child, &mut bytes, at);
                }
            }
        }
        header::finish(StructureType::Node, &mut bytes);
        bytes
    }

    /// Decodes a node and checks it against the pointer that led to it and against the image.
    pub fn decode(
        bytes: &[u8],
        expected: &ExpectedNode,
        geometry: &Geometry,
    ) -> Result<Node, DecodeError> {
        use node_layout as at;
        ensure(bytes.len() as u64 == geometry.node_size(), NAME, 0, "not the node size")?;
        let pointer = &expected.pointer;
        header::check(StructureType::Node, bytes, pointer.address, Some(&geometry.uuid))?;
        let mut node = Node::get_fields(bytes).map_err(located(NAME))?;
        Node::check_reserved(bytes).map_err(located(NAME))?;
        ensure(
            checksum::crc_of(bytes) == pointer.crc,
            NAME,
            at::crc,
            "not the node its parent points at (other checksum)",
        )?;
        ensure(
            node.generation == pointer.generation && node.generation <= geometry.generation,
            NAME,
            at::generation,
            "not the generation its parent points at",
        )?;
        ensure(node.level == pointer.level, NAME, at::level, "not the level its parent says")?;
        ensure(node.first == expected.first, NAME, at::first, "not the range its parent says")?;
        ensure(node.end <= expected.end, NAME, at::end, "reaches past the range its parent says")?;
        let count = usize::from(get_at::<U16>(bytes, at::count).map_err(located(NAME))?);
        node.entries = decode_entries(bytes, node.level, count).map_err(located(NAME))?;
        node.validate_shape()?;
        node.validate_entries(geometry)?;
        Ok(node)
    }

    /// What can be checked without the image's geometry.
    fn validate_shape(&self) -> Result<(), DecodeError> {
        use node_layout as at;
        ensure(self.level <= LEVEL_MAX, NAME, at::level, "level above 15")?;
        ensure(
            self.first < self.end && self.end <= TREE_END,
            NAME,
            at::first,
            "does not cover a range of blocks",
        )?;
        ensure(!self.entries.is_empty(), NAME, at::count, "no entries")?;
        match &self.entries {
            NodeEntries::Leaf(extents) => {
                ensure(self.level == 0, NAME, at::level, "extents above level 0")?;
                self.validate_order(extents)
            }
            NodeEntries::Internal(children) => {
                ensure(self.level > 0, NAME, at::level, "children at level 0")?;
                self.validate_keys(children)
            }
        }
    }

    fn validate_order(&self, extents: &[Extent]) -> Result<(), DecodeError> {
        let mut covered = self.first;
        for (index, extent) in extents.iter().enumerate() {
            let offset = ENTRIES_OFFSET + index * EXTENT_SIZE;
            ensure(
                extent.logical >= covered && extent.length >= 1,
                NAME,
                offset,
                "extents overlap, are out of order or lie before the node's range",
            )?;
            covered = extent.end();
        }
        ensure(
            covered <= self.end,
            NAME,
            node_layout::end,
            "an extent reaches past the node's range",
        )
    }

    fn validate_keys(&self, children: &[InternalEntry]) -> Result<(), DecodeError> {
        let mut least = self.first;
        for (index, entry) in children.iter().enumerate() {
            let offset = ENTRIES_OFFSET + index * INTERNAL_ENTRY_SIZE;
            ensure(
                entry.key >= least && entry.key < self.end,
                NAME,
                offset,
                "keys are out of order or outside the node's range",
            )?;
            ensure(
                entry.child.level.checked_add(1) == Some(self.level),
                NAME,
                offset + internal_entry_layout::child + node_pointer_layout::level,
                "child is not one level below",
            )?;
            ensure(
                entry.child.generation <= self.generation,
                NAME,
                offset + internal_entry_layout::child + node_pointer_layout::generation,
                "child is younger than its parent",
            )?;
            least = entry.key + 1;
        }
        Ok(())
    }

    fn validate_entries(&self, geometry: &Geometry) -> Result<(), DecodeError> {
        match &self.entries {
            NodeEntries::Leaf(extents) => {
                for (index, extent) in extents.iter().enumerate() {
                    let base = (ENTRIES_OFFSET + index * EXTENT_SIZE) as u64;
                    extent.validate(geometry).map_err(|error| within(error, base))?;
                }
            }
            NodeEntries::Internal(children) => {
                for (index, entry) in children.iter().enumerate() {
                    let offset = ENTRIES_OFFSET + index * INTERNAL_ENTRY_SIZE;
                    entry.child.validate(geometry, NAME, offset + internal_entry_layout::child)?;
                }
            }
        }
        Ok(())
    }
}

/// Reads the entries and checks that the rest of the node is zero.
fn decode_entries(
    bytes: &[u8],
    level: u8,
    count: usize,
) -> Result<NodeEntries, crate::fields::FieldError> {
    const TOO_MANY: crate::fields::FieldError = (node_layout::count, "more entries than fit");
    let (entries, size) = if level == 0 {
        if count > leaf_capacity(bytes.len()) {
            return Err(TOO_MANY);
        }
        let extents = (0..count)
            .map(|index| get_at::<Extent>(bytes, ENTRIES_OFFSET + index * EXTENT_SIZE))
            .collect::<Result<Vec<_>, _>>()?;
        (NodeEntries::Leaf(extents), EXTENT_SIZE)
    } else {
        if count > internal_capacity(bytes.len()) {
            return Err(TOO_MANY);
        }
        let children = (0..count)
            .map(|index| {
                get_at::<InternalEntry>(bytes, ENTRIES_OFFSET + index * INTERNAL_ENTRY_SIZE)
            })
            .collect::<Result<Vec<_>, _>>()?;
        (NodeEntries::Internal(children), INTERNAL_ENTRY_SIZE)
    };
    let used = ENTRIES_OFFSET + count * size;
    check_zero(bytes, used, bytes.len().saturating_sub(used))?;
    Ok(entries)
}

/// Restates an entry's error as one of the structure around it.
fn within(error: DecodeError, base: u64) -> DecodeError {
    match error {
        DecodeError::Corrupt { structure, offset, what } => {
            DecodeError::Corrupt { structure, offset: base + offset, what }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExtentState;
    use crate::testing::{UUID, corruption, each_bit_flip, each_sealed_flip, geometry, patched};

    fn leaf(count: u64) -> Node {
        let extents = (0..count)
            .map(|index| Extent {
                logical: 100 + index * 10,
                physical: 0x1000 + index * 64,
                state: ExtentState::ALL[index as usize % 3],
                length: 8,
                birth: 1,
            })
            .collect();
        Node {
            generation: 6,
            address: 0x90000,
            uuid: UUID,
            first: 50,
            end: 5000,
            level: 0,
            entries: NodeEntries::Leaf(extents),
        }
    }

    fn internal(count: u64) -> Node {
        let children = (0..count)
            .map(|index| InternalEntry {
                key: if index == 0 { 0 } else { index * 1000 },
                child: NodePointer {
                    address: 0xA0000 + index * 4096,
                    generation: 5,
                    crc: 77,
                    level: 1,
                },
            })
            .collect();
        Node {
            generation: 6,
            address: 0x90000,
            uuid: UUID,
            first: 0,
            end: TREE_END,
            level: 2,
            entries: NodeEntries::Internal(children),
        }
    }

    fn expected(node: &Node, bytes: &[u8]) -> ExpectedNode {
        ExpectedNode { pointer: node.pointer(bytes), first: node.first, end: node.end }
    }

    fn decode_as(node: &Node, bytes: &[u8]) -> Result<Node, DecodeError> {
        Node::decode(bytes, &expected(node, bytes), &geometry())
    }

    #[test]
    fn capacities() {
        assert_eq!((leaf_capacity(4096), internal_capacity(4096)), (168, 126));
        assert_eq!((leaf_capacity(65536), internal_capacity(65536)), (2728, 2046));
        assert_eq!(leaf_capacity(10), 0);
    }

    #[test]
    fn round_trip() {
        for node in [leaf(1), leaf(168), internal(1), internal(126)] {
            let bytes = node.encode(4096);
            assert_eq!(bytes.len(), 4096);
            assert_eq!(decode_as(&node, &bytes), Ok(node));
        }
    }

    #[test]
    fn p6_every_bit_flip_is_seen() {
        for node in [leaf(3), internal(3)] {
            let bytes = node.encode(4096);
            let expected = expected(&node, &bytes);
            each_bit_flip(&bytes, |bytes| Node::decode(bytes, &expected, &geometry()).is_ok());
        }
    }

    #[test]
    fn p8_sealed_flips_are_harmless() {
        for node in [leaf(3), internal(3)] {
            let bytes = node.encode(4096);
            each_sealed_flip(&bytes, |bytes| {
                decode_as(&node, bytes).ok().map(|node| node.encode(4096))
            });
        }
    }

    #[test]
    fn p6_a_valid_node_in_the_wrong_place_is_refused() {
        let node = leaf(3);
        let bytes = node.encode(4096);
        let right = expected(&node, &bytes);
        let pointer = right.pointer;
        let wrong = [
            ExpectedNode { pointer: NodePointer { address: 0x91000, ..pointer }, ..right },
            ExpectedNode { pointer: NodePointer { generation: 5, ..pointer }, ..right },
            ExpectedNode { pointer: NodePointer { crc: pointer.crc ^ 1, ..pointer }, ..right },
            ExpectedNode { pointer: NodePointer { level: 1, ..pointer }, ..right },
            ExpectedNode { first: 49, ..right },
            ExpectedNode { first: 51, ..right },
            ExpectedNode { end: 4999, ..right },
        ];
        for expected in wrong {
            corruption(Node::decode(&bytes, &expected, &geometry()));
        }
        let looser = ExpectedNode { end: 5001, ..right };
        assert!(Node::decode(&bytes, &looser, &geometry()).is_ok());
        let other_image = Geometry { uuid: [0; 16], ..geometry() };
        corruption(Node::decode(&bytes, &right, &other_image));
        let older = Geometry { generation: 5, ..geometry() };
        corruption(Node::decode(&bytes, &right, &older));
        let larger = Geometry { node_bits: 13, ..geometry() };
        corruption(Node::decode(&bytes, &right, &larger));
    }

    #[test]
    fn rejects_bad_entries() {
        let first = ENTRIES_OFFSET;
        let second = first + EXTENT_SIZE;
        let node = leaf(2);
        let bytes = node.encode(4096);
        let le = |value: u64| value.to_le_bytes();
        let bad: &[(usize, &[u8])] = &[
            (node_layout::count, &[0, 0]),
            (node_layout::count, &[169, 0]),
            (node_layout::count, &[1, 0]), // The second extent becomes rubbish behind the entries.
            (node_layout::count, &[3, 0]), // The third is all zero.
            (59, &[1]),
            (first, &le(49)),
            (first, &le(103)),
            (second, &le(107)),
            (second, &le(u64::MAX)),
            (second, &le(4993)),
            (first + extent_layout::state, &[4]),
            (first + extent_layout::state, &[0]),
            (first + 14, &[1]),
            (first + extent_layout::length, &[0, 0, 0, 0]),
            (first + extent_layout::length, &[0xFF; 4]),
            (first + extent_layout::physical, &[0; 6]),
            (first + extent_layout::physical, &[0xFF; 6]),
            (first + extent_layout::birth, &[0; 4]),
            (first + extent_layout::birth, &[3, 0, 0, 0]),
            (4095, &[1]),
        ];
        for (offset, patch) in bad {
            let damaged = patched(&bytes, *offset, patch);
            corruption(decode_as(&node, &damaged));
        }
    }

    #[test]
    fn rejects_bad_children() {
        let first = ENTRIES_OFFSET;
        let second = first + INTERNAL_ENTRY_SIZE;
        let child = internal_entry_layout::child;
        let node = internal(2);
        let bytes = node.encode(4096);
        let le = |value: u64| value.to_le_bytes();
        let bad: &[(usize, &[u8])] = &[
            (node_layout::count, &[127, 0]),
            (node_layout::first, &le(1)),
            (second, &le(0)),
            (second, &le(TREE_END)),
            (second, &le(u64::MAX)),
            (second + child, &le(0)),
            (second + child, &le(4096)),
            (second + child, &le(0xA0200)),
            (second + child, &le(geometry().data_end)),
            (second + child, &le(u64::MAX - 4095)),
            (second + child + node_pointer_layout::generation, &le(7)),
            (second + child + node_pointer_layout::generation, &le(0)),
            (second + child + node_pointer_layout::level, &[0]),
            (second + child + node_pointer_layout::level, &[2]),
            (second + child + node_pointer_layout::level, &[255]),
            (second + child + 21, &[1]),
        ];
        for (offset, patch) in bad {
            corruption(decode_as(&node, &patched(&bytes, *offset, patch)));
        }
    }

    #[test]
    fn children_are_expected_between_their_keys() {
        let node = internal(3);
        let range = |index| node.expected_child(index).map(|child| (child.first, child.end));
        assert_eq!(range(0), Some((0, 1000)));
        assert_eq!(range(2), Some((2000, TREE_END)));
        assert_eq!(range(3), None);
        assert_eq!(leaf(1).expected_child(0), None);
    }
}
