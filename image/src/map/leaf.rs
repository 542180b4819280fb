//! A leaf of the tree in memory, made for looking up: *lines* of four extents, each as large as a cache line,
//! that say by themselves what they cover.

use super::{Mapping, State};
use exd_format::{Extent, ExtentState};
use std::hint::select_unpredictable;

/// Extents in a line.
pub(crate) const WIDTH: usize = 4;

/// Four *slots*, each an extent with the hole behind it, and the blocks they are all the map knows of.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Line {
    first: u64,
    /// Where the slots begin, counted from `first`: the first at 0. Behind them, and at the end of the array,
    /// the number of blocks that are covered, so that each key is followed by where the slot ends. All zero
    /// in a line that is not in use.
    keys: [u32; WIDTH + 1],
    /// Of all four.
    birth: u32,
    /// Places, above them the states, above those the lengths. 0 in a slot that is only a hole.
    words: [u64; WIDTH],
}

const _: () = assert!(size_of::<Line>() == 64);

/// Places are below 2^48 sectors.
const STATE_SHIFT: u32 = 48;
const LENGTH_SHIFT: u32 = 50;
const PLACE_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// The length of an extent that is this long or longer: all of its slot.
const LONG: u64 = u64::MAX >> LENGTH_SHIFT;

impl Line {
    /// One that covers nothing.
    pub(crate) const EMPTY: Line =
        Line { first: 0, keys: [0; WIDTH + 1], birth: 0, words: [0; WIDTH] };

    /// Where its blocks begin.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// Where its blocks end.
    pub(crate) fn end(&self) -> u64 {
        self.first + u64::from(self.keys[WIDTH])
    }

    /// The block is one of those it covers.
    #[inline]
    pub(crate) fn covers(&self, block: u64) -> bool {
        block.wrapping_sub(self.first) < u64::from(self.keys[WIDTH])
    }

    /// What is known of `block`, which it covers, and for how many blocks: as far as its own end, if nothing
    /// comes before.
    #[inline]
    pub(crate) fn find(&self, block: u64, sectors_per_block: u64) -> (Mapping, u64) {
        let offset = (block - self.first) as u32;
        // Without branches that could be guessed wrong: whether a block is in an extent is a coin's toss.
        let behind = |slot: usize| usize::from(self.keys[slot] <= offset);
        let slot = behind(1) + behind(2) + behind(3);
        let word = self.words[slot];
        let skip = u64::from(offset - self.keys[slot]);
        let until_next = u64::from(self.keys[slot + 1] - offset);
        let length = match word >> LENGTH_SHIFT {
            LONG => u64::MAX >> 1,
            length => length,
        };
        let inside = skip < length;
        let until_end = select_unpredictable(inside, length.wrapping_sub(skip), u64::MAX);
        let word = select_unpredictable(inside, word, 0);
        let birth = select_unpredictable(inside, self.birth, 0);
        let place = word & PLACE_MASK;
        let skipped = if place == 0 { 0 } else { skip * sectors_per_block };
        (
            Mapping { state: state_of(word), place: place + skipped, birth },
            until_end.min(until_next),
        )
    }

    fn extents(&self) -> impl Iterator<Item = Extent> {
        let used = |slot: &usize| self.keys[*slot] < self.keys[WIDTH];
        (0..WIDTH).filter(used).filter_map(|slot| self.extent(slot))
    }

    fn extent(&self, slot: usize) -> Option<Extent> {
        let word = self.words[slot];
        let state = match state_of(word) {
            State::Hole => return None,
            State::Unwritten => ExtentState::Unwritten,
            State::Written => ExtentState::Written,
            State::Zero => ExtentState::Zero,
        };
        let length = match word >> LENGTH_SHIFT {
            LONG => self.keys[slot + 1] - self.keys[slot],
            length => length as u32,
        };
        let logical = self.first + u64::from(self.keys[slot]);
        let physical = word & PLACE_MASK;
        Some(Extent { logical, physical, state, length, birth: self.birth })
    }
}

fn is_long(extent: &Extent) -> bool {
    u64::from(extent.length) >= LONG
}

