//! The completion journal's writing side: a ring of records in the image file.
//!
//! Records are made here, in order, each chained to the one before; the disk submits them and tells
//! when they landed and when they are durable.

use exd_format::{Entry, JournalRecord, JournalSegment};
use std::collections::VecDeque;

/// Longest record in bytes.
const RECORD_MAX: u64 = 65536;

/// A record on its way.
pub(crate) struct Record {
    pub(crate) sequence: u64,
    pub(crate) through: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: std::sync::Arc<[u8]>,
    pub(crate) status: RecordStatus,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RecordStatus {
    InFlight,
    Landed,
    /// The write failed; what the slot holds is unknown until the same bytes are written again.
    Failed,
}

/// Where the log of an epoch begins; a checkpoint moves it forward.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tail {
    /// Linear offset in the ring.
    pub(crate) position: u64,
    pub(crate) sequence: u64,
    pub(crate) chain: u32,
}

/// Segment of the ring, and offset in it, of a linear position.
pub(crate) fn locate(segments: &[JournalSegment], position: u64) -> (usize, u64) {
    let mut rest = position;
    for (index, segment) in segments.iter().enumerate() {
        if rest < segment.length {
            return (index, rest);
        }
        rest -= segment.length;
    }
    unreachable!("position {position} is outside the ring")
}

pub(crate) struct Journal {
    uuid: [u8; 16],
    epoch: u64,
    pub(crate) segments: Vec<JournalSegment>,
    record_align: u64,
    total: u64,
    /// First record that recovery would need.
    pub(crate) tail: Tail,
    /// Where the next record goes.
    head: Tail,
    /// Bytes between tail and head.
    used: u64,
    /// Records not known durable.
    records: VecDeque<Record>,
    pub(crate) durable: u64,
    pub(crate) landed_through: u64,
    /// A superblock that appends a segment is being committed: the ring must not wrap, because its
    /// end is about to move.
    wrap_held: bool,
}

impl Journal {
    pub(crate) fn new(
        uuid: [u8; 16],
        epoch: u64,
        segments: Vec<JournalSegment>,
        record_align: u64,
        tail: Tail,
        through: u64,
    ) -> Self {
        let total = segments.iter().map(|segment| segment.length).sum();
        Journal {
            uuid,
            epoch,
            segments,
            record_align,
            total,
            tail,
            head: tail,
            used: 0,
            records: VecDeque::new(),
            durable: tail.sequence.saturating_sub(1),
            landed_through: through,
            wrap_held: false,
        }
    }

    /// Goes on behind `used` bytes of records that are durable.
    pub(crate) fn go_on(&mut self, used: u64) {
        self.used = used;
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Size of the ring in bytes.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of the ring that a checkpoint would free.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Where the next record goes: the tail of a checkpoint that holds everything so far.
    pub(crate) fn head(&self) -> Tail {
        self.head
    }

    /// True if another record fits. One slot stays empty.
    pub(crate) fn has_room(&self) -> bool {
        let at_end = self.wrap_held && self.head.position + self.record_align >= self.total;
        self.used + self.record_align < self.total && !at_end
    }

    /// Byte offset in the file and bytes left in the segment of a linear position.
    fn locate(&self, position: u64) -> (u64, u64) {
        let (index, within) = locate(&self.segments, position);
        let segment = &self.segments[index];
        (segment.offset + within, segment.length - within)
    }

    /// Makes a record of as many of `entries` as fit (whole groups) and returns how many those are,
    /// or `None` if the ring is full. `through` is the sequence of the last entry given.
    pub(crate) fn append(&mut self, entries: &[Entry], through: u64) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        let (offset, segment_left) = self.locate(self.head.position);
        let mut room = segment_left.min(RECORD_MAX).min(self.total - self.used - self.record_align);
        if self.wrap_held {
            // The position right behind a record must not be the old end either.
            room = room.min(self.total - self.head.position - self.record_align);
        }
        let room = room / self.record_align * self.record_align;
        let capacity = exd_format::entries_per_record(room as usize);
        let mut count = entries.len().min(capacity);
        while count > 0 && entries[count - 1].has_more() {
            count -= 1;
        }
        if count == 0 {
            // A record size this small cannot hold a group: groups are far shorter than a record.
            return None;
        }
        let record = JournalRecord {
            epoch: self.epoch,
            address: offset,
            uuid: self.uuid,
            sequence: self.head.sequence,
            durable: self.durable,
            through: through - (entries.len() - count) as u64,
            length: exd_format::length_for(count, self.record_align.trailing_zeros() as u8) as u32,
            chain: self.head.chain,
            entries: entries[..count].to_vec(),
        };
        let bytes = record.encode();
        let length = bytes.len() as u64;
        assert!(length <= room, "a record of {length} bytes does not fit {room}");
        self.head.chain = exd_format::crc_of(&bytes);
        self.head.position = (self.head.position + length) % self.total;
        self.head.sequence += 1;
        self.used += length;
        self.records.push_back(Record {
            sequence: record.sequence,
            through: record.through,
            offset,
            bytes: bytes.into(),
            status: RecordStatus::Failed,
        });
        Some(count)
    }

    /// Records that are to be (re)submitted; they count as in flight from now on.
    pub(crate) fn take_unsent(&mut self) -> Vec<(u64, u64, std::sync::Arc<[u8]>)> {
        let unsent = self.records.iter_mut().filter(|r| r.status == RecordStatus::Failed);
        unsent
            .map(|record| {
                record.status = RecordStatus::InFlight;
                (record.sequence, record.offset, std::sync::Arc::clone(&record.bytes))
            })
            .collect()
    }

