//! What each sector of a disk may hold, from what was asked of the disk and what was answered.
//!
//! A sector may hold any value that no later one is known to have replaced: two writes that were in
//! flight together may land in either order; a write submitted after another had ended replaces it.

use exd_guest_tests::stamp::{self, Found};

/// Bytes in a sector.
pub const SECTOR: usize = stamp::SECTOR;

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// The stamp of the write of this number.
    Write(u64),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    value: Value,
    submitted: u64,
    /// When it was seen to end.
    ended: Option<u64>,
    /// A flush that began after its end has ended.
    durable: bool,
}

/// A change that was submitted.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    first: u64,
    count: u64,
    submitted: u64,
}

/// Which answers count when a crash is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promise {
    /// P2: what was completed is there.
    Completed,
    /// P1: what was completed before a completed flush is there.
    Flushed,
}

/// See the module.
#[derive(Debug)]
pub struct History {
    sectors: Vec<Vec<Entry>>,
    clock: u64,
    writes: u64,
    /// A read may bring some words of a sector from before a write in flight, and others from after it.
    torn_reads: bool,
    /// Changes acknowledged.
    pub acknowledged: u64,
}

impl History {
    /// Of a disk of so many sectors, all zero.
    pub fn new(sectors: u64) -> History {
        let entry = Entry { value: Value::Zero, submitted: 0, ended: Some(0), durable: true };
        History {
            sectors: (0..sectors).map(|_| vec![entry]).collect(),
            clock: 0,
            writes: 0,
            torn_reads: false,
            acknowledged: 0,
        }
    }

    /// The same of a disk behind the host's page cache: ext4 copies out of it with no regard to who copies
    /// into it at the same moment.
    pub fn through_page_cache(sectors: u64) -> History {
        History { torn_reads: true, ..History::new(sectors) }
    }

    /// Of a daemon's disk: its arguments say whether that lies behind the page cache.
    pub fn of_daemon(sectors: u64, args: &[impl AsRef<str>]) -> History {
        let cached = |arg: &str| ["--cache=writeback", "--cache=writethrough"].contains(&arg);
        let torn_reads = args.iter().any(|arg| cached(arg.as_ref()));
        History { torn_reads, ..History::new(sectors) }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The time: later calls give larger values.
    pub fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write is about to be submitted: fills its data.
    pub fn begin_write(&mut self, first: u64, data: &mut [u8]) -> Change {
        self.writes += 1;
        stamp::fill_run(data, first, self.writes);
        self.begin(first, (data.len() / SECTOR) as u64, Value::Write(self.writes))
    }

    /// A write of zeroes, or a discard of whole blocks, is about to be submitted.
    pub fn begin_zeroes(&mut self, first: u64, count: u64) -> Change {
        self.begin(first, count, Value::Zero)
    }

    fn begin(&mut self, first: u64, count: u64, value: Value) -> Change {
        let submitted = self.now();
        for entries in &mut self.sectors[first as usize..(first + count) as usize] {
            entries.push(Entry { value, submitted, ended: None, durable: false });
        }
        Change { first, count, submitted }
    }

    /// The change was acknowledged.
    pub fn end(&mut self, change: Change) {
        let now = self.now();
        self.acknowledged += 1;
        for entries in &mut self.sectors[change.first as usize..][..change.count as usize] {
            for entry in entries.iter_mut().filter(|entry| entry.submitted == change.submitted) {
                entry.ended = Some(now);
            }
        }
    }

    /// A flush submitted at `begun` was acknowledged. Reads submitted since `horizon` may still bring what
    /// was replaced after that.
    pub fn flushed(&mut self, begun: u64, horizon: u64) {
        for entries in &mut self.sectors {
            if let [entry] = entries.as_mut_slice() {
                entry.durable |= entry.ended.is_some_and(|ended| ended < begun);
                continue;
            }
            for entry in entries.iter_mut() {
                entry.durable |= entry.ended.is_some_and(|ended| ended < begun);
            }
            let all = entries.clone();
            let final_since = |new: &Entry| new.ended.is_some_and(|ended| ended < horizon);
            entries.retain(|old| {
                !all.iter().any(|new| new.durable && final_since(new) && follows(old, new))
            });
        }
    }

    /// Checks what a read of sectors `first ..`, submitted at `begun`, brought.
    pub fn check_read(&self, first: u64, data: &[u8], begun: u64) -> Result<(), String> {
        let ended = |entry: &Entry| entry.ended.is_some_and(|ended| ended < begun);
        for (sector, content) in (first..).zip(data.chunks(SECTOR)) {
            let torn = self.torn_reads && stamp::read(content) == Found::Garbage;
            if !(torn && self.is_torn(sector, content, ended)) {
                self.check(sector, content, ended)?;
            }
        }
        Ok(())
    }

    /// Each word is of a value that the sector may hold, and one of these is of a change in flight.
    fn is_torn(&self, sector: u64, content: &[u8], counts: impl Fn(&Entry) -> bool) -> bool {
        let bytes_of = |value| {
            let mut bytes = [0; SECTOR];
            if let Value::Write(generation) = value {
                stamp::fill(&mut bytes, sector, generation);
            }
            bytes
        };
        let values: Vec<_> = self.may_hold(sector, &counts).map(bytes_of).collect();
        !self.sectors[sector as usize].iter().all(counts)
            && (0..SECTOR)
                .step_by(8)
                .all(|at| values.iter().any(|value| value[at..at + 8] == content[at..at + 8]))
    }

    /// What a sector may hold: the values of changes that none has certainly replaced. `counts` says which
    /// have certainly replaced what ended before them.
    fn may_hold<'a>(
        &'a self,
        sector: u64,
        counts: &'a impl Fn(&Entry) -> bool,
    ) -> impl Iterator<Item = Value> + 'a {
        let entries = &self.sectors[sector as usize];
        let replaced =
            move |old: &Entry| entries.iter().any(|new| counts(new) && follows(old, new));
        entries.iter().filter(move |entry| !replaced(entry)).map(|entry| entry.value)
    }

    /// Checks what a read of sectors `first ..` brought after a crash.
    pub fn check_crash(&self, first: u64, data: &[u8], promise: Promise) -> Result<(), String> {
        self.check(first, data, |new| match promise {
            Promise::Completed => new.ended.is_some(),
            Promise::Flushed => new.durable,
        })
    }

    /// `counts` as in [`History::may_hold`].
    fn check(
        &self,
        first: u64,
        data: &[u8],
        counts: impl Fn(&Entry) -> bool,
    ) -> Result<(), String> {
        for (sector, content) in (first..).zip(data.chunks(SECTOR)) {
            let entries = &self.sectors[sector as usize];
            let found = value_of(sector, content)
                .map_err(|text| format!("sector {sector}: {text}; history: {entries:?}"))?;
            if !self.may_hold(sector, &counts).any(|value| value == found) {
                return Err(format!("sector {sector} holds {found:?}; history: {entries:?}"));
            }
        }
        Ok(())
    }

    /// From now on the sectors hold what was found, and nothing that came before may appear again.
    pub fn settle(&mut self, first: u64, data: &[u8]) {
        let now = self.now();
        for (sector, content) in (first..).zip(data.chunks(SECTOR)) {
            let value = value_of(sector, content).expect("checked before");
            let entry = Entry { value, submitted: now, ended: Some(now), durable: false };
            self.sectors[sector as usize] = vec![entry];
        }
    }
}

