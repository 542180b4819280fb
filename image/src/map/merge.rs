//! The checkpoint's work on the tree: merging the frozen overlay into it, copy-on-write.
//!
//! The new tree is written in key order and bottom-up, each node once, as soon as nothing more can
//! join it. Memory is a path of nodes, not the set of changed leaves. Subtrees without changes are
//! taken over by pointer.

use super::cache::Found;
use super::{Fault, Mapping, NodeCache, Overlay, State};
use exd_format::{Extent, InternalEntry, LEVEL_MAX, Node, NodeEntries, NodePointer, TREE_END};

/// A merge under way.
pub(crate) struct Merge {
    uuid: [u8; 16],
    node_size: u64,
    generation: u64,
    sectors_per_block: u64,
    old_root: NodePointer,
    frames: Vec<Frame>,
    started: bool,
    /// Encoded nodes by address, ready to be written.
    writes: Vec<(u64, Vec<u8>)>,
    /// Addresses of nodes the new tree no longer uses, until they are taken out.
    pub(crate) retired: Vec<u64>,
    /// Addresses of nodes the new tree brings, until they are taken out.
    pub(crate) written: Vec<u64>,
    /// By how much the number of extents changes.
    pub(crate) extents_delta: i64,
}

/// How far [`Merge::advance`] came.
#[derive(Debug)]
pub(crate) enum MergeStep {
    /// These nodes are to be written before it goes on.
    Write(Vec<(u64, Vec<u8>)>),
    /// The new tree is complete (after these last nodes are written).
    Done(NodePointer, Vec<(u64, Vec<u8>)>),
    /// There is no room for a node.
    NoSpace,
    /// The tree would get more levels than there can be.
    TooDeep,
}

/// An old internal node whose children are being gone through.
struct Frame {
    children: Vec<InternalEntry>,
    level: u8,
    first: u64,
    end: u64,
    next: usize,
    /// Finished children of the node that replaces it.
    out: Vec<InternalEntry>,
    /// A leaf that the next one may still join.
    open_leaf: Option<OpenLeaf>,
}

struct OpenLeaf {
    first: u64,
    end: u64,
    extents: Vec<Extent>,
}

/// Why a node cannot be made.
enum NoRoom {
    Space,
    Level,
}

type Allocate<'a> = &'a mut dyn FnMut() -> Option<u64>;

impl Merge {
    pub(crate) fn new(
        uuid: [u8; 16],
        node_size: u64,
        generation: u64,
        sectors_per_block: u64,
        old_root: NodePointer,
    ) -> Self {
        Merge {
            uuid,
            node_size,
            generation,
            sectors_per_block,
            old_root,
            frames: Vec::new(),
            started: false,
            writes: Vec::new(),
            retired: Vec::new(),
            written: Vec::new(),
            extents_delta: 0,
        }
    }

    /// Goes on until about `batch` nodes are ready, a node is missing, or all is done.
    pub(crate) fn advance(
        &mut self,
        cache: &mut NodeCache,
        overlay: &Overlay,
        allocate: Allocate<'_>,
        batch: usize,
    ) -> Result<MergeStep, Fault> {
        let step = if self.started {
            self.walk(cache, overlay, allocate, batch)
        } else {
            self.start(cache, overlay, allocate, batch)
        };
        match step {
            Ok(Ok(Some(root))) => Ok(MergeStep::Done(root, std::mem::take(&mut self.writes))),
            Ok(Ok(None)) => Ok(MergeStep::Write(std::mem::take(&mut self.writes))),
            Ok(Err(NoRoom::Space)) => Ok(MergeStep::NoSpace),
            Ok(Err(NoRoom::Level)) => Ok(MergeStep::TooDeep),
            Err(fault) => Err(fault),
        }
    }

