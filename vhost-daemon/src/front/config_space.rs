//! The device's configuration space (virtio 1.2, 5.2.4), little-endian.

/// Offset of the `writeback` byte, the only one a driver may write.
pub const WCE_OFFSET: u32 = 32;

/// Length of the structure with the zoned fields, which are all zero here.
const LEN: usize = 96;

/// What the device tells the driver about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Most data segments in a request.
    pub seg_max: u32,
    /// Logical block in bytes.
    pub block_size: u32,
    /// Logical blocks per physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Queues offered.
    pub num_queues: u16,
    /// Largest discard in sectors.
    pub max_discard_sectors: u32,
    /// Most ranges in a discard.
    pub max_discard_seg: u32,
    /// Granularity of discards in sectors.
    pub discard_alignment: u32,
    /// Largest write-zeroes in sectors.
    pub max_write_zeroes_sectors: u32,
    /// Most ranges in a write-zeroes.
    pub max_write_zeroes_seg: u32,
}

impl ConfigSpace {
    /// `size` bytes at `offset`; what lies past the structure is zero.
    pub fn read(&self, offset: u32, size: u32, writeback: bool) -> Vec<u8> {
        let bytes = self.encode(writeback);
        (0..u64::from(size))
            .map(|i| {
                let at = usize::try_from(u64::from(offset) + i).unwrap_or(usize::MAX);
                bytes.get(at).copied().unwrap_or(0)
            })
            .collect()
    }

    fn encode(&self, writeback: bool) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.capacity.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(24, &[self.physical_block_exp]);
        let physical = 1u16.checked_shl(self.physical_block_exp.into()).unwrap_or(1);
        put(26, &physical.to_le_bytes());
        put(WCE_OFFSET as usize, &[u8::from(writeback)]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[1]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace {
            capacity: 0x0102_0304_0506,
            seg_max: 126,
            block_size: 512,
            physical_block_exp: 3,
            num_queues: 64,
            max_discard_sectors: 0x11,
            max_discard_seg: 0x22,
            discard_alignment: 8,
            max_write_zeroes_sectors: 0x33,
            max_write_zeroes_seg: 0x44,
        }
    }

    #[test]
    fn layout() {
        let bytes = space().read(0, 60, true);
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[..8], [6, 5, 4, 3, 2, 1, 0, 0]);
        assert_eq!(bytes[8..12], [0; 4]);
        assert_eq!(bytes[12], 126);
        assert_eq!(bytes[20..24], [0, 2, 0, 0]);
        assert_eq!(bytes[24..28], [3, 0, 8, 0]);
        assert_eq!(bytes[32], 1);
        assert_eq!(bytes[34..36], [64, 0]);
        assert_eq!(
            (bytes[36], bytes[40], bytes[44], bytes[48], bytes[52]),
            (0x11, 0x22, 8, 0x33, 0x44)
        );
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn any_window_has_the_length_asked_for() {
        assert_eq!(space().read(WCE_OFFSET, 1, false), [0]);
        assert_eq!(space().read(90, 20, true), [0; 20]);
        assert_eq!(space().read(u32::MAX, 4096, true), [0; 4096]);
    }
}
