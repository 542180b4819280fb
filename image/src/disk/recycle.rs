//! Windows ahead of the allocator, and freed space on its way back.
//!
//! Freed space is allocated again when the record that freed it is durable, I/O that ran against it
//! has ended, its punch is done and durable, in that order. It is RELEASEd then, which makes it known
//! zero, and a later WINDOW makes it allocatable.

use super::{Disk, Pending};
use crate::bugs::{self, Bug};
use crate::storage::{Done, Op, SECTOR, Storage, StorageError};
use exd_format::Entry;
use std::ops::Range;

/// Punches slow concurrent writes down: few at a time, ...
const PUNCHES_MAX: u32 = 2;
/// ... none too long, in sectors.
const PUNCH_SECTORS_MAX: u64 = (64 << 20) / SECTOR;

impl Disk {
    /// Takes the steps of recycling that have become possible.
    pub(super) fn recycle(&mut self, st: &mut dyn Storage) {
        if self.failed || self.closing || self.starting {
            return;
        }
        self.settle_space(st);
        self.open_window(st);
        self.zero_ahead(st);
        self.punch(st);
    }

    /// Freed space and new windows become usable as far as that is durable.
    pub(super) fn settle_space(&mut self, st: &mut dyn Storage) {
        let mut through = self.durable_through;
        if bugs::on(Bug::ReuseBeforeDurable) || bugs::on(Bug::UseWindowEarly) {
            through = self.cseq;
        }
        if !self.growing {
            for range in self.space.settle_windows(through) {
                self.allocate_reserve(st, range);
            }
        }
        if let Some(io) = self.space.waits_for_io(through) {
            self.turn_fast_epochs(io);
        }
        self.space.settle_freed(through, self.drained_io());
        let room = usize::try_from(self.log_room()).unwrap_or(usize::MAX);
        for range in self.space.take_zeroed(self.synced, room) {
            self.commit(st, Entry::release(range.start, range.end - range.start), 0);
        }
    }

    /// Opens the next window before the last one is used up.
    fn open_window(&mut self, st: &mut dyn Storage) {
        if self.growing || !self.space.wants_window() {
            return;
        }
        let Some((range, known_zero)) = self.space.plan_window() else { return };
        let used_end = self.space.data_end * SECTOR;
        self.commit(st, Entry::window(range.start, range.end - range.start), 0);
        self.space.begin_window(range.clone(), known_zero, self.cseq);
        if !self.geometry.fixed_length {
            // Growing the file by a window at once keeps appending writes from doing it one by one.
            // Nothing is written past the present end until that has ended: setting a length late
            // would cut it off. Where it failed before, data may be on its way there, and goes on without.
            let end = self.space.data_end * SECTOR;
            if st.file_len().is_ok_and(|len| used_end <= len && len < end) {
                self.growing = true;
                self.start(st, Op::SetLen { len: end }, Pending::Grow);
            }
        }
    }

    pub(super) fn punch(&mut self, st: &mut dyn Storage) {
        if self.punches >= PUNCHES_MAX || !self.space.wants_punch() {
            return;
        }
        // What lies past the end of the file is a hole already, however long it is.
        let file_end = match st.file_len() {
            Ok(len) => len.div_ceil(SECTOR),
            Err(_) => u64::MAX,
        };
        while self.punches < PUNCHES_MAX && self.space.wants_punch() {
            let Some(range) = self.space.take_punch(PUNCH_SECTORS_MAX, file_end) else { return };
            if range.start >= file_end {
                self.space.punched(range, self.landed);
                continue;
            }
            if bugs::on(Bug::ReuseBeforePunch) {
                self.space.punched(range, 0);
                continue;
            }
            self.punches += 1;
            let offset = range.start * SECTOR;
            let len = (range.end - range.start) * SECTOR;
            self.start(st, Op::Punch { offset, len }, Pending::Punch { range });
        }
    }

    pub(super) fn punch_ended(&mut self, range: Range<u64>, result: Result<Done, StorageError>) {
        self.punches -= 1;
        match result {
            Ok(_) => {
                self.landed += 1;
                self.stats.punched_bytes += (range.end - range.start) * SECTOR;
                self.space.punched(range, self.landed);
            }
            Err(_) => self.space.punch_failed(range),
        }
    }
}