    fn start(
        &mut self,
        cache: &mut NodeCache,
        overlay: &Overlay,
        allocate: Allocate<'_>,
        batch: usize,
    ) -> Result<Result<Option<NodePointer>, NoRoom>, Fault> {
        if overlay.is_empty() {
            return Ok(Ok(Some(self.old_root)));
        }
        if self.old_root.is_none() {
            self.started = true;
            let extents = self.merged(&[], overlay, 0, TREE_END);
            return Ok(self.finish_leaf_root(cache, allocate, extents));
        }
        let root = fetch(cache, Fault::root(self.old_root))?;
        self.started = true;
        self.retired.push(self.old_root.address);
        match root {
            Old::Leaf(old) => {
                let extents = self.merged(&old, overlay, 0, TREE_END);
                Ok(self.finish_leaf_root(cache, allocate, extents))
            }
            Old::Internal(children, level) => {
                self.frames.push(Frame::new(children, level, 0, TREE_END));
                self.walk(cache, overlay, allocate, batch)
            }
        }
    }

    fn walk(
        &mut self,
        cache: &mut NodeCache,
        overlay: &Overlay,
        allocate: Allocate<'_>,
        batch: usize,
    ) -> Result<Result<Option<NodePointer>, NoRoom>, Fault> {
        while let Some(frame) = self.frames.last_mut() {
            if self.writes.len() >= batch {
                return Ok(Ok(None));
            }
            let Some(&child) = frame.children.get(frame.next) else {
                match self.close_frame(cache, allocate) {
                    Ok(None) => continue,
                    done => return Ok(done),
                }
            };
            let (first, end) = frame.range_of(frame.next);
            if overlay.next_from(first).is_none_or(|change| change >= end) {
                frame.next += 1;
                let open = frame.open_leaf.take();
                if let Err(error) = self.emit_open_leaf(cache, allocate, open) {
                    return Ok(Err(error));
                }
                self.top().out.push(child);
                continue;
            }
            let node = fetch(cache, Fault { pointer: child.child, first: child.key, end })?;
            frame.next += 1;
            self.retired.push(child.child.address);
            match node {
                Old::Internal(children, level) => {
                    self.frames.push(Frame::new(children, level, first, end));
                }
                Old::Leaf(old) => {
                    let extents = self.merged(&old, overlay, first, end);
                    if let Err(error) = self.join_leaf(cache, allocate, first, end, extents) {
                        return Ok(Err(error));
                    }
                }
            }
        }
        unreachable!("the root's frame ends the walk")
    }

    /// Nodes that the walk will need next and that are not in the cache, at most `max`.
    pub(crate) fn missing(
        &self,
        cache: &mut NodeCache,
        overlay: &Overlay,
        max: usize,
    ) -> Vec<Fault> {
        let Some(frame) = self.frames.last() else { return Vec::new() };
        let mut faults = Vec::new();
        for next in frame.next..frame.children.len() {
            let Some(child) = frame.children.get(next) else { break };
            let (first, end) = frame.range_of(next);
            let changed = overlay.next_from(first).is_some_and(|change| change < end);
            let fault = Fault { pointer: child.child, first: child.key, end };
            if changed && cache.get(&fault.pointer).is_none() {
                faults.push(fault);
                if faults.len() >= max {
                    break;
                }
            }
        }
        faults
    }

    fn top(&mut self) -> &mut Frame {
        self.frames.last_mut().expect("a frame is open while the walk goes on")
    }

    /// The last child of the top frame is done: writes the node that replaces it.
    fn close_frame(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
    ) -> Result<Option<NodePointer>, NoRoom> {
        let open = self.top().open_leaf.take();
        self.emit_open_leaf(cache, allocate, open)?;
        let frame = self.frames.pop().expect("checked by the caller");
        if self.frames.is_empty() {
            return self.finish_root(cache, allocate, frame.out, frame.level).map(Some);
        }
        let entries =
            self.emit_internal(cache, allocate, frame.out, frame.level, frame.first, frame.end)?;
        self.top().out.extend(entries);
        Ok(None)
    }

    /// Adds a rewritten leaf to the top frame, joined with the one before it where both fit in one.
    fn join_leaf(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        first: u64,
        end: u64,
        extents: Vec<Extent>,
    ) -> Result<(), NoRoom> {
        if extents.is_empty() {
            return Ok(());
        }
        let capacity = self.leaf_capacity();
        if let Some(open) = &mut self.top().open_leaf
            && open.extents.len() + extents.len() <= capacity
        {
            open.extents.extend(extents);
            open.end = end;
            return Ok(());
        }
        let before = self.top().open_leaf.replace(OpenLeaf { first, end, extents });
        self.emit_open_leaf(cache, allocate, before)
    }

