//! Journal records, their entries, and the table that decides what a slot of the ring holds.

use crate::checksum;
use crate::error::{DecodeError, ensure};
use crate::extent::place;
use crate::fields::{FieldError, Id16, U8, U32, U48, U64, check_zero, get_at, located, put_at};
use crate::header::{self, StructureType, header_layout};
use crate::superblock::{FIXED_AREA, Geometry};
use crate::{PHYSICAL_END, SECTOR};

/// Longest record in bytes.
pub const RECORD_MAX: usize = 65536;
/// Byte offset of the first entry in a record.
pub const RECORD_ENTRIES_OFFSET: usize = record_layout::SIZE;
/// Bytes of an entry.
pub const ENTRY_SIZE: usize = entry_layout::SIZE;
/// The next entry belongs to the same group; a group is applied whole or not at all.
pub const FLAG_MORE: u8 = 1 << 0;
/// The range keeps the place it has (ZERO and RESERVE).
pub const FLAG_KEEP: u8 = 1 << 1;

const NAME: &str = "journal record";
const ENTRY: &str = "journal entry";

/// Entries that fit into a record of `length` bytes.
pub const fn entries_per_record(length: usize) -> usize {
    length.saturating_sub(RECORD_ENTRIES_OFFSET) / ENTRY_SIZE
}

/// Bytes of the shortest record that holds `entries` entries.
pub const fn length_for(entries: usize, record_bits: u8) -> usize {
    (RECORD_ENTRIES_OFFSET + entries * ENTRY_SIZE).next_multiple_of(1 << record_bits)
}

enumeration! {
    /// What an entry does to a range of blocks or sectors.
    pub enum EntryKind: U8, "kind of journal entry" {
        /// The range becomes written at a new place.
        Map = 1,
        /// The range becomes written at the place it has.
        Convert = 2,
        /// The range becomes unwritten, at a new place or (KEEP) the one it has.
        Reserve = 3,
        /// The range becomes zero; its place is kept (KEEP), freed, or there was none.
        Zero = 4,
        /// The range becomes a hole; its place is freed.
        Unmap = 5,
        /// Space is opened for allocation.
        Window = 6,
        /// Space is free and durably zero.
        Release = 7,
    }
}

structure! {
    /// A change of the extent map or of the space list.
    #[derive(Copy, Hash)]
    pub struct Entry, entry_layout, 24; {
        /// First block; for WINDOW and RELEASE the length in sectors.
        logical: u64 as U64 = 0,
        /// Sector of the image file; 0 for none.
        physical: u64 as U48 = 8,
        /// What happens.
        kind: EntryKind as EntryKind = 14,
        /// [`FLAG_MORE`], [`FLAG_KEEP`].
        flags: u8 as U8 = 15,
        /// Number of blocks; 0 for WINDOW and RELEASE.
        length: u32 as U32 = 16,
        /// Birth number for MAP, CONVERT, RESERVE and ZERO; else 0.
        birth: u32 as U32 = 20,
    }
}
nested!(Entry, entry_layout);

impl Entry {
    fn blocks(kind: EntryKind, logical: u64, physical: u64, length: u32, birth: u32) -> Entry {
        Entry { logical, physical, kind, flags: 0, length, birth }
    }

    /// The range becomes written at `physical` (a sector), a new place.
    pub fn map(logical: u64, physical: u64, blocks: u32, birth: u32) -> Entry {
        Entry::blocks(EntryKind::Map, logical, physical, blocks, birth)
    }

    /// The range becomes written at `physical`, the place it has.
    pub fn convert(logical: u64, physical: u64, blocks: u32, birth: u32) -> Entry {
        Entry::blocks(EntryKind::Convert, logical, physical, blocks, birth)
    }

    /// The range becomes unwritten at `physical`, a new place; [`Entry::keep`] if it has it already.
    pub fn reserve(logical: u64, physical: u64, blocks: u32, birth: u32) -> Entry {
        Entry::blocks(EntryKind::Reserve, logical, physical, blocks, birth)
    }

    /// The range becomes zero; `physical` is its old place, now freed (0: it had none), or the place
    /// it keeps with [`Entry::keep`].
    pub fn zero(logical: u64, physical: u64, blocks: u32, birth: u32) -> Entry {
        Entry::blocks(EntryKind::Zero, logical, physical, blocks, birth)
    }