/// The slot of an extent.
fn word_of(extent: &Extent) -> u64 {
    let state = match extent.state {
        ExtentState::Unwritten => 1,
        ExtentState::Written => 2,
        ExtentState::Zero => 3,
    };
    extent.physical | state << STATE_SHIFT | u64::from(extent.length).min(LONG) << LENGTH_SHIFT
}

#[inline]
fn state_of(word: u64) -> State {
    match word >> STATE_SHIFT & 3 {
        0 => State::Hole,
        1 => State::Unwritten,
        2 => State::Written,
        _ => State::Zero,
    }
}

/// Fills `lines` with the extents of a leaf that covers `first` to `end`, and says how many it took; `None` if
/// they do not suffice, or there are no extents.
pub(crate) fn fill(lines: &mut [Line], extents: &[Extent], first: u64, end: u64) -> Option<usize> {
    let start = extents.first()?.logical;
    // The hole in front takes a slot, and there may be none for it.
    fill_from(lines, extents, first, end).or_else(|| fill_from(lines, extents, start, end))
}

fn fill_from(lines: &mut [Line], extents: &[Extent], first: u64, end: u64) -> Option<usize> {
    let mut filler = Filler { lines, used: 0, slots: 0, birth: None };
    // Where a hole begins that needs a slot of its own.
    let mut hole = Some(first);
    for extent in extents {
        if let Some(start) = hole.filter(|start| *start < extent.logical) {
            filler.push(start, start + 1, 0, None)?;
        }
        filler.push(extent.logical, extent.end(), word_of(extent), Some(extent.birth))?;
        hole = is_long(extent).then(|| extent.end());
    }
    if let Some(start) = hole.filter(|start| *start < end) {
        filler.push(start, start + 1, 0, None)?;
    }
    filler.close(end);
    Some(filler.used)
}

/// Puts slots into lines.
struct Filler<'a> {
    lines: &'a mut [Line],
    /// Lines in use, and slots in the last of them.
    used: usize,
    slots: usize,
    /// Of the extents in the last line.
    birth: Option<u32>,
}

impl Filler<'_> {
    /// Adds a slot that begins at `start` and needs the blocks up to `end`; `None` if there is no room.
    fn push(&mut self, start: u64, end: u64, word: u64, birth: Option<u32>) -> Option<()> {
        if !self.takes(end, birth) {
            self.close(start);
            *self.lines.get_mut(self.used)? = Line { first: start, ..Line::EMPTY };
            (self.slots, self.birth) = (0, None);
            self.used += 1;
        }
        let line = &mut self.lines[self.used - 1];
        // Narrow enough, as its end is.
        line.keys[self.slots] = (start - line.first) as u32;
        line.words[self.slots] = word;
        self.birth = birth.or(self.birth);
        line.birth = self.birth.unwrap_or(0);
        self.slots += 1;
        Some(())
    }

    /// The last line has room for such a slot.
    fn takes(&self, end: u64, birth: Option<u32>) -> bool {
        let Some(line) = self.used.checked_sub(1).map(|last| &self.lines[last]) else {
            return false;
        };
        let births_agree = match (self.birth, birth) {
            (Some(has), Some(wants)) => has == wants,
            _ => true,
        };
        self.slots < WIDTH && births_agree && end - line.first <= u64::from(u32::MAX)
    }

    /// Lets the last line end at `end`, or where it cannot reach further.
    fn close(&mut self, end: u64) {
        let Some(last) = self.used.checked_sub(1) else { return };
        let line = &mut self.lines[last];
        let span = u32::try_from(end - line.first).unwrap_or(u32::MAX);
        line.keys[self.slots..].fill(span);
    }
}

/// A leaf: the lines that are in use, and where its blocks end.
pub(crate) struct Leaf<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) end: u64,
}

