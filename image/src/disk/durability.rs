//! What has completed, what is journaled, what is durable.
//!
//! A change of the map is *committed* when it shows in the map and, in the completion log, survives
//! the process (P2). A flush writes the journal records of all that was committed before it and
//! syncs once; flushes that arrive meanwhile share the next sync (P1). Data in a place that was not
//! known to be zero is made durable before its record is written, because the record alone would
//! expose what the place held before (P3). Elsewhere data and record may be under way together.

use super::{Disk, Pending};
use crate::apply;
use crate::bugs::{self, Bug};
use crate::request::RequestError;
use crate::storage::{Done, Op, RequestId, Storage, StorageError};
use exd_format::Entry;

/// A committed change that no journal record holds yet.
pub(crate) struct PendingEntry {
    cseq: u64,
    entry: Entry,
    /// The data counts as durable once `synced` reaches this; 0 if the order does not matter.
    mark: u64,
}

/// A request that completes when everything before it is durable.
pub(crate) struct FlushWaiter {
    pub(crate) id: RequestId,
    cseq: u64,
    mark: u64,
}

/// The one sync under way: what it makes durable.
pub(crate) struct SyncInFlight {
    mark: u64,
    record: Option<(u64, u64)>,
}

/// How the guest's changes and flushes alternate.
pub(super) struct Rhythm {
    /// Changes up to here have been seen.
    cseq: u64,
    /// Batches of changes since the last flush.
    batches: u32,
    /// The same between flushes on average, in sixteenths.
    average: u32,
}

impl Default for Rhythm {
    fn default() -> Self {
        Rhythm { cseq: 0, batches: 0, average: 16 * Rhythm::BATCHES_MAX }
    }
}

impl Rhythm {
    /// More are not told apart.
    const BATCHES_MAX: u32 = 4;
    /// So many batches get records of their own before a flush at most, ...
    const AHEAD_MAX: u32 = 2;
    /// ... and only if there were so few on average, in sixteenths.
    const EXPECTED_MAX: u32 = 36;

    /// Changes up to `cseq` have been made. True if the flush that makes them durable is likely to come
    /// before any more.
    fn changed(&mut self, cseq: u64) -> bool {
        if self.cseq == cseq {
            return false;
        }
        self.cseq = cseq;
        self.batches = self.batches.saturating_add(1);
        self.batches <= Rhythm::AHEAD_MAX && self.average <= Rhythm::EXPECTED_MAX
    }

    fn flushed(&mut self) {
        if self.batches > 0 {
            let last = 16 * self.batches.min(Rhythm::BATCHES_MAX);
            self.average = (3 * self.average + last) / 4;
            self.batches = 0;
        }
    }
}

/// Slots of the completion log kept for the engine's own entries (windows).
pub(super) const LOG_MARGIN: u64 = 64;

/// More changes than this are no sign of a guest that flushes each.
const AHEAD_ENTRIES_MAX: usize = 64;

/// Without a flush from the guest, records are written when changes that wait for one take this part of
/// the completion log, whose slots are free when the records have landed. Nothing is synced for that.
const BACKLOG_PART: u64 = 2;

impl Disk {
    /// Makes a change take effect.
    pub(super) fn commit(&mut self, st: &mut dyn Storage, entry: Entry, mark: u64) {
        self.cseq += 1;
        let cseq = self.cseq;
        // Before the place gets a number of I/O to wait for.
        self.hide_from_fast(&entry);
        if apply::frees_place(&entry) {
            let range = apply::sectors_of(&entry, self.sectors_per_block);
            self.space.quarantine(range, cseq, self.next_io);
        }
        apply::apply(&entry, &mut self.map.active, &mut self.space, self.sectors_per_block);
        self.backlog.push_back(PendingEntry { cseq, entry, mark });
        let late = bugs::on(Bug::CompleteBeforeLog);
        if let Some(log) = &self.log {
            let landed = self.journal.landed_through;
            assert!(cseq <= landed + log.slots(), "a slot of the completion log is still needed");
            if !late {
                log.store(st, cseq, &entry);
            } else if let [.., before, _] = self.backlog.make_contiguous() {
                log.store(st, before.cseq, &before.entry);
            }
        }
    }

    pub(super) fn wait_for_durability(&mut self, id: RequestId) {
        self.count_fast_overwrites();
        self.rhythm.flushed();
        self.flushes.push(FlushWaiter { id, cseq: self.cseq, mark: self.landed });
    }

    fn satisfied(&self, cseq: u64, mark: u64) -> bool {
        let journaled = self.durable_through >= cseq || bugs::on(Bug::FlushWithoutRecord);
        journaled && self.synced >= mark
    }

