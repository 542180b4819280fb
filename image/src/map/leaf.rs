//! A leaf of the tree in memory, made for looking up.

use super::Mapping;
use exd_format::{Extent, ExtentState};

/// Extents in order. Keys are counted from the first.
pub(crate) struct Leaf {
    base: u64,
    /// The last key.
    last: u32,
    /// Entries per block, on average.
    scale: f32,
    keys: Box<[u32]>,
    values: Box<[Value]>,
}

/// What an extent is besides its key.
#[derive(Clone, Copy)]
struct Value {
    /// The place, and above it the state.
    place: u64,
    length: u32,
    birth: u32,
}

/// Places are below 2^48 sectors.
const STATE_SHIFT: u32 = 62;
const PLACE_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// Keys that are compared around the guess.
const WINDOW: usize = 32;

impl Leaf {
    /// The compact form; `None` if the extents are too far apart for it, or there are none.
    pub(crate) fn new(extents: &[Extent]) -> Option<Leaf> {
        let base = extents.first()?.logical;
        let last = u32::try_from(extents.last()?.logical - base).ok()?;
        // Narrow enough: the last key was.
        let keys = extents.iter().map(|extent| (extent.logical - base) as u32).collect();
        let values = extents
            .iter()
            .map(|extent| Value {
                place: extent.physical | u64::from(state_number(extent.state)) << STATE_SHIFT,
                length: extent.length,
                birth: extent.birth,
            })
            .collect();
        let scale = (extents.len() - 1) as f32 / last.max(1) as f32;
        Some(Leaf { base, last, scale, keys, values })
    }

    /// The key of the last extent.
    pub(crate) fn last_key(&self) -> u64 {
        self.base + u64::from(self.last)
    }

    /// What is known of `block`, which the leaf covers, and for how many blocks: as far as `end`, where the
    /// leaf's range ends, if nothing comes before.
    pub(crate) fn find(&self, block: u64, end: u64, sectors_per_block: u64) -> (Mapping, u64) {
        let Some(offset) = block.checked_sub(self.base) else {
            return (Mapping::HOLE, self.base - block);
        };
        let index = self.position(offset);
        let value = self.values[index];
        let skip = offset - u64::from(self.keys[index]);
        if skip < u64::from(value.length) {
            let mapping =
                Mapping::of_extent(&self.extent(index)).advanced(skip * sectors_per_block);
            return (mapping, u64::from(value.length) - skip);
        }
        let next = self.keys.get(index + 1).map_or(end, |key| self.base + u64::from(*key));
        (Mapping::HOLE, next - block)
    }

    /// The last entry whose key is not above `offset`. The first key is 0, so there is one.
    fn position(&self, offset: u64) -> usize {
        let keys = &self.keys;
        if offset >= u64::from(self.last) {
            return keys.len() - 1;
        }
        let offset = offset as u32;
        // Where it would be if the keys were spread evenly, which they often nearly are; all of a window
        // around it is counted, without a branch that could be guessed wrong.
        let guess = (offset as f32 * self.scale) as usize;
        let start = guess.saturating_sub(WINDOW / 2).min(keys.len().saturating_sub(WINDOW));
        if let Some(window) = keys[start..].first_chunk::<WINDOW>()
            && window[0] <= offset
        {
            let below: u32 = window.iter().map(|key| u32::from(*key <= offset)).sum();
            let index = start + below as usize - 1;
            if (below as usize) < WINDOW || index + 1 == keys.len() {
                return index;
            }
        }
        keys.partition_point(|key| *key <= offset) - 1
    }

    fn extent(&self, index: usize) -> Extent {
        let Value { place, length, birth } = self.values[index];
        Extent {
            logical: self.base + u64::from(self.keys[index]),
            physical: place & PLACE_MASK,
            state: state_of(place >> STATE_SHIFT),
            length,
            birth,
        }
    }

    /// One that covers nothing.
    pub(crate) fn empty() -> Leaf {
        Leaf { base: 0, last: 0, scale: 0.0, keys: Box::default(), values: Box::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The extents.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        (0..self.keys.len()).map(|index| self.extent(index)).collect()
    }

    /// Bytes that the entries take.
    pub(crate) fn memory(&self) -> usize {
        self.keys.len() * (size_of::<u32>() + size_of::<Value>())
    }
}

fn state_number(state: ExtentState) -> u8 {
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
    use super::super::State;
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
                let length = 1 + random(5) as u32;
                let state = [ExtentState::Unwritten, ExtentState::Written, ExtentState::Zero]
                    [random(3) as usize];
                let physical = if state == ExtentState::Zero { 0 } else { (1 + index) << 40 >> 1 };
                let birth = random(9) as u32;
                extents.push(Extent { logical: at, physical, state, length, birth });
                let gap = match round % 3 {
                    0 => random(3),
                    1 => random(40),
                    _ => random(2) * random(1 << (round % 20)),
                };
                at += u64::from(length) + gap;
            }
            let end = at + random(100);
            let leaf = Leaf::new(&extents).expect("near enough");
            assert_eq!(leaf.extents(), extents);
            let start = extents[0].logical.saturating_sub(20);
            for _ in 0..400 {
                let block = start + random(end - start);
                let (mapping, run) = leaf.find(block, end, 8);
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
                        assert_eq!(block + run, next.map_or(end, |extent| extent.logical));
                    }
                }
            }
        }
    }

    #[test]
    fn far_apart_is_refused() {
        let extent = |logical| Extent {
            logical,
            physical: 8,
            state: ExtentState::Written,
            length: 1,
            birth: 0,
        };
        assert!(Leaf::new(&[extent(0), extent(1 << 32)]).is_none());
        assert!(Leaf::new(&[extent(7), extent(6 + (1 << 32))]).is_some());
        assert!(Leaf::new(&[]).is_none());
    }
}
