//! An extent: a run of blocks of one state, as it lies in a leaf.

use crate::SECTOR;
use crate::error::{DecodeError, ensure};
use crate::fields::{U8, U32, U48, U64};
use crate::superblock::{FIXED_AREA, Geometry};

const NAME: &str = "extent";

enumeration! {
    /// The state of an extent. A hole is the absence of one. 4 (compressed) is not implemented.
    pub enum ExtentState: U8, "extent state" {
        /// Has a place, reads as zeroes (or backing data).
        Unwritten = 1,
        /// Has a place and its data is there.
        Written = 2,
        /// Reads as zeroes, whatever lies beneath; may keep a place.
        Zero = 3,
    }
}

structure! {
    /// A run of blocks of one state.
    #[derive(Copy, Hash)]
    pub struct Extent, extent_layout, 24; {
        /// First block of the virtual disk.
        logical: u64 as U64 = 0,
        /// Sector of the image file where it lies; 0 means no place (state zero only).
        physical: u64 as U48 = 8,
        [1] = 14,
        /// What the blocks hold.
        state: ExtentState as ExtentState = 15,
        /// Number of blocks, at least 1.
        length: u32 as U32 = 16,
        /// Birth number current when the extent came to be.
        birth: u32 as U32 = 20,
    }
}
nested!(Extent, extent_layout);

impl Extent {
    /// One past the last block.
    pub fn end(&self) -> u64 {
        self.logical.saturating_add(u64::from(self.length))
    }

    /// Bytes of the image file the extent owns: `start .. end`; `None` if it has no place.
    pub fn place(&self, block_bits: u8) -> Option<(u64, u64)> {
        place(self.physical, self.length, block_bits)
    }

    /// Checks the extent by itself and against the image.
    pub(crate) fn validate(&self, geometry: &Geometry) -> Result<(), DecodeError> {
        use extent_layout as at;
        ensure(self.length >= 1, NAME, at::length, "no blocks")?;
        ensure(
            self.logical < geometry.virtual_blocks() && self.end() <= geometry.virtual_blocks(),
            NAME,
            at::logical,
            "outside the virtual disk",
        )?;
        ensure(
            (1..=geometry.birth).contains(&self.birth),
            NAME,
            at::birth,
            "birth number not in use yet",
        )?;
        match self.place(geometry.block_bits) {
            None => ensure(
                self.state == ExtentState::Zero,
                NAME,
                at::physical,
                "an extent of this state needs a place",
            ),
            Some((start, end)) => ensure(
                start >= FIXED_AREA && end <= geometry.data_end,
                NAME,
                at::physical,
                "place outside the image's data",
            ),
        }
    }
}

/// Bytes `start .. end` of `blocks` blocks at a sector; `None` for sector 0. Cannot overflow: the
/// sector has 48 bits, the length at most 48.
pub(crate) fn place(physical: u64, blocks: u32, block_bits: u8) -> Option<(u64, u64)> {
    if physical == 0 {
        return None;
    }
    let start = physical.saturating_mul(SECTOR);
    Some((start, start.saturating_add(u64::from(blocks) << block_bits.min(crate::BLOCK_BITS_MAX))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::geometry;

    const GOOD: Extent =
        Extent { logical: 10, physical: 256, state: ExtentState::Written, length: 5, birth: 1 };

    #[test]
    fn places_are_bytes() {
        assert_eq!(GOOD.place(12), Some((131_072, 131_072 + 5 * 4096)));
        assert_eq!(Extent { physical: 0, ..GOOD }.place(12), None);
        let huge = Extent { physical: (1 << 48) - 1, length: u32::MAX, ..GOOD };
        assert!(huge.place(16).is_some_and(|(start, end)| start < end));
    }

    #[test]
    fn accepts_every_state_with_a_place_and_zero_without() {
        for &state in ExtentState::ALL {
            assert!(Extent { state, ..GOOD }.validate(&geometry()).is_ok());
            let bare = Extent { state, physical: 0, ..GOOD };
            assert_eq!(bare.validate(&geometry()).is_ok(), state == ExtentState::Zero);
        }
    }

    #[test]
    fn rejects_what_is_out_of_range() {
        let blocks = geometry().virtual_blocks();
        let bad = [
            Extent { length: 0, ..GOOD },
            Extent { logical: blocks - 4, ..GOOD },
            Extent { logical: u64::MAX, ..GOOD },
            Extent { physical: 127, ..GOOD },
            Extent { physical: geometry().data_end / 512 - 39, ..GOOD },
            Extent { physical: (1 << 48) - 1, length: u32::MAX, ..GOOD },
            Extent { birth: 0, ..GOOD },
            Extent { birth: 3, ..GOOD },
        ];
        for extent in bad {
            assert!(extent.validate(&geometry()).is_err(), "{extent:?}");
        }
        assert!(Extent { logical: blocks - 5, ..GOOD }.validate(&geometry()).is_ok());
        let last = Extent { physical: geometry().data_end / 512 - 40, ..GOOD };
        assert!(last.validate(&geometry()).is_ok());
    }
}