    fn emit_open_leaf(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        leaf: Option<OpenLeaf>,
    ) -> Result<(), NoRoom> {
        let Some(leaf) = leaf else { return Ok(()) };
        let entries = self.emit_leaves(cache, allocate, leaf)?;
        self.top().out.extend(entries);
        Ok(())
    }

    fn finish_leaf_root(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        extents: Vec<Extent>,
    ) -> Result<Option<NodePointer>, NoRoom> {
        if extents.is_empty() {
            return Ok(Some(NodePointer::default()));
        }
        let leaf = OpenLeaf { first: 0, end: TREE_END, extents };
        let entries = self.emit_leaves(cache, allocate, leaf)?;
        self.finish_root(cache, allocate, entries, 1).map(Some)
    }

    /// Builds levels, from `level` up, until one node covers all.
    fn finish_root(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        mut entries: Vec<InternalEntry>,
        mut level: u8,
    ) -> Result<NodePointer, NoRoom> {
        loop {
            match entries.as_slice() {
                [] => return Ok(NodePointer::default()),
                [only] if only.key == 0 => return Ok(only.child),
                _ => {}
            }
            entries = self.emit_internal(cache, allocate, entries, level, 0, TREE_END)?;
            level += 1;
        }
    }

    fn emit_leaves(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        leaf: OpenLeaf,
    ) -> Result<Vec<InternalEntry>, NoRoom> {
        let sizes = even_split(leaf.extents.len(), self.leaf_capacity());
        let mut entries = Vec::with_capacity(sizes.len());
        let mut rest = leaf.extents.as_slice();
        let mut first = leaf.first;
        for size in sizes {
            let (chunk, tail) = rest.split_at(size);
            rest = tail;
            let end = rest.first().map_or(leaf.end, |extent| extent.logical);
            let node = NodeEntries::Leaf(chunk.to_vec());
            entries.push(self.seal(cache, allocate, 0, first, end, node)?);
            first = end;
        }
        Ok(entries)
    }

    fn emit_internal(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        children: Vec<InternalEntry>,
        level: u8,
        first: u64,
        last_end: u64,
    ) -> Result<Vec<InternalEntry>, NoRoom> {
        let capacity = exd_format::internal_capacity(self.node_size as usize);
        let sizes = even_split(children.len(), capacity);
        let mut entries = Vec::with_capacity(sizes.len());
        let mut rest = children.as_slice();
        let mut first = first;
        for size in sizes {
            let (chunk, tail) = rest.split_at(size);
            rest = tail;
            let end = rest.first().map_or(last_end, |entry| entry.key);
            let node = NodeEntries::Internal(chunk.to_vec());
            entries.push(self.seal(cache, allocate, level, first, end, node)?);
            first = end;
        }
        Ok(entries)
    }

    /// Gives a finished node its place and queues it for writing.
    fn seal(
        &mut self,
        cache: &mut NodeCache,
        allocate: Allocate<'_>,
        level: u8,
        first: u64,
        end: u64,
        entries: NodeEntries,
    ) -> Result<InternalEntry, NoRoom> {
        if level > LEVEL_MAX {
            return Err(NoRoom::Level);
        }
        let address = allocate().ok_or(NoRoom::Space)?;
        let node = Node {
            generation: self.generation,
            address,
            uuid: self.uuid,
            first,
            end,
            level,
            entries,
        };
        let bytes = node.encode(self.node_size as usize);
        let crc = exd_format::crc_of(&bytes);
        self.writes.push((address, bytes));
        self.written.push(address);
        let child = NodePointer { address, generation: self.generation, crc, level };
        cache.insert(child, node);
        Ok(InternalEntry { key: first, child })
    }

    fn leaf_capacity(&self) -> usize {
        exd_format::leaf_capacity(self.node_size as usize)
    }