    /// The range becomes a hole; `physical` is its old place, now freed (0: it had none).
    pub fn unmap(logical: u64, physical: u64, blocks: u32) -> Entry {
        Entry::blocks(EntryKind::Unmap, logical, physical, blocks, 0)
    }

    /// Sectors `start .. start + sectors` are opened for allocation.
    pub fn window(start: u64, sectors: u64) -> Entry {
        Entry::blocks(EntryKind::Window, sectors, start, 0, 0)
    }

    /// Sectors `start .. start + sectors` are free and durably zero.
    pub fn release(start: u64, sectors: u64) -> Entry {
        Entry::blocks(EntryKind::Release, sectors, start, 0, 0)
    }

    /// The same entry with [`FLAG_KEEP`].
    pub fn keep(mut self) -> Entry {
        self.flags |= FLAG_KEEP;
        self
    }

    /// The same entry with [`FLAG_MORE`].
    pub fn more(mut self) -> Entry {
        self.flags |= FLAG_MORE;
        self
    }

    /// Whether the next entry belongs to the same group.
    pub fn has_more(&self) -> bool {
        self.flags & FLAG_MORE != 0
    }

    /// Whether the range keeps the place it has.
    pub fn keeps(&self) -> bool {
        self.flags & FLAG_KEEP != 0
    }

    /// Whether the entry is about space only (WINDOW, RELEASE).
    pub fn is_space(&self) -> bool {
        matches!(self.kind, EntryKind::Window | EntryKind::Release)
    }

    /// Bytes `start .. end` of the image file the entry speaks of; `None` for no place.
    pub fn place(&self, block_bits: u8) -> Option<(u64, u64)> {
        if self.is_space() {
            let start = self.physical.saturating_mul(SECTOR);
            Some((start, start.saturating_add(self.logical.saturating_mul(SECTOR))))
        } else {
            place(self.physical, self.length, block_bits)
        }
    }

    /// The 24 bytes of the entry.
    pub fn to_bytes(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        self.put_fields(&mut bytes);
        bytes
    }

    /// Checks the entry by itself and against the image. `data_end` is not checked: the WINDOW
    /// entries before it move it.
    pub fn validate(&self, geometry: &Geometry) -> Result<(), DecodeError> {
        use entry_layout as at;
        let allowed = match self.kind {
            EntryKind::Zero | EntryKind::Reserve => FLAG_MORE | FLAG_KEEP,
            _ => FLAG_MORE,
        };
        ensure(self.flags & !allowed == 0, ENTRY, at::flags, "unknown flag for this kind")?;
        match self.place(geometry.block_bits) {
            Some((start, end)) => ensure(
                start >= FIXED_AREA && end <= PHYSICAL_END,
                ENTRY,
                at::physical,
                "place outside the file",
            )?,
            None => ensure(
                matches!(self.kind, EntryKind::Zero | EntryKind::Unmap) && !self.keeps(),
                ENTRY,
                at::physical,
                "an entry of this kind needs a place",
            )?,
        }
        if self.is_space() {
            ensure(self.logical >= 1, ENTRY, at::logical, "no sectors")?;
            ensure(self.length == 0, ENTRY, at::length, "not zero")?;
        } else {
            ensure(self.length >= 1, ENTRY, at::length, "no blocks")?;
            let end = self.logical.saturating_add(u64::from(self.length));
            ensure(
                end <= geometry.virtual_blocks(),
                ENTRY,
                at::logical,
                "outside the virtual disk",
            )?;
        }
        let born = !self.is_space() && self.kind != EntryKind::Unmap;
        ensure(
            if born { (1..=geometry.birth).contains(&self.birth) } else { self.birth == 0 },
            ENTRY,
            at::birth,
            "birth number not in use yet, or not zero where it must be",
        )
    }
}

