//! The space list: what the tree does not say about space.

use crate::error::{DecodeError, ensure};
use crate::fields::{Id16, U8, U32, U48, U64, check_zero, get_at, located, put_at};
use crate::header::{self, StructureType};
use crate::superblock::{AreaPointer, FIXED_AREA, Geometry};
use crate::{METADATA_ALIGN, SECTOR, checksum};

/// Longest space list in bytes.
pub const SPACE_LIST_MAX: u64 = 64 << 20;
/// Byte offset of the first range in a space list.
pub const SPACE_ENTRIES_OFFSET: usize = space_list_layout::SIZE;
/// Bytes of a range.
pub const SPACE_RANGE_SIZE: usize = space_range_layout::SIZE;

const NAME: &str = "space list";

enumeration! {
    /// What is known of a range.
    pub enum SpaceKind: U8, "kind of space" {
        /// Owned by nothing, or not yet; may hold anything.
        Open = 1,
        /// Free, and durably zero. A cache: it may be forgotten.
        Zero = 2,
        /// Owned by the dirty bitmaps. A writer that clears their autoclear bit makes it open.
        Bitmaps = 3,
    }
}

structure! {
    /// A range of sectors of the image file.
    #[derive(Copy, Hash)]
    pub struct SpaceRange, space_range_layout, 16; {
        /// First sector.
        start: u64 as U48 = 0,
        /// What is known of it.
        kind: SpaceKind as SpaceKind = 6,
        [1] = 7,
        /// Number of sectors, at least 1.
        sectors: u64 as U64 = 8,
    }
}
nested!(SpaceRange, space_range_layout);

structure! {
    /// The space list of a checkpoint.
    pub struct SpaceList, space_list_layout, 64; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// The checkpoint that wrote it.
        generation: u64 as U64 = 8,
        /// Its byte offset in the image file.
        address: u64 as U64 = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        (count: U64) = 40,
        (length: U64) = 48,
        [8] = 56,
    }
    also {
        /// Sorted and disjoint.
        ranges: Vec<SpaceRange>,
    }
}

impl SpaceList {
    /// Bytes that a list of `count` ranges takes, a multiple of 4096.
    pub fn length_for(count: usize) -> u64 {
        let bytes = (count as u64) * (SPACE_RANGE_SIZE as u64) + SPACE_ENTRIES_OFFSET as u64;
        bytes.next_multiple_of(METADATA_ALIGN)
    }

    /// The pointer to this list, given its encoding.
    pub fn pointer(&self, encoded: &[u8]) -> AreaPointer {
        AreaPointer {
            address: self.address,
            length: encoded.len() as u64,
            crc: checksum::crc_of(encoded),
        }
    }

    /// The bytes of the list, sealed: [`SpaceList::length_for`] of them, or `length` if that is
    /// given and longer (for a place chosen before the list was final).
    pub fn encode(&self, length: Option<u64>) -> Vec<u8> {
        let least = SpaceList::length_for(self.ranges.len());
        let length = length.unwrap_or(least);
        assert!(
            (least..=SPACE_LIST_MAX).contains(&length) && length.is_multiple_of(METADATA_ALIGN),
            "space list does not fit its place"
        );
        if let Err(error) = self.validate_order() {
            panic!("encoding an invalid space list: {error}");
        }
        let mut bytes = vec![0; length as usize];
        self.put_fields(&mut bytes);
        put_at::<U64>(&(self.ranges.len() as u64), &mut bytes, space_list_layout::count);
        put_at::<U64>(&length, &mut bytes, space_list_layout::length);
        for (index, range) in self.ranges.iter().enumerate() {
            let at = SPACE_ENTRIES_OFFSET + index * SPACE_RANGE_SIZE;
            put_at::<SpaceRange>(range, &mut bytes, at);
        }
        header::finish(StructureType::SpaceList, &mut bytes);
        bytes
    }