impl Leaf<'_> {
    /// The number of the line for `block`: the last that does not begin behind it.
    pub(crate) fn position(&self, block: u64) -> usize {
        self.lines.partition_point(|line| line.first <= block).saturating_sub(1)
    }

    /// What is known of `block`, which the leaf covers, and for how many blocks.
    pub(crate) fn find(&self, block: u64, sectors_per_block: u64) -> (Mapping, u64) {
        let index = self.position(block);
        let line = &self.lines[index];
        if line.covers(block) {
            return line.find(block, sectors_per_block);
        }
        // In a hole before the first line, between two, or behind the last.
        let next = self.lines[index..].iter().map(Line::first).find(|first| *first > block);
        (Mapping::HOLE, next.unwrap_or(self.end) - block)
    }

    /// The extents.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        self.lines.iter().flat_map(Line::extents).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_extents() {
        let mut seed = 5u64;
        let mut random = |bound: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % bound
        };
        for round in 0..300u64 {
            // From evenly spread to clustered, with holes of any size.
            let mut extents = Vec::new();
            let mut at = random(1000);
            for index in 0..1 + random(200) {
                let length = match random(40) {
                    0 => (LONG - 1) as u32 + random(3) as u32,
                    1 => u32::MAX - random(2) as u32,
                    _ => 1 + random(5) as u32,
                };
                let state = [ExtentState::Unwritten, ExtentState::Written, ExtentState::Zero]
                    [random(3) as usize];
                let physical = if state == ExtentState::Zero { 0 } else { (1 + index) << 40 >> 1 };
                let birth = (random(9) / 8) as u32;
                extents.push(Extent { logical: at, physical, state, length, birth });
                let gap = match round % 4 {
                    0 => random(3),
                    1 => random(40),
                    2 => random(2) * random(1 << (round % 20)),
                    _ => random(30) / 29 * (1 << (30 + random(4))),
                };
                at += u64::from(length) + gap;
            }
            let end = at + random(100);
            let start = extents[0].logical.saturating_sub(20);
            let mut lines = vec![Line::EMPTY; 210];
            let used = fill(&mut lines, &extents, start, end).expect("room for all");
            let leaf = Leaf { lines: &lines[..used], end };
            assert_eq!(leaf.extents(), extents);
            for turn in 0..400 {
                // Near an edge of an extent, and anywhere.
                let edge = extents[random(extents.len() as u64) as usize].logical;
                let block = match turn % 2 {
                    0 => (edge + random(12)).saturating_sub(6).clamp(start, end - 1),
                    _ => start + random(end - start),
                };
                let (mapping, run) = leaf.find(block, 8);
                let inside = extents.iter().find(|e| e.logical <= block && block < e.end());
                match inside {
                    Some(extent) => {
                        let skip = block - extent.logical;
                        assert_eq!(mapping, Mapping::of_extent(extent).advanced(skip * 8));
                        assert_eq!(run, extent.end() - block);
                    }
                    None => {
                        let next = extents.iter().find(|e| e.logical > block);
                        assert_eq!(mapping.state, State::Hole);
                        // A line may begin in a hole.
                        let next = next.map_or(end, |extent| extent.logical);
                        assert!(run > 0 && block + run <= next, "{block} + {run}, {next}");
                    }
                }
                let covering: Vec<&Line> = lines.iter().filter(|line| line.covers(block)).collect();
                assert!(covering.len() <= 1, "one line at most for a block");
                if let [line] = covering[..] {
                    assert_eq!(line.find(block, 8).0, mapping);
                    assert!(line.find(block, 8).1 <= run);
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let extent = |logical, birth| Extent {
            logical,
            physical: 8,
            state: ExtentState::Written,
            length: 1,
            birth,
        };
        let mut lines = vec![Line::EMPTY; 2];
        let mut fill = |extents: &[Extent]| fill(&mut lines, extents, 0, 1 << 60);
        assert_eq!(fill(&[]), None);
        assert_eq!(fill(&[extent(0, 1), extent(1 << 40, 1)]), Some(2), "too far for one line");
        assert_eq!(fill(&[extent(0, 1), extent(1, 2), extent(2, 1)]), None, "three births");
        let nine: Vec<Extent> = (0..9).map(|index| extent(index, 1)).collect();
        assert_eq!(fill(&nine[..8]), Some(2));
        assert_eq!(fill(&nine), None);
        let late: Vec<Extent> = (9..17).map(|index| extent(index, 1)).collect();
        assert_eq!(fill(&late[..7]), Some(2), "the hole in front has a slot");
        assert_eq!(lines[0].first(), 0);
        assert_eq!(super::fill(&mut lines, &late, 0, 1 << 60), Some(2), "there is none for it");
        assert_eq!(lines[0].first(), 9);
    }
}