    /// A record's write has ended.
    pub(crate) fn ended(&mut self, sequence: u64, landed: bool) {
        let status = if landed { RecordStatus::Landed } else { RecordStatus::Failed };
        if let Some(record) = self.records.iter_mut().find(|r| r.sequence == sequence) {
            record.status = status;
        }
        self.note_landed();
    }

    fn note_landed(&mut self) {
        if let Some((_, through)) = self.landed() {
            self.landed_through = self.landed_through.max(through);
        }
    }

    /// The last record that landed together with all before it: its sequence and `through`.
    pub(crate) fn landed(&self) -> Option<(u64, u64)> {
        let landed = self.records.iter().take_while(|r| r.status == RecordStatus::Landed).last();
        landed.map(|record| (record.sequence, record.through))
    }

    /// A sync that covers all records up to `sequence` returned.
    pub(crate) fn became_durable(&mut self, sequence: u64) {
        self.durable = self.durable.max(sequence);
        while self.records.front().is_some_and(|record| record.sequence <= sequence) {
            self.records.pop_front();
        }
    }

    /// A checkpoint is durable in both superblocks: the ring up to `tail` is free.
    pub(crate) fn advance_tail(&mut self, tail: Tail) {
        let step = (tail.position + self.total - self.tail.position) % self.total;
        assert!(step <= self.used);
        self.used -= step;
        self.tail = tail;
        // What the checkpoint holds need not reach the ring any more.
        while self.records.front().is_some_and(|record| {
            record.sequence < tail.sequence && record.status != RecordStatus::InFlight
        }) {
            self.records.pop_front();
            // A record that never landed may have been all that stood before others that did.
            self.note_landed();
        }
    }

    /// Appends a segment; only between a superblock that names it and the first record in it.
    pub(crate) fn grow(&mut self, segment: JournalSegment) {
        self.total += segment.length;
        self.segments.push(segment);
    }

    /// True if the part from `tail` on does not wrap, so that a segment may be appended.
    pub(crate) fn may_grow_from(&self, tail: Tail) -> bool {
        tail.position <= self.head.position
    }

    /// Keeps the ring from wrapping (see `wrap_held`).
    pub(crate) fn hold_wrap(&mut self, hold: bool) {
        self.wrap_held = hold;
    }

    /// Some record could not be written yet.
    pub(crate) fn has_failed(&self) -> bool {
        self.records.iter().any(|record| record.status == RecordStatus::Failed)
    }

    /// A record before `sequence` is still being written.
    pub(crate) fn in_flight_before(&self, sequence: u64) -> bool {
        let mut before = self.records.iter().take_while(|record| record.sequence < sequence);
        before.any(|record| record.status == RecordStatus::InFlight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        let segments = vec![JournalSegment { offset: 65536, length: 65536 }];
        let tail = Tail { position: 0, sequence: 1, chain: 0 };
        Journal::new([1; 16], 1, segments, 4096, tail, 0)
    }

    fn append(journal: &mut Journal, through: u64) {
        assert_eq!(journal.append(&[Entry::map(0, 2048, 1, 1)], through), Some(1));
    }

    /// A record that could not be written stands before others that landed. A checkpoint makes it
    /// unnecessary: what comes behind it counts as landed then, or flushes would wait for ever.
    #[test]
    fn p1_records_behind_a_dropped_one_count_as_landed() {
        let mut journal = journal();
        append(&mut journal, 1);
        let tail = journal.head();
        append(&mut journal, 2);
        append(&mut journal, 3);
        assert_eq!(journal.take_unsent().len(), 3);
        journal.ended(1, false);
        journal.ended(2, true);
        journal.ended(3, true);
        assert_eq!(journal.landed_through, 0);
        assert!(journal.has_failed());
        journal.advance_tail(tail);
        assert_eq!(journal.landed_through, 3);
        assert!(!journal.has_failed());
        assert_eq!(journal.used(), 8192);
    }

    /// The ring never fills up completely, wraps, and is empty again after a checkpoint of it all.
    #[test]
    fn the_ring_wraps_and_keeps_a_slot_free() {
        let mut journal = journal();
        for lap in 0..5 {
            let mut count = 0;
            while journal.has_room() {
                count += 1;
                append(&mut journal, lap * 100 + count);
            }
            assert_eq!(count, 15);
            assert_eq!(journal.append(&[Entry::map(0, 2048, 1, 1)], 1000), None);
            for (sequence, _, _) in journal.take_unsent() {
                journal.ended(sequence, true);
            }
            let head = journal.head();
            journal.advance_tail(head);
            assert_eq!(journal.used(), 0);
        }
    }

    /// While a superblock with another segment is under way, no record ends where the ring ends now:
    /// the position behind it would be another one afterwards.
    #[test]
    fn p4_no_record_reaches_an_end_that_moves() {
        let mut journal = journal();
        let tail = journal.head();
        for through in 1..=12 {
            append(&mut journal, through);
        }
        assert!(journal.may_grow_from(tail));
        journal.hold_wrap(true);
        while journal.has_room() {
            append(&mut journal, 13);
        }
        assert!(journal.head().position < journal.total());
        journal.grow(JournalSegment { offset: 262_144, length: 65536 });
        journal.hold_wrap(false);
        append(&mut journal, 14);
        assert_eq!(journal.head().position, 65536);
        append(&mut journal, 15);
        assert_eq!(journal.take_unsent().last().map(|(_, offset, _)| *offset), Some(262_144));
    }
}