    /// Background work that only a sync can finish.
    pub(super) fn background_wants_sync(&self) -> bool {
        self.space.awaits_sync()
            || self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.wants_sync())
            || !self.backlog.is_empty()
            || self.synced < self.landed
    }

    /// Some work cannot go on without an own sync.
    fn must_sync(&self) -> bool {
        self.starved_for_sync()
            || self.window_awaited()
            || self.checkpoint_awaited()
            || (!self.stalled.is_empty() && self.checkpoint.is_none() && !self.backlog.is_empty())
    }

    /// Groups wait for space that a sync makes usable. The end of the pool's writes needs none.
    fn starved_for_sync(&self) -> bool {
        let pool = self.space.pool.is_busy() && !self.space.window_is_opening();
        !self.starved.is_empty() && !pool
    }

    /// The next window is needed soon: what was made durable before it is wanted keeps nobody waiting.
    fn window_awaited(&self) -> bool {
        self.space.window_is_opening() && self.space.windows_run_out()
    }

    /// Changes wait for a record without anybody who flushes.
    fn backlog_is_long(&self) -> bool {
        self.backlog.len() as u64 > u64::from(self.options.log_slots) / BACKLOG_PART
            || (self.log_room() == 0 && self.journal.landed_through < self.cseq)
    }

    /// A checkpoint under way waits for a sync, and somebody waits for the checkpoint.
    fn checkpoint_awaited(&self) -> bool {
        self.checkpoint.as_ref().is_some_and(|checkpoint| {
            let awaited = checkpoint.urgent
                || !self.stalled.is_empty()
                || !self.checkpoint_waiters.is_empty()
                || self.resizing.is_some();
            checkpoint.wants_sync() && awaited
        })
    }

    /// What a sync of our own is to make durable: what there was when the need for it arose. What changes
    /// while it is on its way would else be journaled batch by batch, and put it off.
    fn choose_own_goal(&mut self) {
        if !(self.must_sync() || self.sync_due) {
            self.own_goal = None;
        } else if self.own_goal.is_none_or(|(cseq, mark)| self.satisfied(cseq, mark)) {
            self.own_goal = Some((self.cseq, self.landed));
        }
    }

    /// Takes the next step towards what the waiting flushes need.
    pub(super) fn advance_durability(&mut self, st: &mut dyn Storage) {
        if self.failed {
            return self.fail_flushes(RequestError::Failed);
        }
        self.finish_satisfied();
        self.choose_own_goal();
        let goal = self.flushes.iter().map(|flush| (flush.cseq, flush.mark));
        let goal = goal.chain(self.own_goal).reduce(|a, b| (a.0.max(b.0), a.1.max(b.1)));
        let Some((cseq, mark)) = goal else {
            if self.backlog_is_long() && self.write_records(st, self.cseq) {
                // Only a checkpoint can take them.
                self.start_sync(st);
            }
            return;
        };
        if self.satisfied(cseq, mark) {
            self.sync_due = false;
            return;
        }
        if self.backlog_is_long() {
            // Not only up to the goal: writes wait for slots of the completion log.
            self.write_records(st, self.cseq);
        }
        let journaled = self.durable_through >= cseq || bugs::on(Bug::FlushWithoutRecord);
        // A checkpoint makes durable what the journal cannot take.
        let without = self.journal.has_failed() && self.checkpoint_awaited();
        if journaled || self.write_records(st, cseq) || without {
            self.start_sync(st);
        }
    }

    /// Where each change is followed by a flush, its record goes out together with the data, and the flush
    /// has only to sync.
    pub(super) fn send_records_ahead(&mut self, st: &mut dyn Storage) {
        let withheld = self.checkpoint.as_ref().is_some_and(|cp| !cp.withheld.is_empty());
        if self.rhythm.changed(self.cseq)
            && !self.failed
            && !withheld
            && !self.journal.has_failed()
            && self.journal.has_room()
            && self.backlog.len() <= AHEAD_ENTRIES_MAX
            && self.backlog.iter().all(|pending| pending.mark <= self.synced)
        {
            self.write_records(st, self.cseq);
        }
    }

    /// Journals everything up to `cseq`. False if that has to wait for something.
    fn write_records(&mut self, st: &mut dyn Storage, cseq: u64) -> bool {
        if let Some(checkpoint) = &self.checkpoint
            && !checkpoint.withheld.is_empty()
        {
            // The checkpoint itself makes them durable.
            return checkpoint.wants_sync();
        }
        while self.backlog.front().is_some_and(|entry| entry.cseq <= cseq) {
            let ready = self.backlog.iter().take_while(|entry| entry.mark <= self.synced).count();
            if ready == 0 {
                // Their data first.
                self.start_sync(st);
                return false;
            }
            let mut entries: Vec<Entry> =
                self.backlog.iter().take(ready).map(|pending| pending.entry).collect();
            let through = self.backlog[ready - 1].cseq;
            if bugs::on(Bug::LoseLastEntry) && entries.len() > 1 {
                let last = entries.len() - 1;
                entries[last] = entries[last - 1];
            }
            let Some(count) = self.journal.append(&entries, through) else {
                // A checkpoint will hold what does not fit into the ring.
                self.request_checkpoint(st, true);
                self.send_records(st);
                return self.checkpoint.as_ref().is_some_and(|cp| cp.wants_sync());
            };
            self.backlog.drain(..count);
            self.stats.entries += count as u64;
        }
        self.send_records(st);
        self.journal.landed_through >= cseq
    }

    fn send_records(&mut self, st: &mut dyn Storage) {
        if self.flushes.is_empty() && self.now_ms < self.records_after_ms {
            return;
        }
        for (sequence, offset, bytes) in self.journal.take_unsent() {
            self.stats.records += 1;
            self.stats.record_bytes += bytes.len() as u64;
            self.write_bytes(st, offset, bytes, Pending::Record { sequence });
        }
    }

    pub(super) fn record_ended(
        &mut self,
        st: &mut dyn Storage,
        sequence: u64,
        result: Result<Done, StorageError>,
    ) {
        self.journal.ended(sequence, result.is_ok());
        match result {
            Ok(_) => self.landed += 1,
            Err(error) => {
                // The same bytes are written to the same slot when the next flush comes, or later.
                let error = error.into();
                self.records_after_ms = self.now_ms + self.options.retry_ms;
                self.sync_due = false;
                self.fail_flushes(error);
                self.fail_freeze(error);
                self.fail_starved(st, error);
                self.fail_stalled(error);
            }
        }
    }

    pub(super) fn start_sync(&mut self, st: &mut dyn Storage) {
        if self.sync.is_some() {
            return;
        }
        self.count_fast_overwrites();
        self.sync = Some(SyncInFlight { mark: self.landed, record: self.journal.landed() });
        self.stats.syncs += 1;
        self.start(st, Op::Sync, Pending::Sync);
    }

    pub(super) fn sync_ended(&mut self, st: &mut dyn Storage, result: Result<Done, StorageError>) {
        let sync = self.sync.take().expect("one sync is under way");
        self.last_sync_ms = self.now_ms;
        self.sync_due = false;
        if let Err(error) = result {
            if bugs::on(Bug::ForgetFailedSync) {
                return self.fail_flushes(error.into());
            }
            self.fail();
            if let Some(log) = &mut self.log {
                log.mark_failed(st);
            }
            self.fail_flushes(error.into());
            return self.fail_checkpoint_waiters(error.into());
        }
        self.synced = self.synced.max(sync.mark);
        if let Some((sequence, through)) = sync.record {
            self.journal.became_durable(sequence);
            self.durable_through = self.durable_through.max(through);
        }
        self.finish_satisfied();
        self.settle_space(st);
    }

    fn finish_satisfied(&mut self) {
        for flush in std::mem::take(&mut self.flushes) {
            if self.satisfied(flush.cseq, flush.mark) {
                self.finish(flush.id, Ok(()));
            } else {
                self.flushes.push(flush);
            }
        }
    }

    pub(super) fn fail_flushes(&mut self, error: RequestError) {
        for flush in std::mem::take(&mut self.flushes) {
            self.finish(flush.id, Err(error));
        }
    }

    /// What a durable checkpoint holds needs no record.
    pub(super) fn forget_backlog(&mut self, applied: u64) {
        while self.backlog.front().is_some_and(|pending| pending.cseq <= applied) {
            self.backlog.pop_front();
        }
        self.durable_through = self.durable_through.max(applied);
        self.journal.landed_through = self.journal.landed_through.max(applied);
    }

    /// Slots of the completion log that may be filled: their old content is in the journal, and no
    /// first write under way counts on them.
    pub(super) fn log_room(&self) -> u64 {
        let Some(log) = &self.log else { return u64::MAX };
        let unlanded = self.cseq - self.journal.landed_through.min(self.cseq);
        log.slots().saturating_sub(unlanded + self.reserved + LOG_MARGIN)
    }
}
