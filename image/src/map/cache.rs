//! The bounded cache of tree nodes.

use super::Mapping;
use super::leaf::Leaf;
use super::leaves::Leaves;
use exd_format::{Extent, InternalEntry, Node, NodeEntries, NodePointer};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A place for a node.
struct Owner {
    pointer: NodePointer,
    body: Body,
    bytes: u64,
    /// Tells this insertion from others; 0 when there is none.
    stamp: u64,
    /// Used since the clock came by. Leaves have it with their lines.
    used: bool,
}

enum Body {
    /// A leaf in its compact form.
    Leaf(u32),
    /// An internal node, or a leaf without a compact form.
    Node(Arc<Node>),
    Nothing,
}

/// A node that was found.
pub(crate) enum Found<'a> {
    /// A leaf, and its number for [`NodeCache::hint`].
    Leaf(Leaf<'a>, u32),
    /// Any other.
    Node(&'a Arc<Node>),
}

/// Nodes by address, evicted by second chance when they outgrow the bound.
pub(crate) struct NodeCache {
    leaves: Leaves,
    owners: Vec<Owner>,
    free: Vec<u32>,
    by_address: HashMap<u64, u32>,
    clock: VecDeque<(u32, u64)>,
    bytes: u64,
    bound: u64,
    stamps: u64,
}

/// Fewer nodes than this would make one lookup evict its own path.
const NODES_MIN: usize = 32;

impl NodeCache {
    /// A cache of at most `bound` bytes, for nodes of `node_size` bytes on disk.
    pub(crate) fn new(bound: u64, node_size: u64) -> Self {
        NodeCache {
            leaves: Leaves::new(exd_format::leaf_capacity(node_size as usize), bound),
            owners: Vec::new(),
            free: Vec::new(),
            by_address: HashMap::new(),
            clock: VecDeque::new(),
            bytes: 0,
            bound,
            stamps: 0,
        }
    }

    /// What a leaf knows of `block` and for how many blocks, if there is a hint to it.
    #[inline(always)]
    pub(crate) fn find(&mut self, block: u64, sectors_per_block: u64) -> Option<(Mapping, u64)> {
        self.leaves.find(block, sectors_per_block)
    }

    /// `block` belongs to the leaf of this number.
    pub(crate) fn hint(&mut self, block: u64, number: u32) {
        self.leaves.hint(block, number);
    }

    /// The node that `pointer` means, if it is here.
    pub(crate) fn get(&mut self, pointer: &NodePointer) -> Option<Found<'_>> {
        let number = *self.by_address.get(&pointer.address)?;
        let owner = &mut self.owners[number as usize];
        if owner.pointer != *pointer {
            return None;
        }
        owner.used = true;
        match &owner.body {
            Body::Node(node) => Some(Found::Node(node)),
            Body::Leaf(number) => {
                self.leaves.touch(*number);
                Some(Found::Leaf(self.leaves.leaf(*number), *number))
            }
            Body::Nothing => None,
        }
    }

    /// Adds the node that `pointer` means.
    pub(crate) fn insert(&mut self, pointer: NodePointer, node: Node) {
        self.remove(pointer.address);
        self.stamps += 1;
        let leaf = match &node.entries {
            NodeEntries::Leaf(extents) => self.leaves.insert(extents, node.first, node.end),
            NodeEntries::Internal(_) => None,
        };
        let (body, bytes) = match leaf {
            Some(number) => (Body::Leaf(number), self.leaves.bytes_each()),
            None => {
                let bytes = memory(&node);
                (Body::Node(Arc::new(node)), bytes)
            }
        };
        let bytes = (bytes + size_of::<Owner>() + 64) as u64;
        let owner = Owner { pointer, body, bytes, stamp: self.stamps, used: false };
        let number = match self.free.pop() {
            Some(number) => {
                self.owners[number as usize] = owner;
                number
            }
            None => {
                self.owners.push(owner);
                self.owners.len() as u32 - 1
            }
        };
        self.by_address.insert(pointer.address, number);
        self.clock.push_back((number, self.stamps));
        self.bytes += bytes;
        self.evict();
    }

    pub(crate) fn remove(&mut self, address: u64) {
        let Some(number) = self.by_address.remove(&address) else { return };
        let owner = &mut self.owners[number as usize];
        if let Body::Leaf(number) = owner.body {
            self.leaves.remove(number);
        }
        self.bytes -= owner.bytes;
        (owner.stamp, owner.bytes, owner.body) = (0, 0, Body::Nothing);
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
        self.leaves.hint_bytes()
    }

    fn evict(&mut self) {
        while self.bytes > self.bound && self.by_address.len() > NODES_MIN {
            let Some((number, stamp)) = self.clock.pop_front() else { break };
            let owner = &mut self.owners[number as usize];
            if owner.stamp != stamp {
                continue;
            }
            let mut used = std::mem::take(&mut owner.used);
            if let Body::Leaf(number) = owner.body {
                used |= self.leaves.take_used(number);
            }
            if used {
                self.clock.push_back((number, stamp));
            } else {
                let address = owner.pointer.address;
                self.remove(address);
            }
        }
        if self.clock.len() > 2 * self.by_address.len() + NODES_MIN {
            let owners = &self.owners;
            self.clock.retain(|(number, stamp)| owners[*number as usize].stamp == *stamp);
        }
    }
}

/// What a node costs that is kept as it is.
fn memory(node: &Node) -> usize {
    let entries = match &node.entries {
        NodeEntries::Leaf(extents) => extents.capacity() * size_of::<Extent>(),
        NodeEntries::Internal(entries) => entries.capacity() * size_of::<InternalEntry>(),
    };
    entries + size_of::<Node>()
}
