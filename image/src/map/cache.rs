//! The bounded cache of tree nodes.
//!
//! Leaves are kept in a form that is made for looking up: the keys by themselves, four bytes each, and
//! sixteen bytes for the rest of an extent. From a block to its leaf it is one step: a table of hints,
//! which may be missing or out of date but never wrong, since a leaf says what it covers.

use super::leaf::Leaf;
use exd_format::{Extent, InternalEntry, Node, NodeEntries, NodePointer};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A place for a node, as far as looking up a block needs it: one cache line.
#[repr(align(64))]
struct Slot {
    /// The blocks that a leaf covers; none for other nodes and for no node.
    first: u64,
    end: u64,
    leaf: Leaf,
}

/// The rest of a place for a node.
struct Owner {
    pointer: NodePointer,
    /// An internal node, or a leaf whose keys are too far apart for the compact form.
    node: Option<Arc<Node>>,
    bytes: u64,
    /// Tells this insertion from others; 0 when there is none.
    stamp: u64,
}

/// A node that was found.
pub(crate) enum Found<'a> {
    /// A leaf, and its number for [`NodeCache::hint`].
    Leaf(&'a Leaf, u64, u32),
    /// Any other.
    Node(&'a Arc<Node>),
}

/// Nodes by address, evicted by second chance when they outgrow the bound.
pub(crate) struct NodeCache {
    slots: Vec<Slot>,
    owners: Vec<Owner>,
    /// Used since the clock came by.
    used: Vec<bool>,
    free: Vec<u32>,
    by_address: HashMap<u64, u32>,
    /// Numbers of slots, by the number of a region of blocks. How large a region is, the leaf says.
    hints: Vec<u32>,
    /// Number of leaves by the size of their regions, as a power of two.
    leaves: [u32; 64],
    /// The most frequent sizes.
    sizes: [u32; SIZES],
    clock: VecDeque<(u32, u64)>,
    bytes: u64,
    bound: u64,
    stamps: u64,
}

/// Fewer nodes than this would make one lookup evict its own path.
const NODES_MIN: usize = 32;
/// Fewest and most hints; in between they take at most a sixteenth of the bound.
const HINTS: std::ops::RangeInclusive<u64> = 64..=1 << 24;
/// A leaf has so many regions, up to twice that: the more, the fewer belong to two leaves.
const REGIONS_BITS: u32 = 4;
/// So many sizes of regions are tried. Leaves of other sizes are found from the root.
const SIZES: usize = 3;

impl NodeCache {
    /// A cache of at most `bound` bytes.
    pub(crate) fn new(bound: u64) -> Self {
        NodeCache {
            slots: Vec::new(),
            owners: Vec::new(),
            used: Vec::new(),
            free: Vec::new(),
            by_address: HashMap::new(),
            hints: Vec::new(),
            leaves: [0; 64],
            sizes: [0; SIZES],
            clock: VecDeque::new(),
            bytes: 0,
            bound,
            stamps: 0,
        }
    }

    /// The leaf that covers `block`, if there is a hint.
    pub(crate) fn leaf_of(&mut self, block: u64) -> Option<(&Leaf, u64)> {
        let number = self.sizes.iter().find_map(|size| {
            let hint = *self.hints.get(place_of_hint(block, *size, self.hints.len()))?;
            let slot = self.slots.get(hint as usize)?;
            (slot.first <= block && block < slot.end).then_some(hint)
        })?;
        let used = &mut self.used[number as usize];
        if !*used {
            *used = true;
        }
        let slot = &self.slots[number as usize];
        Some((&slot.leaf, slot.end))
    }

    /// The leaf for `block` was found in the slot of this number.
    pub(crate) fn hint(&mut self, block: u64, number: u32) {
        let wanted = self.wanted_hints();
        if self.hints.len() < wanted {
            // Hints are only hints: those there were are found again.
            self.hints = vec![u32::MAX; wanted];
        }
        let size = self.slots[number as usize].region_size();
        let at = place_of_hint(block, size, self.hints.len());
        self.hints[at] = number;
    }

    /// As many hints as the leaves there are can use, and the bound allows.
    fn wanted_hints(&self) -> usize {
        let most = (self.bound / 64).clamp(*HINTS.start(), *HINTS.end());
        let useful = 64 * self.slots.len() as u64;
        1 << useful.clamp(*HINTS.start(), most).ilog2()
    }

    /// A leaf with regions of this size has come, or gone.
    fn count_leaf(&mut self, size: u32, come: bool) {
        let count = &mut self.leaves[size as usize];
        *count = if come { *count + 1 } else { *count - 1 };
        let mut sizes: [u32; 64] = std::array::from_fn(|size| size as u32);
        sizes.sort_by_key(|size| std::cmp::Reverse(self.leaves[*size as usize]));
        self.sizes.copy_from_slice(&sizes[..SIZES]);
    }

    /// The node that `pointer` means, if it is here.
    pub(crate) fn get(&mut self, pointer: &NodePointer) -> Option<Found<'_>> {
        let number = *self.by_address.get(&pointer.address)?;
        let owner = &self.owners[number as usize];
        if owner.pointer != *pointer {
            return None;
        }
        self.used[number as usize] = true;
        let slot = &self.slots[number as usize];
        Some(match &owner.node {
            Some(node) => Found::Node(node),
            None => Found::Leaf(&slot.leaf, slot.end, number),
        })
    }

    /// Adds the node that `pointer` means.
    pub(crate) fn insert(&mut self, pointer: NodePointer, node: Node) {
        self.remove(pointer.address);
        self.stamps += 1;
        let leaf = match &node.entries {
            NodeEntries::Leaf(extents) => Leaf::new(extents),
            NodeEntries::Internal(_) => None,
        };
        let (slot, node) = match leaf {
            Some(leaf) => (Slot { first: node.first, end: node.end, leaf }, None),
            None => (Slot { first: 0, end: 0, leaf: Leaf::empty() }, Some(Arc::new(node))),
        };
        let bytes = memory(&slot, node.as_deref());
        if node.is_none() {
            self.count_leaf(slot.region_size(), true);
        }
        let owner = Owner { pointer, node, bytes, stamp: self.stamps };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = slot;
                self.owners[number as usize] = owner;
                self.used[number as usize] = false;
                number
            }
            None => {
                self.slots.push(slot);
                self.owners.push(owner);
                self.used.push(false);
                self.slots.len() as u32 - 1
            }
        };
        self.by_address.insert(pointer.address, number);
        self.clock.push_back((number, self.stamps));
        self.bytes += bytes;
        self.evict();
    }

    pub(crate) fn remove(&mut self, address: u64) {
        if let Some(number) = self.by_address.remove(&address) {
            self.empty(number);
        }
    }

    fn empty(&mut self, number: u32) {
        let empty = Slot { first: 0, end: 0, leaf: Leaf::empty() };
        let slot = std::mem::replace(&mut self.slots[number as usize], empty);
        if !slot.leaf.is_empty() {
            self.count_leaf(slot.region_size(), false);
        }
        let owner = &mut self.owners[number as usize];
        self.bytes -= owner.bytes;
        (owner.stamp, owner.bytes, owner.node) = (0, 0, None);
        self.free.push(number);
    }

    /// The bound in bytes.
    pub(crate) fn bound(&self) -> u64 {
        self.bound
    }

    /// Bytes held by nodes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes held by hints.
    #[cfg(feature = "measure")]
    pub(crate) fn hint_bytes(&self) -> u64 {
        (self.hints.len() * size_of::<u32>()) as u64
    }

    fn evict(&mut self) {
        while self.bytes > self.bound && self.by_address.len() > NODES_MIN {
            let Some((number, stamp)) = self.clock.pop_front() else { break };
            let owner = &self.owners[number as usize];
            if owner.stamp != stamp {
                continue;
            }
            if std::mem::take(&mut self.used[number as usize]) {
                self.clock.push_back((number, stamp));
            } else {
                self.remove(owner.pointer.address);
            }
        }
        if self.clock.len() > 2 * self.by_address.len() + NODES_MIN {
            let owners = &self.owners;
            self.clock.retain(|(number, stamp)| owners[*number as usize].stamp == *stamp);
        }
    }
}

/// The place among `count` hints, a power of two, for the region of a block. Neighbours have places of
/// their own.
fn place_of_hint(block: u64, size: u32, count: usize) -> usize {
    let apart = u64::from(size).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (block >> size).wrapping_add(apart) as usize & count.wrapping_sub(1)
}

impl Slot {
    /// log2 of the blocks of a leaf's regions. The last leaf ends where its extents do: what is behind
    /// them is endless.
    fn region_size(&self) -> u32 {
        let end = self.end.min(self.leaf.last_key() + 1);
        end.saturating_sub(self.first).max(1).ilog2().saturating_sub(REGIONS_BITS)
    }
}

/// What a node costs.
fn memory(slot: &Slot, node: Option<&Node>) -> u64 {
    let node = node.map_or(0, |node| {
        let entries = match &node.entries {
            NodeEntries::Leaf(extents) => extents.capacity() * size_of::<Extent>(),
            NodeEntries::Internal(entries) => entries.capacity() * size_of::<InternalEntry>(),
        };
        entries + size_of::<Node>()
    });
    (slot.leaf.memory() + node + size_of::<Slot>() + size_of::<Owner>() + 64) as u64
}
