//! Random changes of a disk by a client that may lose its daemon at any moment.

use crate::client::{Client, End};
use crate::daemon::{Daemon, PATIENCE};
use crate::history::{Change, History, Promise, SECTOR};
use fastrand::Rng;
use std::time::Duration;

/// Requests in flight on each queue.
pub const DEPTH: usize = 32;
/// Longest request in sectors.
const LONGEST: u64 = 128;
const BUFFER: usize = LONGEST as usize * SECTOR;
/// Discards are made of whole blocks: of others an image may forget what it likes.
const DISCARD_UNIT: u64 = 8;
/// How long to wait for an answer before looking whether there is still a daemon.
const GLANCE: Duration = Duration::from_millis(10);

/// Memory that a client needs for `queues` queues.
pub fn memory(queues: usize) -> usize {
    (queues * DEPTH * BUFFER).max(VERIFY)
}

/// Bytes read at once when the whole disk is verified.
const VERIFY: usize = 1 << 20;

#[derive(Clone, Copy)]
enum Running {
    Change(Change),
    Flush { begun: u64 },
    Read { begun: u64, first: u64, count: u64 },
}

/// A random workload.
pub struct Workload {
    random: Rng,
    running: Vec<Vec<Option<Running>>>,
    /// Requests to run before it ends by itself.
    left: u64,
    /// Now and then, flush.
    pub flushes: bool,
}

impl Workload {
    /// On so many queues.
    pub fn new(seed: u64, queues: usize, requests: u64) -> Workload {
        Workload {
            random: Rng::with_seed(seed),
            running: vec![vec![None; DEPTH]; queues],
            left: requests,
            flushes: true,
        }
    }

    /// Runs until all requests are answered or the daemon is gone. What the daemon answered before it
    /// died counts, seen by then or not. True if it lived.
    pub fn run(&mut self, client: &mut Client, history: &mut History, daemon: &mut Daemon) -> bool {
        loop {
            for queue in 0..self.running.len() {
                self.fill(client, history, queue);
            }
            let mut idle = true;
            let mut progress = false;
            for queue in 0..self.running.len() {
                let wait = (queue == 0 && client.in_flight(queue) > 0).then_some(GLANCE);
                let ends = client.ends(queue, wait);
                progress |= !ends.is_empty();
                self.take(client, history, queue, ends);
                idle &= client.in_flight(queue) == 0;
            }
            if idle && self.left == 0 {
                return true;
            }
            if !progress && daemon.has_ended() {
                for queue in 0..self.running.len() {
                    loop {
                        let ends = client.ends(queue, None);
                        if ends.is_empty() {
                            break;
                        }
                        self.take(client, history, queue, ends);
                    }
                }
                return false;
            }
        }
    }

    fn fill(&mut self, client: &mut Client, history: &mut History, queue: usize) {
        for tag in 0..DEPTH {
            if self.left == 0 {
                return;
            }
            if self.running[queue][tag].is_none() {
                self.left -= 1;
                let running = self.start(client, history, queue, tag);
                self.running[queue][tag] = Some(running);
            }
        }
    }

    fn start(
        &mut self,
        client: &mut Client,
        history: &mut History,
        queue: usize,
        tag: usize,
    ) -> Running {
        let at = (queue * DEPTH + tag) * BUFFER;
        let (first, count) = self.range(history);
        let (offset, len) = (first * SECTOR as u64, count as usize * SECTOR);
        match self.random.u32(0..100) {
            0..5 if self.flushes => {
                let begun = history.now();
                client.start_flush(queue, tag);
                Running::Flush { begun }
            }
            5..15 => {
                let begun = history.now();
                client.start_read(queue, offset, at, len, tag);
                Running::Read { begun, first, count }
            }
            15..22 => {
                let change = history.begin_zeroes(first, count);
                let unmap = self.random.bool();
                client.start_zeroes(queue, offset, len as u64, unmap, tag);
                Running::Change(change)
            }
            22..27 => {
                let first = first.next_multiple_of(DISCARD_UNIT).min(history.sectors() - LONGEST);
                let first = first - first % DISCARD_UNIT;
                let count = count.next_multiple_of(DISCARD_UNIT);
                let change = history.begin_zeroes(first, count);
                let unit = SECTOR as u64;
                client.start_discard(queue, first * unit, count * unit, tag);
                Running::Change(change)
            }
            _ => {
                let change = history.begin_write(first, client.memory(at, len));
                client.start_write(queue, offset, at, len, tag);
                Running::Change(change)
            }
        }
    }

    /// A range of sectors, mostly short, aligned now and then, half of them in a narrow place where they
    /// meet others.
    fn range(&mut self, history: &History) -> (u64, u64) {
        let random = &mut self.random;
        let count = match random.u32(0..10) {
            0..4 => random.u64(1..=8),
            4..6 => 8,
            6..8 => random.u64(1..=32),
            _ => random.u64(1..=LONGEST),
        };
        let last = history.sectors() - count;
        let first =
            if random.bool() { random.u64(0..=last) } else { random.u64(0..=last.min(512)) };
        let first = if random.u32(0..4) == 0 { first - first % 8 } else { first };
        (first, count)
    }

    /// When the oldest read in flight was submitted.
    fn oldest_read(&self) -> u64 {
        let running = self.running.iter().flatten().flatten();
        let reads = running.filter_map(|request| match request {
            Running::Read { begun, .. } => Some(*begun),
            _ => None,
        });
        reads.min().unwrap_or(u64::MAX)
    }

    fn take(&mut self, client: &mut Client, history: &mut History, queue: usize, ends: Vec<End>) {
        for (tag, ret) in ends {
            assert_eq!(ret, 0, "no request fails");
            match self.running[queue][tag].take().expect("it was started") {
                Running::Change(change) => history.end(change),
                Running::Flush { begun } => history.flushed(begun, self.oldest_read()),
                Running::Read { begun, first, count } => {
                    let at = (queue * DEPTH + tag) * BUFFER;
                    let data = client.memory(at, count as usize * SECTOR);
                    history.check_read(first, data, begun).expect("a read brings what was written");
                }
            }
        }
    }
}

/// Reads the whole disk, checks each sector, and takes it for what the disk holds from now on.
pub fn verify(client: &mut Client, history: &mut History, promise: Promise) {
    let total = history.sectors() * SECTOR as u64;
    for offset in (0..total).step_by(VERIFY) {
        let len = (total - offset).min(VERIFY as u64) as usize;
        client.start_read(0, offset, 0, len, 0);
        let ends = client.ends(0, Some(PATIENCE));
        assert_eq!(ends, [(0, 0)], "the daemon answers");
        let first = offset / SECTOR as u64;
        let data = client.memory(0, len);
        if let Err(text) = history.check_crash(first, data, promise) {
            panic!("after a crash, {promise:?}: {text}");
        }
        history.settle(first, data);
    }
}
