//! The leaves that are in memory, and how to find one by a block.
//!
//! From a block to its line it is one step: a table of hints, which may be missing or out of date but never
//! wrong, since a line says what it covers. So a lookup reads two places of memory.

use super::Mapping;
use super::leaf::{Leaf, Line, WIDTH, fill};
use exd_format::Extent;

/// Leaves, each in a slab of as many lines as the largest needs.
pub(crate) struct Leaves {
    lines: Vec<Line>,
    /// Lines of a slab.
    stride: usize,
    slabs: Vec<Slab>,
    /// Used since the clock came by, by groups of lines: where two slabs share one, both are taken for used.
    used: Vec<bool>,
    /// log2 of the lines of a group.
    group: u32,
    free: Vec<u32>,
    /// Numbers of lines, by the number of a region of blocks. How large a region is, the leaf says.
    hints: Vec<u32>,
    /// At most so many hints.
    hints_max: u64,
    /// Number of leaves by the size of their regions, as a power of two.
    counts: [u32; 64],
    /// The most frequent sizes.
    sizes: [u32; SIZES],
}

/// What a slab holds.
#[derive(Clone, Copy)]
struct Slab {
    /// Lines in use.
    len: u32,
    /// log2 of the blocks of the leaf's regions.
    region: u32,
    end: u64,
}

/// Fewest and most hints.
const HINTS: std::ops::RangeInclusive<u64> = 64..=1 << 24;
/// A leaf has so many regions, up to twice that: the more, the fewer belong to several lines.
const REGIONS_BITS: u32 = 6;
/// Hints wished for, for each leaf.
const HINTS_EACH: u64 = 2 << REGIONS_BITS;
/// So many sizes of regions are tried. Leaves of other sizes are found from the root.
const SIZES: usize = 3;

impl Leaves {
    /// For leaves of at most `capacity` extents. The hints take at most a sixteenth of `bound` bytes.
    pub(crate) fn new(capacity: usize, bound: u64) -> Self {
        let stride = capacity.div_ceil(WIDTH).max(1);
        Leaves {
            lines: Vec::new(),
            stride,
            group: stride.ilog2(),
            slabs: Vec::new(),
            used: Vec::new(),
            free: Vec::new(),
            hints: Vec::new(),
            hints_max: (bound / 64).clamp(*HINTS.start(), *HINTS.end()),
            counts: [0; 64],
            sizes: [0; SIZES],
        }
    }

    /// Bytes that a leaf takes, however few its extents.
    pub(crate) fn bytes_each(&self) -> usize {
        self.stride * size_of::<Line>() + size_of::<Slab>()
    }

    /// Takes the leaf for the blocks from `first` to `end`; its slab, or `None` if it has no compact form.
    pub(crate) fn insert(&mut self, extents: &[Extent], first: u64, end: u64) -> Option<u32> {
        let number = self.free.pop().unwrap_or_else(|| {
            self.lines.resize(self.lines.len() + self.stride, Line::EMPTY);
            self.slabs.push(Slab { len: 0, region: 0, end: 0 });
            self.used.resize((self.lines.len() >> self.group) + 1, false);
            self.slabs.len() as u32 - 1
        });
        let from = number as usize * self.stride;
        let lines = &mut self.lines[from..from + self.stride];
        let Some(len) = fill(lines, extents, first, end) else {
            lines.fill(Line::EMPTY);
            self.free.push(number);
            return None;
        };
        // The last leaf ends where its extents do: what is behind them is endless.
        let end_of_data = extents.last().map_or(end, |extent| extent.logical + 1).min(end);
        let span = end_of_data.saturating_sub(first).max(1);
        let region = span.ilog2().saturating_sub(REGIONS_BITS);
        self.slabs[number as usize] = Slab { len: len as u32, region, end };
        self.take_used(number);
        self.count(region, true);
        Some(number)
    }

    pub(crate) fn remove(&mut self, number: u32) {
        let slab = self.slabs[number as usize];
        let from = number as usize * self.stride;
        self.lines[from..from + slab.len as usize].fill(Line::EMPTY);
        self.count(slab.region, false);
        self.free.push(number);
    }

