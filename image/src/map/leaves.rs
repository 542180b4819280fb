//! The leaves that are in memory, and how to find one by a block.
//!
//! From a block to its line it is one step: a table of hints, which may be missing or out of date but never
//! wrong, since a line says what it covers. A hint says where in its region one line ends and the next begins,
//! so that the lines beside it seldom have to be tried. So a lookup reads two places of memory.

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
    /// By the number of a region of blocks. How large a region is, the leaf says.
    hints: HintTable,
    /// At most so many hints.
    hints_max: u64,
    /// Number of leaves by the size of their regions, as a power of two.
    counts: [u32; 64],
    /// The most frequent sizes.
    sizes: [RegionSize; SIZES],
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
        let mut lines = Vec::new();
        // Lines are never moved: moving tens of MiB would take as many milliseconds. What is reserved is
        // address space, which is no memory yet; where that is limited, it goes without.
        let most = bound / (stride * size_of::<Line>()) as u64 + 1;
        let _ =
            usize::try_from(most).map(|most| lines.try_reserve_exact(most.saturating_mul(stride)));
        Leaves {
            lines,
            stride,
            group: stride.ilog2(),
            slabs: Vec::new(),
            used: Vec::new(),
            free: Vec::new(),
            hints: HintTable::default(),
            hints_max: (bound / 64).clamp(*HINTS.start(), *HINTS.end()),
            counts: [0; 64],
            sizes: [RegionSize::new(0); SIZES],
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
    #[inline(always)]
    pub(crate) fn find(&mut self, block: u64, sectors_per_block: u64) -> Option<(Mapping, u64)> {
        let mut number = self.hinted(block, &self.sizes[0])?;
        let line = match self.lines.get(number).filter(|line| line.covers(block)) {
            Some(line) => line,
            None => {
                number = self.nearby(block)?;
                &self.lines[number]
            }
        };
        let used = &mut self.used[number >> self.group];
        if !*used {
            *used = true;
        }
        Some(line.find(block, sectors_per_block))
    }

    /// The line that the hint for regions of this size leads to.
    #[inline]
    fn hinted(&self, block: u64, size: &RegionSize) -> Option<usize> {
        let place = size.place_of_hint(block) & self.hints.len().wrapping_sub(1);
        Some(self.hints.get(place)?.line(size.cell(block)))
    }

    /// The line that covers `block`, if it is beside one that is hinted, or hinted for regions of another size.
    #[cold]
    fn nearby(&self, block: u64) -> Option<usize> {
        let hinted = self.sizes.iter().filter_map(|size| self.hinted(block, size));
        let near = hinted.flat_map(|at| [Some(at), at.checked_add(1), at.checked_sub(1)]);
        near.flatten().find(|at| self.lines.get(*at).is_some_and(|line| line.covers(block)))
    }

    /// `block` was found in the slab of this number by other means.
    pub(crate) fn hint(&mut self, block: u64, number: u32) {
        let useful = HINTS_EACH * self.slabs.len() as u64;
        let wanted = 1 << useful.clamp(*HINTS.start(), self.hints_max).ilog2();
        if self.hints.len() < wanted {
            // Hints are only hints: those there were are found again.
            self.hints = HintTable::new(wanted);
        }
        let own = self.slabs[number as usize].region;
        // One of the sizes that are tried, if it is near enough: so leaves that are nearly alike do not take
        // each other's hints.
        let near = self.sizes.iter().find(|size| size.region.abs_diff(own) <= 1);
        let size = near.copied().unwrap_or(RegionSize::new(own));
        let place = size.place_of_hint(block) & (self.hints.len() - 1);
        let hint = self.hint_for(&size, block, number);
        self.hints.set(place, hint);
    }

    /// The hint for the region of a block of the leaf in a slab.
    fn hint_for(&self, size: &RegionSize, block: u64, number: u32) -> Hint {
        let from = number as usize * self.stride;
        let lines = self.leaf(number).lines;
        let start = block >> size.region << size.region;
        let half_cell = (1u64 << size.cell) / 2;
        // The line at the region's start, and how far it reaches. Where the region begins before the leaf, the
        // line before may be the right one: leaves that were loaded in order lie so.
        let next = lines.partition_point(|line| line.first() <= start + half_cell);
        let Some(line) = (from + next).checked_sub(1) else { return Hint::new(0, CELLS) };
        let last_end = lines.last().map_or(start, Line::end);
        let until = lines.get(next).map_or(last_end, Line::first);
        Hint::new(line, (until + half_cell).saturating_sub(start) >> size.cell)
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
        // The most frequent of all stays the most frequent when one more comes.
        if !(come && size == self.sizes[0].region) {
            self.rank_sizes();
        }
    }

    fn rank_sizes(&mut self) {
        let mut ranked = [(0, 0); SIZES];
        for (size, count) in (0..).zip(self.counts) {
            let rank = ranked.partition_point(|(_, more)| *more >= count);
            if rank < SIZES && count > 0 {
                ranked[rank..].rotate_right(1);
                ranked[rank] = (size, count);
            }
        }
        for (at, (size, _)) in self.sizes.iter_mut().zip(ranked) {
            if at.region != size {
                *at = RegionSize::new(size);
            }
        }
    }
}