    /// Decodes the list that `pointer` leads to.
    pub fn decode(
        bytes: &[u8],
        pointer: &AreaPointer,
        geometry: &Geometry,
    ) -> Result<SpaceList, DecodeError> {
        use space_list_layout as at;
        ensure(
            bytes.len() as u64 == pointer.length
                && pointer.length <= SPACE_LIST_MAX
                && pointer.length.is_multiple_of(METADATA_ALIGN),
            NAME,
            at::length,
            "not the length its pointer says",
        )?;
        header::check(StructureType::SpaceList, bytes, pointer.address, Some(&geometry.uuid))?;
        ensure(
            checksum::crc_of(bytes) == pointer.crc,
            NAME,
            at::crc,
            "not the list the superblock points at (other checksum)",
        )?;
        let mut list = SpaceList::get_fields(bytes).map_err(located(NAME))?;
        SpaceList::check_reserved(bytes).map_err(located(NAME))?;
        ensure(
            (1..=geometry.generation).contains(&list.generation),
            NAME,
            at::generation,
            "impossible generation",
        )?;
        let length = get_at::<U64>(bytes, at::length).map_err(located(NAME))?;
        ensure(length == pointer.length, NAME, at::length, "not the length its pointer says")?;
        let count = get_at::<U64>(bytes, at::count).map_err(located(NAME))?;
        let capacity = bytes.len().saturating_sub(SPACE_ENTRIES_OFFSET) / SPACE_RANGE_SIZE;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        ensure(count <= capacity, NAME, at::count, "more ranges than fit")?;
        list.ranges = (0..count)
            .map(|index| {
                get_at::<SpaceRange>(bytes, SPACE_ENTRIES_OFFSET + index * SPACE_RANGE_SIZE)
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(located(NAME))?;
        let used = SPACE_ENTRIES_OFFSET + count * SPACE_RANGE_SIZE;
        check_zero(bytes, used, bytes.len().saturating_sub(used)).map_err(located(NAME))?;
        list.validate_order()?;
        list.validate_end(geometry)?;
        Ok(list)
    }

    fn validate_order(&self) -> Result<(), DecodeError> {
        let mut free_from = FIXED_AREA / SECTOR;
        for (index, range) in self.ranges.iter().enumerate() {
            let offset = SPACE_ENTRIES_OFFSET + index * SPACE_RANGE_SIZE;
            ensure(
                range.start >= free_from && range.sectors >= 1,
                NAME,
                offset,
                "ranges overlap, are out of order, are empty or lie in the fixed area",
            )?;
            free_from = range.start.saturating_add(range.sectors);
        }
        Ok(())
    }

    fn validate_end(&self, geometry: &Geometry) -> Result<(), DecodeError> {
        let end = self.ranges.last().map_or(0, |range| range.start.saturating_add(range.sectors));
        ensure(
            end <= geometry.data_end / SECTOR,
            NAME,
            SPACE_ENTRIES_OFFSET + self.ranges.len().saturating_sub(1) * SPACE_RANGE_SIZE,
            "range past the end of the image's data",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{UUID, corruption, each_bit_flip, each_sealed_flip, geometry, patched};

    fn list(count: u64) -> SpaceList {
        let ranges = (0..count)
            .map(|index| SpaceRange {
                start: 128 + index * 16,
                kind: SpaceKind::ALL[index as usize % 3],
                sectors: 16,
            })
            .collect();
        SpaceList { generation: 7, address: 0x81000, uuid: UUID, ranges }
    }

    fn decode_as(list: &SpaceList, bytes: &[u8]) -> Result<SpaceList, DecodeError> {
        SpaceList::decode(bytes, &list.pointer(bytes), &geometry())
    }

    #[test]
    fn round_trip() {
        for count in [0, 1, 252, 253, 1000] {
            let list = list(count);
            let bytes = list.encode(None);
            assert_eq!(bytes.len() as u64, SpaceList::length_for(count as usize));
            assert_eq!(decode_as(&list, &bytes), Ok(list));
        }
        assert_eq!(SpaceList::length_for(252), 4096);
        assert_eq!(SpaceList::length_for(253), 8192);
        let roomy = list(3).encode(Some(12288));
        assert_eq!(decode_as(&list(3), &roomy), Ok(list(3)));
    }

    #[test]
    fn p6_every_bit_flip_is_seen() {
        let bytes = list(5).encode(None);
        let pointer = list(5).pointer(&bytes);
        each_bit_flip(&bytes, |bytes| SpaceList::decode(bytes, &pointer, &geometry()).is_ok());
    }

    #[test]
    fn p8_sealed_flips_are_harmless() {
        each_sealed_flip(&list(5).encode(None), |bytes| {
            decode_as(&list(5), bytes).ok().map(|found| found.encode(None))
        });
    }

    #[test]
    fn rejects() {
        let list = list(3);
        let bytes = list.encode(None);
        let pointer = list.pointer(&bytes);
        let first = SPACE_ENTRIES_OFFSET;
        let second = first + SPACE_RANGE_SIZE;
        let third = second + SPACE_RANGE_SIZE;
        let sectors = space_range_layout::sectors;
        let bad: &[(usize, &[u8])] = &[
            (space_list_layout::count, &[253, 0]),
            (space_list_layout::count, &[0xFF; 8]),
            (space_list_layout::count, &[2]),
            (space_list_layout::count, &[4]),
            (space_list_layout::length, &[0, 0x20]),
            (space_list_layout::generation, &[8]),
            (space_list_layout::generation, &[0]),
            (56, &[1]),
            (first, &[127]),
            (second, &[143]),
            (first + sectors, &[0]),
            (first + sectors, &[0xFF; 8]),
            (third + sectors, &[0xFF; 8]),
            (third + sectors, &(geometry().data_end / 512 - 159).to_le_bytes()),
            (first + space_range_layout::kind, &[0]),
            (first + space_range_layout::kind, &[4]),
            (first + 7, &[1]),
            (4095, &[1]),
        ];
        for (offset, patch) in bad {
            corruption(decode_as(&list, &patched(&bytes, *offset, patch)));
        }
        let wrong = [
            AreaPointer { address: 0x82000, ..pointer },
            AreaPointer { length: 8192, ..pointer },
            AreaPointer { crc: !pointer.crc, ..pointer },
        ];
        for pointer in wrong {
            corruption(SpaceList::decode(&bytes, &pointer, &geometry()));
        }
        for len in [0, 40, 64, 4095] {
            let pointer = AreaPointer { length: len, ..pointer };
            corruption(SpaceList::decode(&bytes[..len as usize], &pointer, &geometry()));
        }
    }
}
