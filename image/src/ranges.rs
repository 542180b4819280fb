//! Sets of ranges of image space.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of integers held as sorted, disjoint, non-adjacent ranges. The engine's unit is the sector
/// of the image file.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct RangeSet {
    ranges: BTreeMap<u64, u64>,
    total: u64,
}

impl RangeSet {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Number of integers in the set.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Number of separate ranges.
    pub(crate) fn count(&self) -> usize {
        self.ranges.len()
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// The range that contains `at`.
    pub(crate) fn range_at(&self, at: u64) -> Option<Range<u64>> {
        let (&start, &end) = self.ranges.range(..=at).next_back()?;
        (at < end).then_some(start..end)
    }

    /// True if the whole of `range` is in the set.
    pub(crate) fn contains(&self, range: Range<u64>) -> bool {
        range.is_empty() || self.range_at(range.start).is_some_and(|found| range.end <= found.end)
    }

    /// The parts of the set inside `range`, in order.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let from = self.range_at(range.start).map_or(range.start, |found| found.start);
        let bounds = if range.is_empty() { from..from } else { from..range.end };
        self.ranges
            .range(bounds)
            .map(move |(&start, &end)| start.max(range.start)..end.min(range.end))
    }

    /// Adds `range`; what is in the set already stays.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
        }
        while let Some((&next, &next_end)) = self.ranges.range(start..=end).next() {
            end = end.max(next_end);
            self.ranges.remove(&next);
            self.total -= next_end - next;
        }
        self.ranges.insert(start, end);
        self.total += end - start;
    }

    /// Takes `range` out; what is not in the set does not matter.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        let cut: Vec<Range<u64>> = self.within(range).collect();
        for part in cut {
            let Some(whole) = self.range_at(part.start) else { continue };
            self.ranges.remove(&whole.start);
            if whole.start < part.start {
                self.ranges.insert(whole.start, part.start);
            }
            if part.end < whole.end {
                self.ranges.insert(part.end, whole.end);
            }
            self.total -= part.end - part.start;
        }
    }

    /// Takes out the first aligned run of exactly `len` and returns its start.
    pub(crate) fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let start = self.ranges.iter().find_map(|(&start, &end)| {
            let aligned = start.next_multiple_of(align);
            (aligned.checked_add(len)? <= end).then_some(aligned)
        })?;
        self.remove(start..start + len);
        Some(start)
    }

    /// Takes out the first range, or no more than `most` of it.
    pub(crate) fn take_first(&mut self, most: u64) -> Option<Range<u64>> {
        let (start, end) = self.ranges.pop_first()?;
        let cut = end.min(start.saturating_add(most));
        if cut < end {
            self.ranges.insert(cut, end);
        }
        self.total -= cut - start;
        Some(start..cut)
    }

    /// Leaves `total` in the set, or a little less than a range more, and returns what went: the
    /// shortest ranges go first.
    pub(crate) fn keep_longest(&mut self, total: u64) -> Vec<Range<u64>> {
        if self.total <= total {
            return Vec::new();
        }
        let mut ranges: Vec<Range<u64>> = self.iter().collect();
        ranges.sort_by_key(|range| range.end - range.start);
        let mut gone = Vec::new();
        for range in ranges {
            let excess = self.total - total;
            if range.end - range.start <= excess {
                self.remove(range.clone());
                gone.push(range);
            } else {
                self.remove(range.end - excess..range.end);
                gone.push(range.end - excess..range.end);
                break;
            }
        }
        gone
    }

    /// The longest range.
    pub(crate) fn longest(&self) -> Option<Range<u64>> {
        self.iter().max_by_key(|range| range.end - range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_bitmap() {
        let mut set = RangeSet::new();
        let mut bits = [false; 200];
        let mut seed = 12345u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 33) % 200;
            let end = (start + (seed >> 45) % 20).min(200);
            let on = seed & (1 << 32) != 0;
            if on {
                set.insert(start..end);
            } else {
                set.remove(start..end);
            }
            bits[start as usize..end as usize].fill(on);
            assert_eq!(set.total(), bits.iter().filter(|bit| **bit).count() as u64);
            let mut seen = [false; 200];
            let mut last_end = None;
            for range in set.iter() {
                assert!(range.start < range.end && last_end.is_none_or(|end| end < range.start));
                last_end = Some(range.end);
                seen[range.start as usize..range.end as usize].fill(true);
            }
            assert_eq!(seen, bits);
            let inside: u64 = set.within(start..end).map(|range| range.end - range.start).sum();
            let expected = bits[start as usize..end as usize].iter().filter(|bit| **bit).count();
            assert_eq!(inside, expected as u64);
        }
    }

    #[test]
    fn takes_aligned_runs() {
        let mut set = RangeSet::new();
        set.insert(3..30);
        assert_eq!(set.take(8, 8), Some(8));
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![3..8, 16..30]);
        assert_eq!(set.take(16, 8), None);
        assert_eq!(set.take_first(10), Some(3..8));
        assert_eq!(set.take_first(10), Some(16..26));
        assert_eq!((set.total(), set.take_first(10), set.take_first(10)), (4, Some(26..30), None));
    }
}
