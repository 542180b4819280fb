//! Sector stamps: what every 512-byte sector that a test writes contains.
//!
//! A stamp carries its own place and the number of the write it belongs to, and the rest of the sector
//! is made from these two. So a sector that reads back wrong says what went wrong: zeroes, the data of
//! another place, an older write, or a torn mixture.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x3153_5041_4D54_5358;

/// What a sector was found to contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A whole stamp: of this sector, from write `generation`.
    Stamp {
        /// The sector address in the stamp.
        sector: u64,
        /// The number of the write.
        generation: u64,
    },
    /// 512 zero bytes.
    Zeroes,
    /// Neither: torn, or never written by a test.
    Garbage,
}

/// Fills one sector with the stamp of (`sector`, `generation`).
///
/// # Panics
/// If `out` is not one sector long.
pub fn fill(out: &mut [u8], sector: u64, generation: u64) {
    assert_eq!(out.len(), SECTOR);
    let mut state = sector.rotate_left(32) ^ generation.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for (word, chunk) in out.chunks_exact_mut(8).enumerate() {
        let value = match word {
            0 => MAGIC,
            1 => sector,
            2 => generation,
            _ => next_random(&mut state),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
}

/// Fills a buffer of whole sectors; the first has address `sector`.
pub fn fill_run(out: &mut [u8], sector: u64, generation: u64) {
    for (index, chunk) in (0u64..).zip(out.chunks_exact_mut(SECTOR)) {
        fill(chunk, sector + index, generation);
    }
}

/// Says what one sector contains.
pub fn read(sector: &[u8]) -> Found {
    if sector.iter().all(|byte| *byte == 0) {
        return Found::Zeroes;
    }
    let word = |index: usize| {
        let bytes = sector.get(index * 8..index * 8 + 8).and_then(|b| b.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let mut expected = [0u8; SECTOR];
    fill(&mut expected, word(1), word(2));
    if word(0) == MAGIC && sector == expected {
        Found::Stamp { sector: word(1), generation: word(2) }
    } else {
        Found::Garbage
    }
}

/// The next value of a splitmix64 sequence: the tests' only source of chance, so that a seed repeats a run.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_back_and_a_torn_one_does_not() {
        let mut sector = [0u8; SECTOR];
        assert_eq!(read(&sector), Found::Zeroes);
        fill(&mut sector, 63, 7);
        assert_eq!(read(&sector), Found::Stamp { sector: 63, generation: 7 });
        sector[300] ^= 1;
        assert_eq!(read(&sector), Found::Garbage);
    }
}
