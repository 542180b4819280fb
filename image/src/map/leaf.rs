//! A leaf of the tree in memory, made for looking up: *lines* of four extents, each as large as a cache line,
//! that say by themselves what they cover.

use super::{Mapping, State};
use exd_format::{Extent, ExtentState};

/// Extents in a line.
pub(crate) const WIDTH: usize = 4;

/// Four extents, and the blocks they are all the map knows of.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Line {
    first: u64,
    /// First blocks of the extents, counted from `first`. Behind them, and at the end of the array, the number
    /// of blocks that are covered, so that each key is followed by where the extent must have ended. All
    /// zero in a line that is not in use.
    keys: [u32; WIDTH + 1],
    /// Of all four.
    birth: u32,
    /// Places, above them the lengths, above those the states.
    words: [u64; WIDTH],
}

const _: () = assert!(size_of::<Line>() == 64);

/// Places are below 2^48 sectors.
const LENGTH_SHIFT: u32 = 48;
const STATE_SHIFT: u32 = 62;
const PLACE_MASK: u64 = (1 << LENGTH_SHIFT) - 1;
/// The length of an extent that is this long or longer: as far as the line.
const LONG: u32 = (1 << (STATE_SHIFT - LENGTH_SHIFT)) - 1;
/// By their numbers.
const STATES: [State; 4] = [State::Hole, State::Unwritten, State::Written, State::Zero];

impl Line {
    /// One that covers nothing.
    pub(crate) const EMPTY: Line =
        Line { first: 0, keys: [0; WIDTH + 1], birth: 0, words: [0; WIDTH] };

    /// The block is one of those it covers.
    #[inline]
    pub(crate) fn covers(&self, block: u64) -> bool {
        block.wrapping_sub(self.first) < u64::from(self.keys[WIDTH])
    }

    /// `block` is behind those it covers.
    #[inline]
    pub(crate) fn ends_by(&self, block: u64) -> bool {
        block >= self.first + u64::from(self.keys[WIDTH])
    }

    /// Where its blocks begin.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    fn len(&self) -> usize {
        self.keys.iter().filter(|key| **key < self.keys[WIDTH]).count()
    }

    /// How many of the extents a line that begins at `first` can take.
    fn capacity_for(first: u64, extents: &[Extent]) -> usize {
        let near = |extent: &Extent| extent.end() - first <= u64::from(u32::MAX);
        let birth = extents.first().map_or(0, |extent| extent.birth);
        let fits =
            extents.iter().take(WIDTH).take_while(|extent| near(extent) && extent.birth == birth);
        let fits = fits.count();
        // A long one is the last.
        extents[..fits].iter().position(is_long).map_or(fits, |long| long + 1)
    }

    /// A line with these extents, that covers the blocks from `first` to `end`, or fewer.
    fn new(first: u64, extents: &[Extent], end: u64) -> Line {
        let span = u32::try_from(end - first).unwrap_or(u32::MAX);
        let mut line = Line { first, keys: [span; WIDTH + 1], ..Line::EMPTY };
        for (index, extent) in extents.iter().enumerate() {
            line.birth = extent.birth;
            // Narrow enough, as its end is.
            line.keys[index] = (extent.logical - first) as u32;
            let length = u64::from(extent.length.min(LONG)) << LENGTH_SHIFT;
            line.words[index] =
                extent.physical | length | state_number(extent.state) << STATE_SHIFT;
        }
        line
    }

    /// What is known of `block`, which it covers, and for how many blocks: as far as its own end, if nothing
    /// comes before.
    #[inline]
    pub(crate) fn find(&self, block: u64, sectors_per_block: u64) -> (Mapping, u64) {
        let offset = (block - self.first) as u32;
        // Without branches that could be guessed wrong: whether a block is in an extent is a coin's toss.
        let before =
            self.keys[..WIDTH].iter().map(|key| usize::from(*key <= offset)).sum::<usize>();
        let index = before.saturating_sub(1);
        let (word, next) = (self.words[index], self.keys[before]);
        let skip = offset.wrapping_sub(self.keys[index]);
        let length = self.length(index);
        let inside = before > 0 && skip < length;
        let (run, word) = if inside { (length - skip, word) } else { (next - offset, 0) };
        let place = word & PLACE_MASK;
        let skipped = if place == 0 { 0 } else { u64::from(skip) * sectors_per_block };
        let state = STATES[(word >> STATE_SHIFT) as usize];
        let birth = if inside { self.birth } else { 0 };
        (Mapping { state, place: place + skipped, birth }, u64::from(run))
    }

    #[inline]
    fn length(&self, index: usize) -> u32 {
        let length = (self.words[index] >> LENGTH_SHIFT) as u32 & LONG;
        if length == LONG { self.keys[WIDTH] - self.keys[index] } else { length }
    }

    fn extent(&self, index: usize) -> Extent {
        let word = self.words[index];
        Extent {
            logical: self.first + u64::from(self.keys[index]),
            physical: word & PLACE_MASK,
            state: state_of(word >> STATE_SHIFT),
            length: self.length(index),
            birth: self.birth,
        }
    }
}

fn is_long(extent: &Extent) -> bool {
    extent.length >= LONG
}

/// Fills `lines` with the extents of a leaf that covers `first` to `end`, and says how many it took; `None` if
/// they do not suffice, or there are no extents.
pub(crate) fn fill(lines: &mut [Line], extents: &[Extent], first: u64, end: u64) -> Option<usize> {
    if extents.is_empty() {
        return None;
    }
    let mut lines_used = 0;
    let (mut rest, mut at) = (extents, first);
    loop {
        if let Some(extent) = rest.first()
            && Line::capacity_for(at, rest) == 0
        {
            // What lies between is not covered.
            at = extent.logical;
        }
        let (taken, others) = rest.split_at(Line::capacity_for(at, rest));
        let next = others.first().map_or(end, |extent| extent.logical);
        let reach = taken.last().filter(|extent| is_long(extent)).map_or(next, Extent::end);
        *lines.get_mut(lines_used)? = Line::new(at, taken, reach);
        lines_used += 1;
        (rest, at) = (others, reach);
        if rest.is_empty() && (at == end || !taken.last().is_some_and(is_long)) {
            return Some(lines_used);
        }
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
        let next = self.lines[index..].iter().map(|line| line.first).find(|first| *first > block);
        (Mapping::HOLE, next.unwrap_or(self.end) - block)
    }

    /// The extents.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        self.lines.iter().flat_map(|line| (0..line.len()).map(|index| line.extent(index))).collect()
    }
}

fn state_number(state: ExtentState) -> u64 {
    match state {
        ExtentState::Unwritten => 1,
        ExtentState::Written => 2,
        ExtentState::Zero => 3,
    }
}

fn state_of(number: u64) -> ExtentState {
    match number {
        1 => ExtentState::Unwritten,
        2 => ExtentState::Written,
        _ => ExtentState::Zero,
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
                    0 => (LONG - 1) + random(3) as u32,
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
    }
}