structure! {
    /// A record of the completion journal.
    pub struct JournalRecord, record_layout, 80; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// Epoch of the session that wrote it.
        epoch: u64 as U64 = 8,
        /// Its byte offset in the image file.
        address: u64 as U64 = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        /// One more than its predecessor's; never restarts.
        sequence: u64 as U64 = 40,
        /// Highest sequence known to be durable when it was written.
        durable: u64 as U64 = 48,
        /// Highest completion sequence in or before this record.
        through: u64 as U64 = 56,
        /// Bytes of the record.
        length: u32 as U32 = 64,
        /// Checksum of its predecessor; 0 for the first of an epoch.
        chain: u32 as U32 = 68,
        (count: U32) = 72,
        [4] = 76,
    }
    also {
        /// The changes, in order of completion: cseq `through - entries.len() + 1 ..= through`.
        entries: Vec<Entry>,
    }
}

impl JournalRecord {
    /// The completion sequence just before the first entry's.
    pub fn before(&self) -> u64 {
        self.through.saturating_sub(self.entries.len() as u64)
    }

    /// The entries with their completion sequences.
    pub fn numbered(&self) -> impl Iterator<Item = (u64, &Entry)> {
        let before = self.before();
        self.entries.iter().zip(1..).map(move |(entry, index)| (before + index, entry))
    }

    /// The `length` bytes of the record, sealed. Asserts that the record is well formed.
    pub fn encode(&self) -> Vec<u8> {
        let length = self.length as usize;
        assert!(length <= RECORD_MAX, "record too long");
        assert!(
            self.entries.len() <= entries_per_record(length),
            "too many entries for the record"
        );
        if let Err(error) = self.validate_numbers() {
            panic!("encoding an invalid journal record: {error}");
        }
        let mut bytes = vec![0; length];
        self.put_fields(&mut bytes);
        put_at::<U32>(&(self.entries.len() as u32), &mut bytes, record_layout::count);
        for (index, entry) in self.entries.iter().enumerate() {
            put_at::<Entry>(entry, &mut bytes, RECORD_ENTRIES_OFFSET + index * ENTRY_SIZE);
        }
        header::finish(StructureType::JournalRecord, &mut bytes);
        bytes
    }

    /// Decodes a record whose type, length, checksum, uuid and address are known to be right.
    fn decode_body(bytes: &[u8]) -> Result<JournalRecord, FieldError> {
        let mut record = JournalRecord::get_fields(bytes)?;
        JournalRecord::check_reserved(bytes)?;
        let count = get_at::<U32>(bytes, record_layout::count)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > entries_per_record(bytes.len()) {
            return Err((record_layout::count, "more entries than fit"));
        }
        record.entries = (0..count)
            .map(|index| get_at::<Entry>(bytes, RECORD_ENTRIES_OFFSET + index * ENTRY_SIZE))
            .collect::<Result<Vec<_>, _>>()?;
        let used = RECORD_ENTRIES_OFFSET + count * ENTRY_SIZE;
        check_zero(bytes, used, bytes.len().saturating_sub(used))?;
        Ok(record)
    }

    fn validate_numbers(&self) -> Result<(), DecodeError> {
        use record_layout as at;
        ensure(self.epoch >= 1, NAME, at::epoch, "epoch 0")?;
        ensure(self.sequence >= 1, NAME, at::sequence, "sequence 0")?;
        ensure(self.durable < self.sequence, NAME, at::durable, "durable before it was written")?;
        ensure(
            self.through >= self.entries.len() as u64,
            NAME,
            at::through,
            "fewer completions than entries",
        )?;
        ensure(
            !self.entries.last().is_some_and(Entry::has_more),
            NAME,
            RECORD_ENTRIES_OFFSET + self.entries.len().saturating_sub(1) * ENTRY_SIZE,
            "a group crosses the end of the record",
        )
    }

    fn validate_entries(&self, geometry: &Geometry) -> Result<(), DecodeError> {
        for (index, entry) in self.entries.iter().enumerate() {
            let base = (RECORD_ENTRIES_OFFSET + index * ENTRY_SIZE) as u64;
            entry.validate(geometry).map_err(|error| match error {
                DecodeError::Corrupt { structure, offset, what } => {
                    DecodeError::Corrupt { structure, offset: base + offset, what }
                }
                other => other,
            })?;
        }
        Ok(())
    }
}

