//! What every written sector carries: its address, the generation of the write, a checksum.
//!
//! A pattern of one byte shows zeroes and stale data; a stamp also shows whose data it is.

use crate::api::SECTOR;
use crate::host_file::mix;

const MAGIC: u64 = u64::from_le_bytes(*b"EXDSTAMP");
const SIZE: usize = SECTOR as usize;

/// What a sector was found to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Zeroes.
    Zero,
    /// The whole data of this generation for this very sector.
    Generation(u64),
    /// Whole data that belongs to another sector.
    Misplaced {
        /// Where it belongs.
        sector: u64,
        /// The generation that wrote it.
        generation: u64,
    },
    /// Anything else.
    Garbage,
}

/// Fills one sector.
pub fn fill(sector: u64, generation: u64, out: &mut [u8]) {
    for (index, chunk) in out[..SIZE].chunks_exact_mut(8).enumerate() {
        let word = match index {
            0 => MAGIC,
            1 => sector,
            2 => generation,
            3 => 0,
            _ => mix(sector ^ generation << 32).wrapping_add(index as u64),
        };
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    let crc = crc32fast::hash(&out[..SIZE]);
    out[24..28].copy_from_slice(&crc.to_le_bytes());
}

/// The data of a write of `sectors` sectors from `sector` on.
pub fn data(sector: u64, sectors: u64, generation: u64) -> Vec<u8> {
    let mut bytes = vec![0; (sectors * SECTOR) as usize];
    for (index, out) in bytes.chunks_exact_mut(SIZE).enumerate() {
        fill(sector + index as u64, generation, out);
    }
    bytes
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
    u64::from_le_bytes(raw)
}

/// Recognises the content of a sector.
pub fn identify(sector: u64, bytes: &[u8]) -> Found {
    if bytes.iter().all(|b| *b == 0) {
        return Found::Zero;
    }
    let (owner, generation) = (word(bytes, 1), word(bytes, 2));
    let mut whole = [0; SIZE];
    fill(owner, generation, &mut whole);
    if whole != bytes {
        return Found::Garbage;
    }
    if owner == sector {
        Found::Generation(generation)
    } else {
        Found::Misplaced { sector: owner, generation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_recognised_where_it_belongs_only() {
        let bytes = data(63, 2, 9);
        assert_eq!(identify(63, &bytes[..512]), Found::Generation(9));
        assert_eq!(identify(63, &bytes[512..]), Found::Misplaced { sector: 64, generation: 9 });
        assert_eq!(identify(63, &[0; 512]), Found::Zero);
        let mut torn = bytes[..512].to_vec();
        torn[511] ^= 1;
        assert_eq!(identify(63, &torn), Found::Garbage);
    }
}
