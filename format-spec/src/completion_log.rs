//! The completion log: the mapped file that outlives the daemon.

use crate::error::{DecodeError, ensure};
use crate::fields::{Id16, U32, U64, get_at, located, put_at};
use crate::header::{self, StructureType};
use crate::journal::Entry;
use crate::superblock::Geometry;

/// Bytes of the header; the slots follow.
pub const COMPLETION_LOG_HEADER_SIZE: usize = completion_log_layout::SIZE;
/// Bytes of a slot.
pub const COMPLETION_SLOT_SIZE: usize = completion_slot_layout::SIZE;
/// Most slots a log can have.
pub const SLOT_COUNT_MAX: u32 = 1 << 24;
/// A sync of the image failed: nothing after it may be acknowledged as durable. Set in place, so
/// the header's checksum counts the flags as zero.
pub const FLAG_SYNC_FAILED: u32 = 1 << 0;

const NAME: &str = "completion log";

structure! {
    /// The header of a completion log.
    pub struct CompletionLogHeader, completion_log_layout, 4096; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// Epoch of the session.
        epoch: u64 as U64 = 8,
        (address: U64) = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        /// The boot of the host in which it was written.
        boot_id: [u8; 16] as Id16 = 40,
        /// Which file or device the image is on that host (device and inode).
        storage: [u8; 16] as Id16 = 56,
        /// Number of slots.
        slot_count: u32 as U32 = 72,
        (slot_size: U32) = 76,
        /// [`FLAG_SYNC_FAILED`].
        flags: u32 as U32 = 80,
        [4012] = 84,
    }
}

impl CompletionLogHeader {
    /// Byte offset in the log of the slot of a completion sequence.
    pub fn slot_offset(&self, cseq: u64) -> u64 {
        let slot = cseq % u64::from(self.slot_count.max(1));
        COMPLETION_LOG_HEADER_SIZE as u64 + slot * COMPLETION_SLOT_SIZE as u64
    }

    /// Length of the whole log in bytes.
    pub fn file_length(&self) -> u64 {
        COMPLETION_LOG_HEADER_SIZE as u64 + u64::from(self.slot_count) * COMPLETION_SLOT_SIZE as u64
    }

    /// The 4096 bytes of the header, sealed.
    pub fn encode(&self) -> Vec<u8> {
        use completion_log_layout as at;
        assert!((1..=SLOT_COUNT_MAX).contains(&self.slot_count), "impossible number of slots");
        let mut bytes = vec![0; COMPLETION_LOG_HEADER_SIZE];
        self.put_fields(&mut bytes);
        put_at::<U32>(&(COMPLETION_SLOT_SIZE as u32), &mut bytes, at::slot_size);
        put_at::<U32>(&0, &mut bytes, at::flags);
        header::finish(StructureType::CompletionLog, &mut bytes);
        put_at::<U32>(&self.flags, &mut bytes, at::flags);
        bytes
    }

    /// Decodes the header of a log of the image with this uuid. Whether boot, storage and epoch are
    /// the right ones is the caller's question.
    pub fn decode(bytes: &[u8], uuid: &[u8; 16]) -> Result<CompletionLogHeader, DecodeError> {
        use completion_log_layout as at;
        ensure(bytes.len() == COMPLETION_LOG_HEADER_SIZE, NAME, 0, "header is not 4096 bytes")?;
        let mut sealed = bytes.to_vec();
        put_at::<U32>(&0, &mut sealed, at::flags);
        header::check(StructureType::CompletionLog, &sealed, 0, Some(uuid))?;
        CompletionLogHeader::check_reserved(bytes).map_err(located(NAME))?;
        let log = CompletionLogHeader::get_fields(bytes).map_err(located(NAME))?;
        let slot_size = get_at::<U32>(bytes, at::slot_size).map_err(located(NAME))?;
        ensure(
            slot_size as usize == COMPLETION_SLOT_SIZE,
            NAME,
            at::slot_size,
            "slots are not 40 bytes",
        )?;
        ensure(
            (1..=SLOT_COUNT_MAX).contains(&log.slot_count),
            NAME,
            at::slot_count,
            "not 1 to 2^24 slots",
        )?;
        ensure(log.flags & !FLAG_SYNC_FAILED == 0, NAME, at::flags, "unknown flag")?;
        Ok(log)
    }
}

