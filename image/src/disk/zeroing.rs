//! Space prepared ahead of small first writes: the operations of the [pool](crate::pool).
//!
//! Only space of a usable window is written to: the record that opens it is durable, so whatever a crash
//! leaves of the zeroes lies in space that is listed as open. Over a hole, zeroes change nothing, landed
//! or not, durable or not: what was known to be zero stays so, and no sync is needed. On a block device
//! they make space known to be zero, but only once they are durable. Nothing is allocated where an
//! operation of the pool is still under way.

use super::{Disk, Pending};
use crate::bugs::{self, Bug};
use crate::pool::ZeroAhead;
use crate::storage::{Done, Op, SECTOR, Segment, Storage, StorageError};
use std::ops::Range;

impl Disk {
    /// Prepares as much space as the allocations of late call for.
    pub(super) fn zero_ahead(&mut self, st: &mut dyn Storage) {
        self.space.pool.settle(self.synced);
        if let Some(sectors) = self.space.pool.wants_chunk(self.now_ms) {
            self.space.refill_pool(sectors);
        }
        while let Some((range, known_zero)) = self.space.pool.take_step(self.now_ms) {
            let (offset, len) = bytes_of(&range);
            let op = match self.space.pool.policy() {
                ZeroAhead::Falloc => Op::Allocate { offset, len },
                _ => Op::Write { offset, segments: vec![Segment::Zero(len)] },
            };
            self.start(st, op, Pending::ZeroAhead { range, known_zero });
        }
    }

    pub(super) fn zero_ahead_ended(
        &mut self,
        range: Range<u64>,
        known_zero: bool,
        result: Result<Done, StorageError>,
    ) {
        match result {
            Ok(_) => {
                self.stats.zeroed_bytes += (range.end - range.start) * SECTOR;
                let mut mark = 0;
                if !known_zero {
                    self.landed += 1;
                    mark = self.landed;
                }
                self.space.pool.prepared(range, mark);
            }
            Err(_) => {
                // Full, most likely: what was allocated goes back.
                self.space.pool.failed(&range, self.now_ms + PAUSE_MS);
                self.space.quarantine(range, 0, 0);
            }
        }
    }

    /// Gives the pool back when nothing has been allocated from it for a while.
    pub(super) fn age_pool(&mut self, st: &mut dyn Storage) {
        let idle = self.space.pool.age(self.now_ms, self.options.zero_ahead_idle_ms);
        let resting = self.failed || self.closing || self.starting || self.is_settling();
        if !idle || resting || self.space.keeps() {
            return;
        }
        let unit = (self.geometry.host_block / SECTOR).max(1);
        for range in self.space.pool.drain() {
            let start = range.start.next_multiple_of(unit).min(range.end);
            let end = (range.end / unit * unit).max(start);
            self.space.pool.keep(range.start..start);
            self.space.pool.keep(end..range.end);
            if start == end {
                continue;
            }
            let range = start..end;
            let (offset, len) = bytes_of(&range);
            self.space.pool.dropping(&range);
            if bugs::on(Bug::AllocateWhileDropping) {
                self.space.give_window(range.clone());
            }
            self.start(st, Op::Punch { offset, len }, Pending::DropPool { range });
        }
        if let Some(chunk) = self.space.pool.take_chunk() {
            self.space.return_window(chunk);
        }
    }

    pub(super) fn drop_pool_ended(
        &mut self,
        range: Range<u64>,
        result: Result<Done, StorageError>,
    ) {
        self.space.pool.dropped(&range);
        if bugs::on(Bug::AllocateWhileDropping) {
            return;
        }
        match result {
            // Zeroes before, zeroes after: nothing to sync.
            Ok(_) => self.space.give_window(range),
            Err(_) => self.space.pool.keep(range),
        }
    }
}

/// After an error nothing is prepared for so long.
const PAUSE_MS: u64 = 1000;

fn bytes_of(range: &Range<u64>) -> (u64, u64) {
    (range.start * SECTOR, (range.end - range.start) * SECTOR)
}
