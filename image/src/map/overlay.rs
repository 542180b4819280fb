//! Changes to the extent map that no checkpoint has written yet.

use super::Mapping;
use std::collections::BTreeMap;

/// An interval map over block numbers. A hole in it is an answer too: "known to be a hole" differs
/// from "nothing changed here".
pub(crate) struct Overlay {
    pieces: BTreeMap<u64, (u64, Mapping)>,
    sectors_per_block: u64,
}

/// The pieces of an overlay that is no longer needed: each that is taken is freed.
pub(crate) type OverlayPieces = std::collections::btree_map::IntoIter<u64, (u64, Mapping)>;

impl Overlay {
    pub(crate) fn into_pieces(self) -> OverlayPieces {
        self.pieces.into_iter()
    }

    pub(crate) fn new(sectors_per_block: u64) -> Self {
        Overlay { pieces: BTreeMap::new(), sectors_per_block }
    }

    /// Number of pieces held.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The mapping at `block` and how far it reaches; or how far it is to the next piece.
    #[inline]
    pub(crate) fn find(&self, block: u64) -> Result<(Mapping, u64), u64> {
        if self.pieces.is_empty() { Err(u64::MAX) } else { self.find_piece(block) }
    }

    fn find_piece(&self, block: u64) -> Result<(Mapping, u64), u64> {
        if let Some((&start, &(len, mapping))) = self.pieces.range(..=block).next_back()
            && block < start + len
        {
            let skip = block - start;
            return Ok((mapping.advanced(skip * self.sectors_per_block), len - skip));
        }
        match self.pieces.range(block..).next() {
            Some((&start, _)) => Err(start - block),
            None => Err(u64::MAX),
        }
    }

    /// Start of the first piece that reaches past `block`.
    pub(crate) fn next_from(&self, block: u64) -> Option<u64> {
        match self.find(block) {
            Ok(_) => Some(block),
            Err(u64::MAX) => None,
            Err(gap) => Some(block + gap),
        }
    }

    /// Sets `len` blocks from `block`, over whatever was there.
    pub(crate) fn set(&mut self, block: u64, len: u64, mapping: Mapping) {
        assert!(len > 0);
        let end = block + len;
        self.split(block);
        self.split(end);
        while let Some((&start, _)) = self.pieces.range(block..end).next() {
            self.pieces.remove(&start);
        }
        let (mut start, mut total, mut first) = (block, len, mapping);
        if let Some((&before, &(before_len, before_mapping))) =
            self.pieces.range(..block).next_back()
            && before + before_len == block
            && self.continues(before_mapping, before_len, mapping)
        {
            (start, total, first) = (before, total + before_len, before_mapping);
        }
        if let Some(&(after_len, after)) = self.pieces.get(&end)
            && self.continues(mapping, len, after)
        {
            self.pieces.remove(&end);
            total += after_len;
        }
        self.pieces.insert(start, (total, first));
    }

    /// The pieces from `block` on; the first may begin before it and is then cut.
    pub(crate) fn iter_from(&self, block: u64) -> impl Iterator<Item = (u64, u64, Mapping)> + '_ {
        let cut = match self.find(block) {
            Ok((mapping, len)) => Some((block, len, mapping)),
            Err(_) => None,
        };
        let from = if cut.is_some() { block.saturating_add(1) } else { block };
        cut.into_iter()
            .chain(self.pieces.range(from..).map(|(&start, &(len, mapping))| (start, len, mapping)))
    }

    fn continues(&self, left: Mapping, left_len: u64, right: Mapping) -> bool {
        left.state == right.state
            && left.birth == right.birth
            && (left.place == 0) == (right.place == 0)
            && left.advanced(left_len * self.sectors_per_block) == right
    }

    fn split(&mut self, at: u64) {
        let Some((&start, &(len, mapping))) = self.pieces.range(..at).next_back() else { return };
        if at < start + len {
            let left = at - start;
            self.pieces.insert(start, (left, mapping));
            let right = mapping.advanced(left * self.sectors_per_block);
            self.pieces.insert(at, (len - left, right));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn agrees_with_an_array() {
        let mut overlay = Overlay::new(8);
        let mut array: Vec<Option<Mapping>> = vec![None; 100];
        let mut seed = 99u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (seed >> 33) % 100;
            let len = (1 + (seed >> 45) % 12).min(100 - start);
            let state = [State::Hole, State::Unwritten, State::Written, State::Zero]
                [(seed >> 60) as usize % 4];
            let place = match state {
                State::Hole => 0,
                _ => 8 * (1 + start + 1000 * ((seed >> 50) % 2)),
            };
            let mapping = Mapping { state, place, birth: 1 };
            overlay.set(start, len, mapping);
            for i in 0..len {
                array[(start + i) as usize] = Some(mapping.advanced(i * 8));
            }
            for block in 0..100u64 {
                match overlay.find(block) {
                    Ok((mapping, run)) => {
                        for i in 0..run {
                            assert_eq!(array[(block + i) as usize], Some(mapping.advanced(i * 8)));
                        }
                    }
                    Err(gap) => {
                        let end = block.saturating_add(gap).min(100);
                        assert!(array[block as usize..end as usize].iter().all(Option::is_none));
                    }
                }
            }
            let covered: u64 = overlay.iter_from(0).map(|(_, len, _)| len).sum();
            assert_eq!(covered, array.iter().flatten().count() as u64);
        }
    }
}
