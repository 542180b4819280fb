//! The bounded cache of tree nodes.

use exd_format::{Extent, InternalEntry, Node, NodeEntries, NodePointer};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

struct Slot {
    pointer: NodePointer,
    node: Arc<Node>,
    bytes: u64,
    referenced: bool,
    /// Tells this insertion from earlier ones at the same address.
    stamp: u64,
}

/// Decoded nodes by address, evicted by second chance when they outgrow the bound.
pub(crate) struct NodeCache {
    slots: HashMap<u64, Slot>,
    clock: VecDeque<(u64, u64)>,
    bytes: u64,
    bound: u64,
    stamps: u64,
}

/// Fewer nodes than this would make one lookup evict its own path.
const NODES_MIN: usize = 32;

impl NodeCache {
    /// A cache of at most `bound` bytes.
    pub(crate) fn new(bound: u64) -> Self {
        NodeCache { slots: HashMap::new(), clock: VecDeque::new(), bytes: 0, bound, stamps: 0 }
    }

    /// The node that `pointer` means, if it is here.
    pub(crate) fn get(&mut self, pointer: &NodePointer) -> Option<Arc<Node>> {
        let slot = self.slots.get_mut(&pointer.address)?;
        if slot.pointer != *pointer {
            return None;
        }
        slot.referenced = true;
        Some(Arc::clone(&slot.node))
    }

    /// Adds the node that `pointer` means.
    pub(crate) fn insert(&mut self, pointer: NodePointer, node: Arc<Node>) {
        let address = pointer.address;
        self.remove(address);
        self.stamps += 1;
        let bytes = node.memory();
        self.slots
            .insert(address, Slot { pointer, node, bytes, referenced: false, stamp: self.stamps });
        self.clock.push_back((address, self.stamps));
        self.bytes += bytes;
        self.evict();
    }

    pub(crate) fn remove(&mut self, address: u64) {
        if let Some(slot) = self.slots.remove(&address) {
            self.bytes -= slot.bytes;
        }
    }

    /// The bound in bytes.
    pub(crate) fn bound(&self) -> u64 {
        self.bound
    }

    /// Bytes held, as estimated by [`NodeMemory`].
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn evict(&mut self) {
        while self.bytes > self.bound && self.slots.len() > NODES_MIN {
            let Some((address, stamp)) = self.clock.pop_front() else { break };
            match self.slots.get_mut(&address) {
                Some(slot) if slot.stamp == stamp && slot.referenced => {
                    slot.referenced = false;
                    self.clock.push_back((address, stamp));
                }
                Some(slot) if slot.stamp == stamp => self.remove(address),
                _ => {}
            }
        }
        if self.clock.len() > 2 * self.slots.len() + NODES_MIN {
            let slots = &self.slots;
            self.clock.retain(|(address, stamp)| {
                slots.get(address).is_some_and(|slot| slot.stamp == *stamp)
            });
        }
    }
}

/// What a decoded node costs.
trait NodeMemory {
    fn memory(&self) -> u64;
}

impl NodeMemory for Node {
    fn memory(&self) -> u64 {
        let entries = match &self.entries {
            NodeEntries::Leaf(extents) => extents.capacity() * size_of::<Extent>(),
            NodeEntries::Internal(entries) => entries.capacity() * size_of::<InternalEntry>(),
        };
        (entries + size_of::<Node>() + size_of::<Slot>() + 64) as u64
    }
}