/// What replay expects at the next position of the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// The image (uuid, block size, virtual size, birth).
    pub geometry: Geometry,
    /// The superblock's epoch.
    pub epoch: u64,
    /// The sequence that is due.
    pub sequence: u64,
    /// Checksum of the predecessor (the superblock's `tail_chain` for the first).
    pub chain: u32,
    /// The superblock's `applied`: completions up to it need no record.
    pub applied: u64,
    /// The predecessor's `through`; 0 for the first record, which may begin before `applied`.
    pub through: u64,
    /// Alignment of records, from the superblock.
    pub record_bits: u8,
    /// Bytes left in the segment from this position.
    pub room: u64,
}

/// What the bytes at a position of the ring turned out to be. One field for each input of the
/// decision table in `SPEC.md`, "Replay".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotFacts {
    /// Type, length, checksum, uuid and address are those of a record of this image written here.
    pub record: bool,
    /// How its epoch compares with the superblock's.
    pub epoch: std::cmp::Ordering,
    /// How its sequence compares with the one that is due.
    pub sequence: std::cmp::Ordering,
    /// Its chain is the predecessor's checksum.
    pub chain: bool,
    /// Its fields and entries obey their rules and continue the completion sequence.
    pub sound: bool,
}

/// The outcome of the decision table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotCase {
    /// Apply the record and go on behind it.
    Apply,
    /// The log ends here: no record of this image (never written, or torn).
    EndNoRecord,
    /// The log ends here: a record of an earlier epoch.
    EndEarlierEpoch,
    /// The log ends here: a record of an earlier lap of this epoch.
    EndEarlierLap,
    /// A record of a later epoch than the superblock's: the superblock is not the newest.
    CorruptLaterEpoch,
    /// A later record where an earlier one was due: the one due is gone.
    CorruptLaterRecord,
    /// The right sequence, but not the successor of the record before it.
    CorruptChain,
    /// The right record, but it breaks a rule.
    CorruptContent,
}

/// The decision table: exactly one case for every combination of facts.
pub fn decide(facts: &SlotFacts) -> SlotCase {
    use std::cmp::Ordering::{Equal, Greater, Less};
    match facts {
        SlotFacts { record: false, .. } => SlotCase::EndNoRecord,
        SlotFacts { epoch: Less, .. } => SlotCase::EndEarlierEpoch,
        SlotFacts { epoch: Greater, .. } => SlotCase::CorruptLaterEpoch,
        SlotFacts { epoch: Equal, sequence: Less, .. } => SlotCase::EndEarlierLap,
        SlotFacts { epoch: Equal, sequence: Greater, .. } => SlotCase::CorruptLaterRecord,
        SlotFacts { epoch: Equal, sequence: Equal, chain: false, .. } => SlotCase::CorruptChain,
        SlotFacts { epoch: Equal, sequence: Equal, chain: true, sound: false, .. } => {
            SlotCase::CorruptContent
        }
        SlotFacts { epoch: Equal, sequence: Equal, chain: true, sound: true, .. } => {
            SlotCase::Apply
        }
    }
}

/// What replay does at a position of the ring.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot {
    /// The log ends here, and why. The ring is scanned next, see [`contradicts_end`].
    End(&'static str),
    /// The record to apply. `crc` is the next record's chain.
    Apply {
        /// The record.
        record: JournalRecord,
        /// Its checksum.
        crc: u32,
    },
    /// The journal is damaged here, and how.
    Corrupt(DecodeError),
}

