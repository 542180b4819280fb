//! Parts of the engine by themselves, for `cargo bench` and for counting instructions. Not for use:
//! nothing here is kept stable.

use super::{Fault, Map, Mapping, NodeCache, Overlay, State, decode_node};
use crate::journal::{Journal, Tail};
use exd_format::{
    Entry, Extent, ExtentState, Geometry, InternalEntry, JournalSegment, Node, NodeEntries,
    NodePointer, TREE_END,
};
use std::collections::HashMap;
use std::hint::black_box;

const SECTORS_PER_BLOCK: u64 = 8;
const NODE_SIZE: usize = 1 << exd_format::NODE_BITS_DEFAULT;
const UUID: [u8; 16] = [7; 16];

/// A map of a tree of extents, without changes.
pub struct Tree {
    map: Map,
    /// Encoded nodes, for those that the cache does not hold.
    stored: HashMap<u64, Vec<u8>>,
    geometry: Geometry,
    /// Nodes that had to be decoded.
    pub misses: u64,
}

impl Tree {
    /// A tree of extents of (first block, blocks), in order. With `stored`, nodes that fall out of the
    /// cache can be had again.
    pub fn new(extents: &[(u64, u32)], cache_bytes: u64, stored: bool) -> Tree {
        let mut tree = Tree {
            map: Map::new(
                NodePointer::default(),
                NodeCache::new(cache_bytes, NODE_SIZE as u64),
                SECTORS_PER_BLOCK,
            ),
            stored: HashMap::new(),
            geometry: Geometry {
                uuid: UUID,
                generation: 1,
                block_bits: 12,
                node_bits: exd_format::NODE_BITS_DEFAULT,
                virtual_size: 1 << 40,
                data_end: exd_format::PHYSICAL_END,
                birth: 1,
            },
            misses: 0,
        };
        let capacity = exd_format::leaf_capacity(NODE_SIZE);
        let mut place = 1 << 20;
        let mut entries: Vec<InternalEntry> = Vec::new();
        let mut chunks = extents.chunks(capacity).peekable();
        while let Some(chunk) = chunks.next() {
            let first = if entries.is_empty() { 0 } else { chunk[0].0 };
            let end = chunks.peek().map_or(TREE_END, |next| next[0].0);
            let extents = chunk
                .iter()
                .map(|&(logical, length)| {
                    place += u64::from(length) * SECTORS_PER_BLOCK;
                    let state = ExtentState::Written;
                    Extent { logical, physical: place, state, length, birth: 1 }
                })
                .collect();
            entries.push(tree.add(0, first, end, NodeEntries::Leaf(extents), stored));
        }
        let mut level = 1;
        while entries.len() > 1 {
            let all = std::mem::take(&mut entries);
            let mut chunks = all.chunks(exd_format::internal_capacity(NODE_SIZE)).peekable();
            while let Some(chunk) = chunks.next() {
                let end = chunks.peek().map_or(TREE_END, |next| next[0].key);
                let node = NodeEntries::Internal(chunk.to_vec());
                entries.push(tree.add(level, chunk[0].key, end, node, stored));
            }
            level += 1;
        }
        tree.map.root = entries[0].child;
        tree
    }

    fn add(
        &mut self,
        level: u8,
        first: u64,
        end: u64,
        entries: NodeEntries,
        stored: bool,
    ) -> InternalEntry {
        let address = (1 << 20) + (self.stored.len() as u64 + self.misses) * NODE_SIZE as u64;
        let node = Node { generation: 1, address, uuid: UUID, first, end, level, entries };
        let mut crc = 0;
        if stored {
            let bytes = node.encode(NODE_SIZE);
            crc = exd_format::crc_of(&bytes);
            self.stored.insert(address, bytes);
        } else {
            // Numbers the addresses until all is built.
            self.misses += 1;
        }
        let child = NodePointer { address, generation: 1, crc, level };
        self.map.cache.insert(child, node);
        InternalEntry { key: first, child }
    }

    /// The sector of a block, 0 if it has none.
    pub fn lookup(&mut self, block: u64) -> u64 {
        match self.map.lookup(block, u64::MAX) {
            Ok((mapping, run)) => {
                // The rest of the answer is wanted, too.
                black_box((mapping.birth, run));
                black_box(mapping.state);
                mapping.place
            }
            Err(fault) => self.load(fault, block),
        }
    }

    #[cold]
    fn load(&mut self, fault: Fault, block: u64) -> u64 {
        self.misses += 1;
        let bytes = &self.stored[&fault.pointer.address];
        let node = decode_node(bytes, &fault, &self.geometry).expect("as it was encoded");
        self.map.cache.insert(fault.pointer, node);
        self.lookup(block)
    }

    /// Bytes of the cache, hints included.
    pub fn bytes(&self) -> u64 {
        self.map.cache.bytes() + self.map.cache.hint_bytes()
    }
}

/// Sets single blocks in an overlay, in this order; the number of pieces that come of it.
pub fn set_overlay(blocks: &[u64]) -> usize {
    let mut overlay = Overlay::new(SECTORS_PER_BLOCK);
    for (index, block) in blocks.iter().enumerate() {
        let place = 8 * (index as u64 + 1000);
        overlay.set(*block, 1, Mapping { state: State::Written, place, birth: 1 });
    }
    overlay.len()
}

/// Journals as many entries, a record for each `batch`; the bytes of the records.
pub fn append(entries: u64, batch: usize) -> u64 {
    let segments = vec![JournalSegment { offset: 1 << 20, length: 16 << 20 }];
    let tail = Tail { position: 0, sequence: 1, chain: 0 };
    let mut journal = Journal::new(UUID, 1, segments, 4096, tail, 0);
    let (mut through, mut bytes) = (0, 0);
    let all: Vec<Entry> =
        (0..batch as u64).map(|i| Entry::map(i * 2, 8 * (i + 99), 1, 1)).collect();
    while through < entries {
        through += batch as u64;
        let taken = journal.append(&all, through);
        assert_eq!(taken, Some(batch), "the ring is large enough");
        for (sequence, _, record) in journal.take_unsent() {
            bytes += record.len() as u64;
            journal.ended(sequence, true);
            journal.became_durable(sequence);
        }
        journal.advance_tail(journal.head());
    }
    bytes
}