structure! {
    /// A slot of the completion log: one completed change.
    #[derive(Copy)]
    pub struct CompletionSlot, completion_slot_layout, 40; {
        /// The change.
        entry: Entry as Entry = 0,
        /// Its completion sequence.
        cseq: u64 as U64 = 24,
        (epoch: U32) = 32,
        (crc: U32) = 36,
    }
}

/// What a slot of the log holds for a replay that wants a certain completion sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogSlot {
    /// The completion that is due.
    Apply(Entry),
    /// The log ends before it.
    End,
    /// The log is damaged, and how.
    Corrupt(DecodeError),
}

impl CompletionSlot {
    /// The 40 bytes of the slot for the log of this image and session.
    pub fn encode(&self, uuid: &[u8; 16], epoch: u64) -> [u8; COMPLETION_SLOT_SIZE] {
        use completion_slot_layout as at;
        let mut bytes = [0; COMPLETION_SLOT_SIZE];
        self.put_fields(&mut bytes);
        put_at::<U32>(&(epoch as u32), &mut bytes, at::epoch);
        put_at::<U32>(&slot_crc(uuid, &bytes), &mut bytes, at::crc);
        bytes
    }

    /// The slot's completion, if it holds one of this image and session; `Ok(None)` if it was never
    /// written, is half written, or is of another session.
    pub fn decode(
        bytes: &[u8],
        uuid: &[u8; 16],
        epoch: u64,
    ) -> Result<Option<CompletionSlot>, DecodeError> {
        use completion_slot_layout as at;
        let error = located(NAME);
        let stored = get_at::<U32>(bytes, at::crc).map_err(&error)?;
        if stored != slot_crc(uuid, bytes)
            || get_at::<U32>(bytes, at::epoch).map_err(&error)? != epoch as u32
        {
            return Ok(None);
        }
        CompletionSlot::get_fields(bytes).map(Some).map_err(error)
    }

    /// Decides what the slot of completion `cseq` holds. The table is in `SPEC.md`, "Completion log".
    pub fn classify(bytes: &[u8], geometry: &Geometry, epoch: u64, cseq: u64) -> LogSlot {
        match CompletionSlot::decode(bytes, &geometry.uuid, epoch) {
            Err(error) => LogSlot::Corrupt(error),
            Ok(None) => LogSlot::End,
            Ok(Some(slot)) if slot.cseq < cseq => LogSlot::End,
            Ok(Some(slot)) if slot.cseq > cseq => LogSlot::Corrupt(DecodeError::corrupt(
                NAME,
                completion_slot_layout::cseq,
                format!("completion {} where {cseq} was due", slot.cseq),
            )),
            Ok(Some(slot)) => match slot.entry.validate(geometry) {
                Ok(()) => LogSlot::Apply(slot.entry),
                Err(error) => LogSlot::Corrupt(error),
            },
        }
    }
}

