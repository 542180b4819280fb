//! Patterns of requests, and the loop that keeps them in flight.

use crate::Result;
use crate::client::{Op, Queue};
use crate::stats::Latencies;
use crate::trace::stamp_all;
use fastrand::Rng;
use std::time::{Duration, Instant};

const SECTOR: u64 = 512;

/// Which place the next request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after another, from the start of the span, and from there again at its end.
    Sequential,
    /// Each place at most once, in random order, for as many as there are.
    Random,
}

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Write.
    Write,
    /// Read.
    Read,
    /// Read or write; so many reads in a hundred.
    Mixed(u32),
    /// Discard.
    Discard,
}

/// When to flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Only at the end.
    Never,
    /// After so many requests; it does not wait for those that are still in flight.
    Every(u64),
    /// Each slot is a program of its own that flushes after each of its writes.
    Each,
}

/// A pattern of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Reads or writes.
    pub kind: Kind,
    /// Bytes of each.
    pub len: usize,
    /// Where.
    pub order: Order,
    /// Bytes that all places are shifted by.
    pub shift: u64,
    /// Bytes of the disk that are used.
    pub span: u64,
    /// Requests in flight, all queues together.
    pub depth: usize,
    /// Queues.
    pub queues: usize,
    /// When to flush.
    pub flush: Flush,
    /// Number of requests, flushes not counted.
    pub ops: u64,
}

/// What came of a pattern.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests carried out, flushes not counted.
    pub ops: u64,
    /// Flushes carried out.
    pub flushes: u64,
    /// Latencies of requests, ns.
    pub requests: Latencies,
    /// Latencies of flushes, ns.
    pub flush_times: Latencies,
    /// The first places that were written, for a check afterwards.
    pub samples: Vec<u64>,
}

/// Places kept for the check.
const SAMPLES: usize = 64;

impl Pattern {
    /// The queues' shares of the places, in the order they are used.
    fn places(&self, queue: usize) -> Places {
        let count = (self.span / self.len as u64).max(1);
        let mut rng = Rng::with_seed(7);
        let stride = self.queues as u64;
        match self.order {
            Order::Sequential => Places::Sequential { next: queue as u64, stride, count },
            // A shuffle needs memory for each place; among very many, places drawn at random are rarely
            // the same.
            Order::Random if count > 1 << 24 => {
                Places::Drawn { rng: Rng::with_seed(queue as u64 + 1), count }
            }
            Order::Random => {
                let mut all: Vec<u32> = (0..count as u32).collect();
                rng.shuffle(&mut all);
                let own = all.into_iter().skip(queue).step_by(self.queues);
                Places::Shuffled { own: own.collect(), next: 0 }
            }
        }
    }
}

enum Places {
    Sequential { next: u64, stride: u64, count: u64 },
    Shuffled { own: Vec<u32>, next: usize },
    Drawn { rng: Rng, count: u64 },
}

impl Places {
    fn next(&mut self) -> u64 {
        match self {
            Places::Sequential { next, stride, count } => {
                let place = *next % *count;
                *next += *stride;
                place
            }
            Places::Shuffled { own, next } => {
                let place = own[*next % own.len()];
                *next += 1;
                u64::from(place)
            }
            Places::Drawn { rng, count } => rng.u64(0..*count),
        }
    }
}

/// Runs the pattern's share of one queue, until it is complete or `limit` has passed. Nothing is in
/// flight afterwards.
pub fn run(
    queue: &mut Queue,
    number: usize,
    pattern: &Pattern,
    limit: Duration,
) -> Result<Outcome> {
    let mut drive = Drive::new(queue, number, pattern);
    drive.deadline = Instant::now() + limit;
    for slot in 0..drive.queue.depth() {
        drive.next(slot);
    }
    let mut ends = Vec::new();
    while drive.queue.in_flight() > 0 {
        drive.queue.wait(&mut ends)?;
        drive.now = Instant::now();
        for (slot, result) in &ends {
            if *result != 0 {
                return Err(format!("a request failed: {result}").into());
            }
            drive.ended(*slot);
            drive.next(*slot);
        }
    }
    Ok(drive.outcome)
}

struct Drive<'a> {
    queue: &'a mut Queue,
    pattern: Pattern,
    places: Places,
    rng: Rng,
    /// Requests still to be started.
    left: u64,
    until_flush: u64,
    slots: Vec<Slot>,
    now: Instant,
    deadline: Instant,
    outcome: Outcome,
}

