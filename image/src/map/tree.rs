//! Lookup in the tree on disk.

use super::cache::Found;
use super::{Mapping, NodeCache};
use crate::bugs::{self, Bug};
use crate::error::Error;
use exd_format::{ExpectedNode, Geometry, Node, NodeEntries, NodePointer, TREE_END};

/// A node that is needed and not in the cache. Load it, insert it, try again.
pub(crate) type Fault = ExpectedNode;

/// Decodes the node that `fault` asked for and checks it against what its parent said (P6).
pub(crate) fn decode_node(bytes: &[u8], fault: &Fault, geometry: &Geometry) -> Result<Node, Error> {
    let decoded = Node::decode(bytes, fault, geometry);
    if decoded.is_err() && bugs::on(Bug::SkipChecksum) {
        let mut sealed = bytes.to_vec();
        exd_format::seal(&mut sealed);
        let pointer = NodePointer { crc: exd_format::crc_of(&sealed), ..fault.pointer };
        let fault = Fault { pointer, ..*fault };
        return Node::decode(&sealed, &fault, geometry)
            .map_err(|error| Error::decode(error, pointer.address));
    }
    decoded.map_err(|error| Error::decode(error, fault.pointer.address))
}

/// What the tree under `root` knows of `block`, and for how many blocks, at most `max`, that holds.
#[inline(always)]
pub(crate) fn lookup_tree(
    cache: &mut NodeCache,
    root: &NodePointer,
    block: u64,
    max: u64,
    sectors_per_block: u64,
) -> Result<(Mapping, u64), Fault> {
    if root.is_none() {
        return Ok((Mapping::HOLE, max.min(TREE_END - block)));
    }
    // Each way answers by itself: where they met, the answer would be copied.
    if let Some((mapping, run)) = cache.find(block, sectors_per_block) {
        return Ok((mapping, run.min(max)));
    }
    walk(cache, *root, block, sectors_per_block).map(|(mapping, run)| (mapping, run.min(max)))
}

/// The way from the root.
#[cold]
fn walk(
    cache: &mut NodeCache,
    root: NodePointer,
    block: u64,
    sectors_per_block: u64,
) -> Result<(Mapping, u64), Fault> {
    let mut fault = Fault::root(root);
    loop {
        let node = match cache.get(&fault.pointer) {
            None => return Err(fault),
            Some(Found::Leaf(leaf, _)) if block >= leaf.end => {
                return Ok((Mapping::HOLE, fault.end - block));
            }
            Some(Found::Leaf(leaf, number)) => {
                let found = leaf.find(block, sectors_per_block);
                cache.hint(block, number);
                return Ok(found);
            }
            Some(Found::Node(node)) => node,
        };
        if block >= node.end {
            return Ok((Mapping::HOLE, fault.end - block));
        }
        match &node.entries {
            NodeEntries::Internal(entries) => {
                let next = entries.partition_point(|entry| entry.key <= block);
                let end = entries.get(next).map_or(node.end, |entry| entry.key);
                let Some(entry) = next.checked_sub(1).and_then(|index| entries.get(index)) else {
                    return Ok((Mapping::HOLE, end - block));
                };
                fault = Fault { pointer: entry.child, first: entry.key, end };
            }
            NodeEntries::Leaf(extents) => {
                let next = extents.partition_point(|extent| extent.logical <= block);
                if let Some(extent) = next.checked_sub(1).and_then(|index| extents.get(index)) {
                    let skip = block - extent.logical;
                    if skip < u64::from(extent.length) {
                        let mapping = Mapping::of_extent(extent);
                        return Ok((
                            mapping.advanced(skip * sectors_per_block),
                            u64::from(extent.length) - skip,
                        ));
                    }
                }
                let end = extents.get(next).map_or(fault.end, |extent| extent.logical);
                return Ok((Mapping::HOLE, end - block));
            }
        }
    }
}