/// Decides what the bytes at `offset` of the image file are to a replay that expects `expected`.
/// `bytes` are what the file holds from there on, at least `min(room, 65536)` of them.
pub fn classify(bytes: &[u8], offset: u64, expected: &Expected) -> Slot {
    let enough = expected.room.min(RECORD_MAX as u64);
    assert!(bytes.len() as u64 >= enough, "replay must offer a whole record");
    let geometry = &expected.geometry;
    let Some(bytes) = record_at(bytes, offset, &geometry.uuid, expected.record_bits, expected.room)
    else {
        return Slot::End("no record");
    };
    let (summary, chain) = match summarize(bytes) {
        Ok(found) => found,
        Err(error) => return Slot::Corrupt(located(NAME)(error)),
    };
    let content = sound(bytes, expected);
    let facts = SlotFacts {
        record: true,
        epoch: summary.epoch.cmp(&expected.epoch),
        sequence: summary.sequence.cmp(&expected.sequence),
        chain: chain == expected.chain,
        sound: content.is_ok(),
    };
    let corrupt = |at, what: String| Slot::Corrupt(DecodeError::corrupt(NAME, at, what));
    let due = expected.sequence;
    match decide(&facts) {
        SlotCase::EndNoRecord => Slot::End("no record"),
        SlotCase::EndEarlierEpoch => Slot::End("a record of an earlier epoch"),
        SlotCase::EndEarlierLap => Slot::End("a record of an earlier lap"),
        SlotCase::CorruptLaterEpoch => corrupt(
            record_layout::epoch,
            format!("epoch {} is later than the superblock's, {}", summary.epoch, expected.epoch),
        ),
        SlotCase::CorruptLaterRecord => corrupt(
            record_layout::sequence,
            format!("sequence {} where {due} was due", summary.sequence),
        ),
        SlotCase::CorruptChain => {
            corrupt(record_layout::chain, format!("record {due} does not follow the one before it"))
        }
        SlotCase::CorruptContent | SlotCase::Apply => match content {
            Ok(record) => Slot::Apply { record, crc: checksum::crc_of(bytes) },
            Err(error) => Slot::Corrupt(error),
        },
    }
}

/// The record that is due, if it obeys every rule and continues the completion sequence.
fn sound(bytes: &[u8], expected: &Expected) -> Result<JournalRecord, DecodeError> {
    let record = JournalRecord::decode_body(bytes).map_err(located(NAME))?;
    record.validate_numbers()?;
    record.validate_entries(&expected.geometry)?;
    // A completion that the tree holds may have no record: `applied` bridges that gap.
    let before = record.before();
    let continues = before >= expected.through && before <= expected.through.max(expected.applied);
    ensure(
        continues,
        NAME,
        record_layout::through,
        "completions are missing or repeated before this record",
    )?;
    Ok(record)
}

/// What the scan behind the end of the log wants to know of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordSummary {
    /// Its epoch.
    pub epoch: u64,
    /// Its sequence.
    pub sequence: u64,
    /// The sequence it knew to be durable.
    pub durable: u64,
    /// Its length in bytes.
    pub length: u32,
}

/// Whether the bytes at `offset` of the image file are a record of this image that was written
/// there, of any epoch and sequence. `room` is what is left of the segment; `bytes` hold what the
/// file holds from `offset` on, as far as the caller has it (a longer record is not found).
pub fn examine(
    bytes: &[u8],
    offset: u64,
    uuid: &[u8; 16],
    record_bits: u8,
    room: u64,
) -> Option<RecordSummary> {
    let bytes = record_at(bytes, offset, uuid, record_bits, room)?;
    summarize(bytes).ok().map(|(summary, _)| summary)
}

/// Whether a record found anywhere in the ring shows that the log did not really end where
/// `sequence` was due: it knew that record to be durable, or it is of a later epoch.
pub fn contradicts_end(found: &RecordSummary, epoch: u64, sequence: u64) -> Option<String> {
    if found.epoch > epoch {
        Some(format!(
            "record {} is of epoch {}, later than the superblock's, {epoch}",
            found.sequence, found.epoch
        ))
    } else if found.epoch == epoch && found.durable >= sequence {
        Some(format!(
            "record {sequence} was durable (record {} says so) and is gone",
            found.sequence
        ))
    } else {
        None
    }
}

/// The bytes of the record at the start of `bytes`, if they are one: type, length, checksum, uuid
/// and address. The checksum is looked at last, being the dearest.
fn record_at<'a>(
    bytes: &'a [u8],
    offset: u64,
    uuid: &[u8; 16],
    record_bits: u8,
    room: u64,
) -> Option<&'a [u8]> {
    if !StructureType::JournalRecord.begins(bytes) {
        return None;
    }
    let length = get_at::<U32>(bytes, record_layout::length).ok()?;
    let align = 1_u32.checked_shl(u32::from(record_bits))?;
    let length_is_sane = length > 0
        && length % align == 0
        && length as usize >= RECORD_ENTRIES_OFFSET
        && length as usize <= RECORD_MAX
        && u64::from(length) <= room;
    if !length_is_sane
        || get_at::<U64>(bytes, header_layout::address).ok()? != offset
        || get_at::<Id16>(bytes, header_layout::uuid).ok()? != *uuid
    {
        return None;
    }
    let record = bytes.get(..length as usize)?;
    (checksum::compute(record) == checksum::crc_of(record)).then_some(record)
}

