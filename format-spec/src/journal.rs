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
    /// The predecessor's `through`; for the first record the superblock's `applied`.
    pub through: u64,
    /// Whether this is the record at the superblock's tail, which may begin before `applied`.
    pub first: bool,
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
    let continues = if expected.first {
        record.before() <= expected.through
    } else {
        record.before() == expected.through
    };
    ensure(continues, NAME, record_layout::through, "completions are missing before this record")?;
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