    /// The leaf in a slab.
    pub(crate) fn leaf(&self, number: u32) -> Leaf<'_> {
        let slab = self.slabs[number as usize];
        let from = number as usize * self.stride;
        Leaf { lines: &self.lines[from..from + slab.len as usize], end: slab.end }
    }

    /// What is known of `block` and for how many blocks, if a hint leads to it.
    #[inline]
    pub(crate) fn find(&mut self, block: u64, sectors_per_block: u64) -> Option<(Mapping, u64)> {
        let [first, others @ ..] = self.sizes;
        let number = match self.hinted(block, first) {
            Some(number) => number,
            None => self.hinted_otherwise(block, &others)?,
        };
        let used = &mut self.used[number >> self.group];
        if !*used {
            *used = true;
        }
        Some(self.lines[number].find(block, sectors_per_block))
    }

    /// The line that the hint for regions of this size leads to.
    #[inline]
    fn hinted(&self, block: u64, size: u32) -> Option<usize> {
        let hint = *self.hints.get(place_of_hint(block, size, self.hints.len()))?;
        self.near(hint as usize, block)
    }

    #[cold]
    fn hinted_otherwise(&self, block: u64, sizes: &[u32]) -> Option<usize> {
        sizes.iter().find_map(|size| self.hinted(block, *size))
    }

    /// The line that covers `block`, `at` or a neighbour. Lines of other leaves may lie there; each says
    /// itself what it covers.
    #[inline]
    fn near(&self, at: usize, block: u64) -> Option<usize> {
        let line = self.lines.get(at)?;
        // The first step without a branch: whether it is needed could only be guessed.
        let behind = usize::from(line.ends_by(block));
        let before = usize::from(block < line.first());
        let at = (at + behind).saturating_sub(before);
        let covers = |at: &usize| self.lines.get(*at).is_some_and(|line| line.covers(block));
        if covers(&at) {
            return Some(at);
        }
        let next = if before > 0 { at.checked_sub(1) } else { Some(at + 1) };
        next.filter(covers)
    }

    /// `block` was found in the slab of this number by other means.
    pub(crate) fn hint(&mut self, block: u64, number: u32) {
        let useful = HINTS_EACH * self.slabs.len() as u64;
        let wanted = 1 << useful.clamp(*HINTS.start(), self.hints_max).ilog2();
        if self.hints.len() < wanted {
            // Hints are only hints: those there were are found again.
            self.hints = vec![u32::MAX; wanted];
        }
        let own = self.slabs[number as usize].region;
        // One of the sizes that are tried, if it is near enough: so leaves that are nearly alike do not take
        // each other's hints.
        let near = self.sizes.iter().find(|size| size.abs_diff(own) <= 1);
        let region = *near.unwrap_or(&own);
        // The line in the region's middle is the nearest to all of it.
        let middle = (block >> region << region) + (1 << region) / 2;
        let line = number as usize * self.stride + self.leaf(number).position(middle);
        let at = place_of_hint(block, region, self.hints.len());
        self.hints[at] = u32::try_from(line).unwrap_or(u32::MAX);
    }

    /// Notes that the leaf in a slab is in use.
    pub(crate) fn touch(&mut self, number: u32) {
        self.used[(number as usize * self.stride) >> self.group] = true;
    }

    /// Whether it was used since this was asked last.
    pub(crate) fn take_used(&mut self, number: u32) -> bool {
        let from = number as usize * self.stride;
        let groups = from >> self.group..=(from + self.stride - 1) >> self.group;
        groups.fold(false, |any, group| std::mem::take(&mut self.used[group]) | any)
    }

    /// Bytes held by hints.
    #[cfg(feature = "measure")]
    pub(crate) fn hint_bytes(&self) -> u64 {
        (self.hints.len() * size_of::<u32>()) as u64
    }

    /// A leaf with regions of this size has come, or gone.
    fn count(&mut self, size: u32, come: bool) {
        let count = &mut self.counts[size as usize];
        *count = if come { *count + 1 } else { *count - 1 };
        let mut sizes: [u32; 64] = std::array::from_fn(|size| size as u32);
        sizes.sort_by_key(|size| std::cmp::Reverse(self.counts[*size as usize]));
        self.sizes.copy_from_slice(&sizes[..SIZES]);
    }
}

/// The place among `count` hints, a power of two, for the region of a block. Neighbours have places of
/// their own.
#[inline]
fn place_of_hint(block: u64, size: u32, count: usize) -> usize {
    let apart = u64::from(size).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (block >> size).wrapping_add(apart) as usize & count.wrapping_sub(1)
}