/// `new` was submitted after `old` had ended.
fn follows(old: &Entry, new: &Entry) -> bool {
    old.ended.is_some_and(|ended| ended < new.submitted)
}

fn value_of(sector: u64, content: &[u8]) -> Result<Value, String> {
    match stamp::read(content) {
        Found::Zeroes => Ok(Value::Zero),
        Found::Stamp { sector: at, generation } if at == sector => Ok(Value::Write(generation)),
        Found::Stamp { sector: at, generation } => {
            Err(format!("data of sector {at}, write {generation}"))
        }
        Found::Garbage => Err("neither zeroes nor a stamp".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(history: &History, generation: u64, promise: Promise) -> bool {
        let mut data = [0; SECTOR];
        if generation > 0 {
            stamp::fill_run(&mut data, 3, generation);
        }
        history.check_crash(3, &data, promise).is_ok()
    }

    #[test]
    fn what_may_be_there_after_a_crash() {
        let mut history = History::new(8);
        let mut data = [0; SECTOR];
        let first = history.begin_write(3, &mut data);
        for generation in 0..2 {
            assert!(holds(&history, generation, Promise::Completed));
        }
        history.end(first);
        assert!(!holds(&history, 0, Promise::Completed));
        assert!(holds(&history, 0, Promise::Flushed));
        let begun = history.now();
        let second = history.begin_write(3, &mut data);
        let third = history.begin_write(3, &mut data);
        history.end(second);
        history.flushed(begun, u64::MAX);
        assert!(!holds(&history, 0, Promise::Flushed));
        assert!(holds(&history, 1, Promise::Flushed));
        assert!(!holds(&history, 1, Promise::Completed));
        assert!(holds(&history, 2, Promise::Completed) && holds(&history, 3, Promise::Completed));
        history.end(third);
        assert!(holds(&history, 2, Promise::Completed), "they were in flight together");
        assert!(!holds(&history, 4, Promise::Completed));
        stamp::fill_run(&mut data, 3, 3);
        history.settle(3, &data);
        assert!(holds(&history, 3, Promise::Completed) && !holds(&history, 2, Promise::Completed));
    }

    /// Behind the page cache a read may see a sector torn while a write of it is in flight, and only then.
    #[test]
    fn torn_sectors_are_allowed_beside_writes_only() {
        for (mut history, allowed) in
            [(History::new(8), false), (History::through_page_cache(8), true)]
        {
            let mut data = [0; SECTOR];
            let before = history.now();
            let change = history.begin_write(3, &mut data);
            data[96..].fill(0);
            assert_eq!(history.check_read(3, &data, before).is_ok(), allowed);
            assert!(history.check_read(2, &data, before).is_err(), "another sector");
            data[500] = 1;
            assert!(history.check_read(3, &data, before).is_err(), "neither before nor after");
            data[500] = 0;
            history.end(change);
            assert_eq!(history.check_read(3, &data, before).is_ok(), allowed, "it ended meanwhile");
            let after = history.now();
            assert!(history.check_read(3, &data, after).is_err());
        }
    }

    #[test]
    fn misplaced_data_is_noticed() {
        let mut history = History::new(8);
        let mut data = [0; SECTOR];
        history.begin_write(2, &mut data);
        assert!(history.check_crash(2, &data, Promise::Completed).is_ok());
        assert!(history.check_crash(3, &data, Promise::Completed).is_err());
    }
}