    /// The extents of `first .. end` once the overlay's changes are applied to `old`.
    fn merged(&mut self, old: &[Extent], overlay: &Overlay, first: u64, end: u64) -> Vec<Extent> {
        let mut out = Joiner { extents: Vec::new(), sectors_per_block: self.sectors_per_block };
        let mut old_iter = old.iter();
        let mut rest: Option<(u64, u64, Mapping)> = None;
        let mut at = first;
        for (start, len, mapping) in overlay.iter_from(first) {
            if start >= end {
                break;
            }
            let stop = (start + len).min(end);
            out.copy_old(&mut old_iter, &mut rest, at, start);
            out.push(start, stop - start, mapping);
            at = stop;
        }
        out.copy_old(&mut old_iter, &mut rest, at, end);
        self.extents_delta += out.extents.len() as i64 - old.len() as i64;
        out.extents
    }
}

impl Frame {
    fn new(children: Vec<InternalEntry>, level: u8, first: u64, end: u64) -> Self {
        Frame { children, level, first, end, next: 0, out: Vec::new(), open_leaf: None }
    }

    /// The range of blocks that changes below a child may come from: the gaps beside the
    /// children belong to the child before them.
    fn range_of(&self, child: usize) -> (u64, u64) {
        let key = |index: usize| self.children.get(index).map(|child| child.key);
        let first = if child == 0 { self.first } else { key(child).unwrap_or(self.end) };
        (first, key(child + 1).unwrap_or(self.end))
    }
}

/// A node of the old tree.
enum Old {
    Leaf(Vec<Extent>),
    /// Children and level.
    Internal(Vec<InternalEntry>, u8),
}

fn fetch(cache: &mut NodeCache, fault: Fault) -> Result<Old, Fault> {
    Ok(match cache.get(&fault.pointer).ok_or(fault)? {
        Found::Leaf(leaf, ..) => Old::Leaf(leaf.extents()),
        Found::Node(node) => match &node.entries {
            NodeEntries::Leaf(extents) => Old::Leaf(extents.clone()),
            NodeEntries::Internal(children) => Old::Internal(children.clone(), node.level),
        },
    })
}

/// Sizes of the fewest chunks of at most `capacity` that hold `count`, as even as can be.
fn even_split(count: usize, capacity: usize) -> Vec<usize> {
    let chunks = count.div_ceil(capacity);
    (0..chunks).map(|index| (index + 1) * count / chunks - index * count / chunks).collect()
}

/// Collects extents in order and joins neighbours.
struct Joiner {
    extents: Vec<Extent>,
    sectors_per_block: u64,
}

impl Joiner {
    /// Copies what the old leaf says of `from .. to`.
    fn copy_old(
        &mut self,
        old: &mut std::slice::Iter<'_, Extent>,
        rest: &mut Option<(u64, u64, Mapping)>,
        from: u64,
        to: u64,
    ) {
        loop {
            let (start, len, mapping) = match rest.take() {
                Some(piece) => piece,
                None => match old.next() {
                    Some(extent) => {
                        (extent.logical, u64::from(extent.length), Mapping::of_extent(extent))
                    }
                    None => return,
                },
            };
            let end = start + len;
            if start >= to {
                *rest = Some((start, len, mapping));
                return;
            }
            let (begin, stop) = (start.max(from), end.min(to));
            if begin < stop {
                let shift = (begin - start) * self.sectors_per_block;
                self.push(begin, stop - begin, mapping.advanced(shift));
            }
            if end > to {
                let shift = (to - start) * self.sectors_per_block;
                *rest = Some((to, end - to, mapping.advanced(shift)));
                return;
            }
        }
    }

    fn push(&mut self, mut start: u64, mut len: u64, mut mapping: Mapping) {
        if mapping.state == State::Hole {
            return;
        }
        if let Some(last) = self.extents.last_mut() {
            let before = Mapping::of_extent(last);
            let joined = u64::from(last.length) + len;
            if last.logical + u64::from(last.length) == start
                && before.state == mapping.state
                && before.birth == mapping.birth
                && (before.place == 0) == (mapping.place == 0)
                && before.advanced(u64::from(last.length) * self.sectors_per_block) == mapping
                && let Ok(joined) = u32::try_from(joined)
            {
                last.length = joined;
                return;
            }
        }
        while len > 0 {
            let length = u32::try_from(len).unwrap_or(u32::MAX);
            self.extents.extend(mapping.to_extent(start, length));
            start += u64::from(length);
            len -= u64::from(length);
            mapping = mapping.advanced(u64::from(length) * self.sectors_per_block);
        }
    }
}