/// CRC32 of the image's uuid followed by the slot up to its checksum.
fn slot_crc(uuid: &[u8; 16], bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(uuid);
    hasher.update(bytes.get(..completion_slot_layout::crc).unwrap_or(bytes));
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{UUID, corruption, each_bit_flip, each_sealed_flip, geometry, patched};
    use completion_log_layout as at;

    fn log() -> CompletionLogHeader {
        CompletionLogHeader {
            epoch: 3,
            uuid: UUID,
            boot_id: [1; 16],
            storage: [2; 16],
            slot_count: 100,
            flags: 0,
        }
    }

    fn slot(cseq: u64) -> CompletionSlot {
        CompletionSlot { entry: Entry::map(10, 0x1000, 4, 1), cseq }
    }

    #[test]
    fn round_trip() {
        for flags in [0, FLAG_SYNC_FAILED] {
            let log = CompletionLogHeader { flags, ..log() };
            assert_eq!(CompletionLogHeader::decode(&log.encode(), &UUID), Ok(log));
        }
        assert_eq!(log().slot_offset(205), 4096 + 5 * 40);
        assert_eq!(log().file_length(), 4096 + 4000);
        let bytes = slot(205).encode(&UUID, 3);
        assert_eq!(CompletionSlot::decode(&bytes, &UUID, 3), Ok(Some(slot(205))));
    }

    /// P5: the flag is set in place, without sealing again.
    #[test]
    fn p5_the_flag_of_a_failed_sync_leaves_the_checksum_alone() {
        let mut bytes = log().encode();
        bytes[at::flags] |= FLAG_SYNC_FAILED as u8;
        let found = CompletionLogHeader::decode(&bytes, &UUID).expect("decodes");
        assert_eq!(found.flags, FLAG_SYNC_FAILED);
    }

    #[test]
    fn p6_every_bit_flip_is_seen() {
        each_bit_flip(&log().encode(), |bytes| {
            // Bit 0 of the flags is the one that changes in place.
            bytes[at::flags] & 1 == 0 && CompletionLogHeader::decode(bytes, &UUID).is_ok()
        });
        each_bit_flip(&slot(5).encode(&UUID, 3), |bytes| {
            CompletionSlot::decode(bytes, &UUID, 3) != Ok(None)
        });
    }

    #[test]
    fn p8_sealed_flips_are_harmless() {
        each_sealed_flip(&log().encode(), |bytes| {
            CompletionLogHeader::decode(bytes, &UUID).ok().map(|log| log.encode())
        });
    }

    #[test]
    fn rejects() {
        let bytes = log().encode();
        corruption(CompletionLogHeader::decode(&bytes, &[0; 16]));
        corruption(CompletionLogHeader::decode(&bytes[..4095], &UUID));
        corruption(CompletionLogHeader::decode(&patched(&bytes, at::slot_count, &[0]), &UUID));
        corruption(CompletionLogHeader::decode(
            &patched(&bytes, at::slot_count, &[0xFF; 4]),
            &UUID,
        ));
        corruption(CompletionLogHeader::decode(&patched(&bytes, at::slot_size, &[24]), &UUID));
        corruption(CompletionLogHeader::decode(&patched(&bytes, at::address, &[1]), &UUID));
        corruption(CompletionLogHeader::decode(&patched(&bytes, 4095, &[1]), &UUID));
        for len in 0..40 {
            assert!(!matches!(CompletionSlot::decode(&vec![0; len], &UUID, 0), Ok(Some(_))));
        }
    }

    /// P2, P6: what a slot means, over every combination of its inputs.
    #[test]
    fn p6_slot_decision_over_every_combination() {
        for whole in [false, true] {
            for ours in [false, true] {
                for epoch in [3_u64, 4] {
                    for cseq in [104, 105, 106] {
                        for valid in [false, true] {
                            let mut slot = slot(cseq);
                            if !valid {
                                slot.entry.length = 0;
                            }
                            let uuid = if ours { UUID } else { [0; 16] };
                            let mut bytes = slot.encode(&uuid, epoch);
                            bytes[20] ^= u8::from(!whole);
                            let found = CompletionSlot::classify(&bytes, &geometry(), 3, 105);
                            let is_slot = whole && ours && epoch == 3;
                            let right = match found {
                                LogSlot::End => !is_slot || cseq < 105,
                                LogSlot::Corrupt(_) => {
                                    is_slot && (cseq > 105 || cseq == 105 && !valid)
                                }
                                LogSlot::Apply(entry) => {
                                    entry == slot.entry && is_slot && cseq == 105 && valid
                                }
                            };
                            assert!(right, "{whole} {ours} {epoch} {cseq} {valid}");
                        }
                    }
                }
            }
        }
    }
}