fn summarize(bytes: &[u8]) -> Result<(RecordSummary, u32), FieldError> {
    let summary = RecordSummary {
        epoch: get_at::<U64>(bytes, record_layout::epoch)?,
        sequence: get_at::<U64>(bytes, record_layout::sequence)?,
        durable: get_at::<U64>(bytes, record_layout::durable)?,
        length: get_at::<U32>(bytes, record_layout::length)?,
    };
    Ok((summary, get_at::<U32>(bytes, record_layout::chain)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{UUID, each_bit_flip, each_sealed_flip, geometry, patched};
    use std::cmp::Ordering::{Equal, Greater, Less};

    const ADDRESS: u64 = 0x43000;

    fn entries() -> Vec<Entry> {
        vec![
            Entry::window(0x1000, 4096),
            Entry::map(10, 0x1000, 4, 1),
            Entry::reserve(20, 0x1100, 4, 2).more(),
            Entry::convert(20, 0x1100, 2, 2),
            Entry::zero(30, 0x1200, 1, 1).keep(),
            Entry::zero(31, 0, 5, 1),
            Entry::unmap(10, 0x1000, 2),
            Entry::release(0x1000, 16),
        ]
    }

    fn record() -> JournalRecord {
        JournalRecord {
            epoch: 3,
            address: ADDRESS,
            uuid: UUID,
            sequence: 20,
            durable: 18,
            through: 50,
            length: 4096,
            chain: 0xABCD,
            entries: entries(),
        }
    }

    fn expected() -> Expected {
        Expected {
            geometry: geometry(),
            epoch: 3,
            sequence: 20,
            chain: 0xABCD,
            applied: 41,
            through: 42,
            record_bits: 12,
            room: 0x3000,
        }
    }

    /// The bytes a replay would be offered.
    fn offered(bytes: &[u8]) -> Vec<u8> {
        let mut offered = bytes.to_vec();
        offered.resize(expected().room as usize, 0);
        offered
    }

    fn replay(bytes: &[u8]) -> Slot {
        classify(&offered(bytes), ADDRESS, &expected())
    }

    #[test]
    fn round_trip() {
        let bytes = record().encode();
        let crc = checksum::crc_of(&bytes);
        assert_eq!(replay(&bytes), Slot::Apply { record: record(), crc });
        let numbers: Vec<u64> = record().numbered().map(|(cseq, _)| cseq).collect();
        assert_eq!(numbers, (43..=50).collect::<Vec<_>>());
        let empty = JournalRecord { entries: vec![], through: 42, ..record() };
        assert!(matches!(replay(&empty.encode()), Slot::Apply { record, .. } if record == empty));
    }

    #[test]
    fn lengths() {
        assert_eq!(length_for(0, 12), 4096);
        assert_eq!(length_for(18, 9), 512);
        assert_eq!(length_for(19, 9), 1024);
        assert_eq!(entries_per_record(4096), 167);
        assert_eq!(entries_per_record(RECORD_MAX), 2727);
        assert_eq!(entries_per_record(3), 0);
    }

    /// P6: no flip makes another record of it; all of them end the log.
    #[test]
    fn p6_every_bit_flip_is_seen() {
        each_bit_flip(&record().encode(), |bytes| match replay(bytes) {
            Slot::Apply { record: found, .. } => found == record(),
            Slot::End("no record") => false,
            other => panic!("{other:?}"),
        });
    }

    #[test]
    fn p8_sealed_flips_are_harmless() {
        each_sealed_flip(&record().encode(), |bytes| match replay(bytes) {
            Slot::Apply { record, .. } => Some(record.encode()),
            _ => None,
        });
    }

    /// P4, P6: the decision table as SPEC.md states it, over every combination of its inputs.
    /// Each row names the inputs it cares for; exactly one row matches each combination.
    #[test]
    fn p6_replay_decision_over_every_combination() {
        type Row = (Option<bool>, Option<i8>, Option<i8>, Option<bool>, Option<bool>, SlotCase);
        const ROWS: [Row; 8] = [
            (Some(false), None, None, None, None, SlotCase::EndNoRecord),
            (Some(true), Some(-1), None, None, None, SlotCase::EndEarlierEpoch),
            (Some(true), Some(1), None, None, None, SlotCase::CorruptLaterEpoch),
            (Some(true), Some(0), Some(-1), None, None, SlotCase::EndEarlierLap),
            (Some(true), Some(0), Some(1), None, None, SlotCase::CorruptLaterRecord),
            (Some(true), Some(0), Some(0), Some(false), None, SlotCase::CorruptChain),
            (Some(true), Some(0), Some(0), Some(true), Some(false), SlotCase::CorruptContent),
            (Some(true), Some(0), Some(0), Some(true), Some(true), SlotCase::Apply),
        ];
        let orders = [Less, Equal, Greater];
        let mut combinations = 0;
        for facts in 0..72 {
            let facts = SlotFacts {
                record: facts & 1 != 0,
                chain: facts & 2 != 0,
                sound: facts & 4 != 0,
                epoch: orders[facts / 8 % 3],
                sequence: orders[facts / 24],
            };
            let matching: Vec<SlotCase> = ROWS
                .iter()
                .filter(|row| {
                    row.0.is_none_or(|want| want == facts.record)
                        && row.1.is_none_or(|want| want == facts.epoch as i8)
                        && row.2.is_none_or(|want| want == facts.sequence as i8)
                        && row.3.is_none_or(|want| want == facts.chain)
                        && row.4.is_none_or(|want| want == facts.sound)
                })
                .map(|row| row.5)
                .collect();
            assert_eq!(matching, [decide(&facts)], "{facts:?}");
            combinations += 1;
            agrees(&facts);
        }
        assert_eq!(combinations, 72);
    }

    /// `classify` reaches the decision of the table on real bytes with these facts.
    fn agrees(facts: &SlotFacts) {
        let mut record = record();
        record.epoch = [2, 3, 4][(facts.epoch as i8 + 1) as usize];
        record.sequence = [19, 20, 21][(facts.sequence as i8 + 1) as usize];
        if !facts.chain {
            record.chain += 1;
        }
        if !facts.sound {
            record.through += 1;
        }
        let mut bytes = record.encode();
        if !facts.record {
            bytes[100] ^= 1;
        }
        let slot = replay(&bytes);
        let same = match decide(facts) {
            SlotCase::Apply => matches!(slot, Slot::Apply { .. }),
            SlotCase::EndNoRecord => slot == Slot::End("no record"),
            SlotCase::EndEarlierEpoch => slot == Slot::End("a record of an earlier epoch"),
            SlotCase::EndEarlierLap => slot == Slot::End("a record of an earlier lap"),
            SlotCase::CorruptLaterEpoch => says(&slot, "later than the superblock's"),
            SlotCase::CorruptLaterRecord => says(&slot, "was due"),
            SlotCase::CorruptChain => says(&slot, "does not follow"),
            SlotCase::CorruptContent => says(&slot, "missing"),
        };
        assert!(same, "{facts:?}: {slot:?}");
    }

    fn says(slot: &Slot, words: &str) -> bool {
        matches!(slot, Slot::Corrupt(error) if error.to_string().contains(words))
    }

    /// Every way of not being a record of this image, written here.
    #[test]
    fn p6_what_is_no_record_ends_the_log() {
        let bytes = record().encode();
        let length = record_layout::length;
        let bad: &[(usize, &[u8])] = &[
            (0, b"EXDN"),
            (17, &[0]),
            (24, &[0]),
            (length, &[0, 0]),
            (length, &[0, 2]),
            (length, &[0xFF; 4]),
            (length, &[0, 0x40]), // Longer than the room.
            (length, &[0, 0, 2]), // Longer than a record.
        ];
        for (offset, patch) in bad {
            assert_eq!(replay(&patched(&bytes, *offset, patch)), Slot::End("no record"));
        }
        assert_eq!(replay(&[0; 4096]), Slot::End("no record"));
        assert_eq!(
            classify(&[], ADDRESS, &Expected { room: 0, ..expected() }),
            Slot::End("no record")
        );
    }

    #[test]
    fn p6_a_record_that_breaks_a_rule_is_corrupt() {
        let bytes = record().encode();
        let entry = |index: usize| RECORD_ENTRIES_OFFSET + index * ENTRY_SIZE;
        let kind = entry_layout::kind;
        let flags = entry_layout::flags;
        let blocks = (geometry().virtual_blocks() - 3).to_le_bytes();
        let bad: &[(usize, &[u8])] = &[
            (record_layout::durable, &[20]),
            (record_layout::durable, &[0xFF; 8]),
            (record_layout::through, &[7]),
            (record_layout::through, &[49]),
            (record_layout::through, &[51]),
            (record_layout::count, &[168]),
            (record_layout::count, &[0xFF; 4]),
            (record_layout::count, &[7]),
            (record_layout::count, &[9]),
            (76, &[1]),
            (4095, &[1]),
            (entry(0) + kind, &[0]),
            (entry(0) + kind, &[8]),
            (entry(0), &[0; 8]),                            // An empty window.
            (entry(0) + entry_layout::physical, &[127, 0]), // In the fixed area.
            (entry(0), &[0xFF; 8]),                         // Past the end of all files.
            (entry(0) + entry_layout::length, &[1]),
            (entry(0) + entry_layout::birth, &[1]),
            (entry(0) + flags, &[2]),
            (entry(1) + flags, &[2]),
            (entry(1) + flags, &[4]),
            (entry(1), &blocks),
            (entry(1), &[0xFF; 8]),
            (entry(1) + entry_layout::physical, &[0; 6]),
            (entry(1) + entry_layout::physical, &[0xFF; 6]),
            (entry(1) + entry_layout::length, &[0; 4]),
            (entry(1) + entry_layout::birth, &[0; 4]),
            (entry(1) + entry_layout::birth, &[3]),
            (entry(4) + entry_layout::physical, &[0; 6]), // Keeps a place it has not.
            (entry(6) + entry_layout::birth, &[1]),
            (entry(7) + flags, &[1]), // A group without an end.
        ];
        for (index, (offset, patch)) in bad.iter().enumerate() {
            let slot = replay(&patched(&bytes, *offset, patch));
            assert!(matches!(slot, Slot::Corrupt(_)), "case {index}: {slot:?}");
        }
    }

    #[test]
    fn records_continue_what_is_applied_or_what_was_replayed() {
        let bytes = offered(&record().encode()); // Completions 43 to 50.
        let at = |applied, through| {
            let expected = Expected { applied, through, ..expected() };
            matches!(classify(&bytes, ADDRESS, &expected), Slot::Apply { .. })
        };
        // The first record: it may begin before what is applied, but not leave a gap.
        assert!(at(42, 0) && at(45, 0) && at(60, 0));
        assert!(!at(41, 0));
        // Later ones follow their predecessor, or skip what the tree holds.
        assert!(at(0, 42) && at(42, 30));
        assert!(!at(41, 30) && !at(0, 43) && !at(60, 43));
    }

    /// P6: of all records in the ring only those that knew the missing one durable contradict the end.
    #[test]
    fn p6_end_of_log_decision_over_every_combination() {
        for epoch in 2..=4_u64 {
            for sequence in 18..=24_u64 {
                for durable in 0..sequence {
                    let found = JournalRecord { epoch, sequence, durable, ..record() }.encode();
                    let found = examine(&found, ADDRESS, &UUID, 12, 4096).expect("a record");
                    let wrong = contradicts_end(&found, 3, 20).is_some();
                    assert_eq!(wrong, epoch == 4 || epoch == 3 && durable >= 20, "{found:?}");
                }
            }
        }
        assert_eq!(examine(&[], 0, &UUID, 12, 0), None);
        assert_eq!(examine(&record().encode(), ADDRESS, &[0; 16], 12, 4096), None);
        assert_eq!(examine(&record().encode()[..4095], ADDRESS, &UUID, 12, 4096), None);
    }
}