#[derive(Clone, Copy)]
struct Slot {
    begun: Instant,
    is_flush: bool,
    /// A write is to be flushed.
    owes_flush: bool,
}

impl<'a> Drive<'a> {
    fn new(queue: &'a mut Queue, number: usize, pattern: &Pattern) -> Self {
        let now = Instant::now();
        let queues = pattern.queues as u64;
        let depth = queue.depth();
        for slot in 0..depth {
            let size = queue.slot_size();
            Rng::with_seed(slot as u64).fill(queue.buffer(slot, size));
        }
        Drive {
            places: pattern.places(number),
            rng: Rng::with_seed(number as u64),
            left: pattern.ops / queues + u64::from((number as u64) < pattern.ops % queues),
            until_flush: match pattern.flush {
                Flush::Every(count) => count,
                _ => u64::MAX,
            },
            slots: vec![Slot { begun: now, is_flush: false, owes_flush: false }; depth],
            queue,
            pattern: *pattern,
            now,
            deadline: now,
            outcome: Outcome::default(),
        }
    }

    /// Starts the slot's next request, if there is one.
    fn next(&mut self, slot: usize) {
        let owes = std::mem::take(&mut self.slots[slot].owes_flush);
        if owes || self.until_flush == 0 {
            if let Flush::Every(count) = self.pattern.flush {
                self.until_flush = count;
            }
            self.start(slot, Op::Flush, true);
            return;
        }
        if self.left == 0 || self.now >= self.deadline {
            return;
        }
        self.left -= 1;
        self.until_flush -= 1;
        let Pattern { len, kind, .. } = self.pattern;
        let place = self.places.next() * len as u64 + self.pattern.shift;
        let read = match kind {
            Kind::Read => true,
            Kind::Mixed(reads) => self.rng.u32(0..100) < reads,
            Kind::Write | Kind::Discard => false,
        };
        let op = match kind {
            _ if read => Op::Read(place, len),
            Kind::Discard => Op::Discard(place, len as u64),
            _ => {
                stamp_all(self.queue.buffer(slot, len), place / SECTOR, 0);
                self.slots[slot].owes_flush = self.pattern.flush == Flush::Each;
                if self.outcome.samples.len() < SAMPLES {
                    self.outcome.samples.push(place);
                }
                Op::Write(place, len)
            }
        };
        self.start(slot, op, false);
    }

    fn start(&mut self, slot: usize, op: Op, is_flush: bool) {
        self.slots[slot].begun = self.now;
        self.slots[slot].is_flush = is_flush;
        self.queue.start(slot, op);
    }

    fn ended(&mut self, slot: usize) {
        let Slot { begun, is_flush, .. } = self.slots[slot];
        let time = self.now.duration_since(begun).as_nanos() as u64;
        if is_flush {
            self.outcome.flushes += 1;
            self.outcome.flush_times.add(time);
        } else {
            self.outcome.ops += 1;
            self.outcome.requests.add(time);
        }
    }
}

/// Reads some of the places that a pattern has written and compares every sector's mark.
pub fn check_samples(queue: &mut Queue, pattern: &Pattern, samples: &[u64]) -> Result<()> {
    let mut wanted = vec![0; pattern.len];
    for place in samples {
        queue.carry_out(0, Op::Read(*place, pattern.len))?;
        stamp_all(&mut wanted, place / SECTOR, 0);
        let found = queue.buffer(0, pattern.len).chunks_exact(SECTOR as usize);
        let same = found.zip(wanted.chunks_exact(SECTOR as usize)).all(|(a, b)| a[..16] == b[..16]);
        if !same {
            return Err(format!("offset {place} does not hold what was written there").into());
        }
    }
    Ok(())
}

/// Fills the first `span` bytes with sequential writes, and flushes.
pub fn fill(queue: &mut Queue, span: u64, len: usize, order: Order) -> Result<()> {
    let pattern = Pattern {
        kind: Kind::Write,
        len,
        order,
        shift: 0,
        span,
        depth: queue.depth(),
        queues: 1,
        flush: Flush::Never,
        ops: span / len as u64,
    };
    run(queue, 0, &pattern, Duration::from_secs(600))?;
    queue.carry_out(0, Op::Flush)
}