/// Where the blocks of a region are: in a line up to some *cell* of the region, from there on in the next line.
#[derive(Clone, Copy)]
struct Hint(u32);

/// A region has at most so many cells.
const CELLS: u64 = 1 << CELLS_BITS;
const CELLS_BITS: u32 = 6;

impl Hint {
    const NONE: Hint = Hint(u32::MAX);

    /// The first `cells` cells of the region are in line number `line`; at least one is.
    fn new(line: usize, cells: u64) -> Hint {
        match u32::try_from(line) {
            Ok(line) if line < u32::MAX >> CELLS_BITS => {
                Hint(line << CELLS_BITS | (cells.clamp(1, CELLS) - 1) as u32)
            }
            _ => Hint::NONE,
        }
    }

    #[inline]
    fn line(self, cell: u32) -> usize {
        let last = self.0 & (CELLS - 1) as u32;
        (self.0 >> CELLS_BITS) as usize + usize::from(cell > last)
    }
}

/// Hints by their place. They are kept inverted: a new table is one of zeroes, which the system maps when
/// they are touched, where writing them all would take milliseconds.
#[derive(Default)]
struct HintTable(Vec<u32>);

impl HintTable {
    fn new(len: usize) -> HintTable {
        HintTable(vec![!Hint::NONE.0; len])
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn get(&self, place: usize) -> Option<Hint> {
        self.0.get(place).map(|inverted| Hint(!inverted))
    }

    fn set(&mut self, place: usize, hint: Hint) {
        self.0[place] = !hint.0;
    }
}

/// The size of a region, and what follows from it.
#[derive(Clone, Copy)]
struct RegionSize {
    /// log2 of the blocks of a region, and of a cell.
    region: u32,
    cell: u32,
    /// Cells in a region, less one.
    cells_mask: u32,
    /// So that sizes do not take each other's hints.
    apart: u32,
}

impl RegionSize {
    fn new(region: u32) -> RegionSize {
        let cell = region.saturating_sub(CELLS_BITS);
        let cells_mask = (1 << (region - cell)) - 1;
        let apart = (u64::from(region).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        RegionSize { region, cell, cells_mask, apart }
    }

    /// The place among hints, to be cut to their number, a power of two, for the region of a block. Neighbours
    /// have places of their own.
    #[inline]
    fn place_of_hint(&self, block: u64) -> usize {
        (block >> self.region).wrapping_add(u64::from(self.apart)) as usize
    }

    /// The cell of a block in its region.
    #[inline]
    fn cell(&self, block: u64) -> u32 {
        (block >> self.cell) as u32 & self.cells_mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use exd_format::ExtentState;

    fn extents(range: std::ops::Range<u64>, apart: u64) -> Vec<Extent> {
        let extent = |logical| Extent {
            logical,
            physical: 8 * (logical + 1),
            state: ExtentState::Written,
            length: 1,
            birth: 1,
        };
        // Not evenly spread.
        range.step_by(apart as usize).map(|at| extent(at + (at >> 3) % apart)).collect()
    }

    #[test]
    fn hints_lead_to_what_is_there() {
        // Dense, thin, and far apart.
        for (apart, first) in [(1, 0), (3, 1 << 40), (700, 77), (1 << 21, 5)] {
            let mut leaves = Leaves::new(100, 1 << 30);
            let all: Vec<Vec<Extent>> = (0..20)
                .map(|leaf| {
                    extents(first + leaf * 100 * apart..first + (leaf + 1) * 100 * apart, apart)
                })
                .collect();
            let starts: Vec<u64> = all.iter().map(|extents| extents[0].logical).collect();
            let end = first + 20 * 100 * apart + apart;
            let leaf_end = |leaf: usize| starts.get(leaf + 1).copied().unwrap_or(end);
            // Not in their order.
            let mut numbers = [0; 20];
            for leaf in (0..20).map(|i| i * 7 % 20) {
                let inserted = leaves.insert(&all[leaf], starts[leaf], leaf_end(leaf));
                numbers[leaf] = inserted.expect("it has a compact form");
            }
            let mut hits = 0;
            for round in 0..20_000u64 {
                let gone = (round >= 10_000).then_some(3);
                if round == 10_000 {
                    leaves.remove(numbers[3]);
                }
                let block = starts[0] + round * 0x9e37_79b9 % (end - starts[0]);
                let leaf = starts.partition_point(|start| *start <= block) - 1;
                let known = all[leaf].iter().find(|extent| extent.logical == block);
                let place = known.map_or(0, |extent| extent.physical);
                let Some((mapping, run)) = leaves.find(block, 8) else {
                    if gone != Some(leaf) {
                        leaves.hint(block, numbers[leaf]);
                    }
                    continue;
                };
                hits += 1;
                assert_ne!(Some(leaf), gone, "it is gone");
                assert_eq!(mapping.place, place, "{block}");
                assert!(run > 0 && block + run <= leaf_end(leaf));
            }
            assert!(hits > 15_000, "{hits} of 20000");
        }
    }
}
