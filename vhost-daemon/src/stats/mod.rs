//! Figures of a disk's queues, cheap enough to be always on: a queue's figures are written by the one
//! thread that holds the queue, without locks, and read by anybody at any time.

mod checkpoints;
mod histogram;
pub mod prometheus;

pub use checkpoints::Checkpoints;
pub use histogram::Histogram;

use crate::disk::Access;
use crate::events;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What requests are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Writes of zeroes.
    WriteZeroes,
}

/// All kinds, with their names.
pub const KINDS: [(Kind, &str); 5] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Flush, "flush"),
    (Kind::Discard, "discard"),
    (Kind::WriteZeroes, "write_zeroes"),
];

/// A number that one thread counts up and others read. (A locked addition would cost more than the rest
/// of the bookkeeping.)
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Nothing is counted yet.
    pub const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Counts. Only one thread at a time may do this.
    pub fn add(&self, count: u64) {
        self.0.store(self.get().wrapping_add(count), Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Figures of the requests of one kind.
#[derive(Debug, Default)]
pub struct KindStats {
    /// Requests that have ended.
    pub requests: Counter,
    /// Their bytes.
    pub bytes: Counter,
    /// Those among them that failed.
    pub errors: Counter,
    /// From the ring to the used entry.
    pub latency: Histogram,
}

/// Figures of a queue that is used.
#[derive(Debug, Default)]
struct Used {
    kinds: [KindStats; KINDS.len()],
    /// Latencies of writes that were under way while the image's format made a checkpoint.
    in_checkpoints: Histogram,
}

/// Figures of a queue.
#[derive(Debug, Default)]
pub struct QueueStats {
    /// Made for the first request: most queues never have one.
    used: OnceLock<Box<Used>>,
    /// Requests that were refused or made no sense.
    pub refused: Counter,
    /// Interrupts sent to the guest.
    pub interrupts: Counter,
    /// Requests under way.
    pub in_flight: AtomicU64,
}

impl QueueStats {
    /// Those of a kind, if anything has ended.
    pub fn kind(&self, kind: Kind) -> Option<&KindStats> {
        let stats = &self.used.get()?.kinds[kind as usize];
        (stats.requests.get() > 0).then_some(stats)
    }

    /// Latencies of the writes that were under way while a checkpoint was, if there were any.
    pub fn in_checkpoints(&self) -> Option<histogram::Reading> {
        let reading = self.used.get()?.in_checkpoints.read();
        (reading.count() > 0).then_some(reading)
    }

    fn ended(&self, start: &Start, now: Instant, failed: bool, in_checkpoint: bool) {
        let used = self.used.get_or_init(Box::default);
        let stats = &used.kinds[start.kind as usize];
        let time = now.saturating_duration_since(start.at);
        stats.requests.add(1);
        stats.bytes.add(start.bytes);
        stats.latency.add(time);
        if in_checkpoint {
            used.in_checkpoints.add(time);
        }
        if failed {
            stats.errors.add(1);
        }
    }

    fn is_used(&self) -> bool {
        self.refused.get() > 0 || self.used.get().is_some()
    }

    fn to_json(&self, queue: usize) -> Value {
        let mut value = json!({
            "queue": queue,
            "in_flight": self.in_flight.load(Ordering::Relaxed),
            "refused": self.refused.get(),
            "interrupts": self.interrupts.get(),
        });
        for (kind, name) in KINDS {
            let Some(stats) = self.kind(kind) else { continue };
            // Before the whole, of which it is a part.
            let part = self.in_checkpoints().filter(|_| kind == Kind::Write);
            let latency = stats.latency.read();
            value[name] = json!({
                "requests": stats.requests.get(),
                "bytes": stats.bytes.get(),
                "errors": stats.errors.get(),
                "latency": latency.to_json(),
            });
            if let Some(part) = part {
                value[name]["latency_in_checkpoints"] = part.to_json();
                value[name]["latency_outside_checkpoints"] = latency.without(&part).to_json();
            }
        }
        value
    }
}

/// What the end of a request needs to know of its beginning.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// What is asked for.
    pub kind: Kind,
    /// Number of bytes.
    pub bytes: u64,
    /// When it was taken from the ring.
    pub at: Instant,
}

/// What is known of those who come in by one of a disk's sockets. It outlives their connections.
#[derive(Debug)]
pub struct Monitor {
    disk: &'static str,
    access: Access,
    connected: AtomicBool,
    connections: AtomicU64,
    volatile_cache: AtomicBool,
    checkpoints: Arc<Checkpoints>,
    queues: Vec<QueueStats>,
}

impl Monitor {
    /// Nothing has happened yet. `checkpoints` are those of the disk's image.
    pub fn new(
        disk: &'static str,
        access: Access,
        queues: u16,
        checkpoints: Arc<Checkpoints>,
    ) -> Monitor {
        Monitor {
            disk,
            access,
            connected: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            volatile_cache: AtomicBool::new(false),
            checkpoints,
            queues: (0..queues).map(|_| QueueStats::default()).collect(),
        }
    }

    /// Name of the disk.
    pub fn disk(&self) -> &'static str {
        self.disk
    }

    /// By which socket.
    pub fn access(&self) -> Access {
        self.access
    }

    /// A front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    /// How often one has connected.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// The guest has to flush what it wants to be durable.
    pub fn has_volatile_cache(&self) -> bool {
        self.volatile_cache.load(Ordering::Relaxed)
    }

    /// Whether it has to, from now on.
    pub fn set_volatile_cache(&self, volatile: bool) {
        self.volatile_cache.store(volatile, Ordering::Relaxed);
    }

    /// The queues, by number.
    pub fn queues(&self) -> &[QueueStats] {
        &self.queues
    }

    /// A request of this queue has ended.
    pub fn ended(&self, queue: usize, start: &Start, now: Instant, failed: bool) {
        let in_checkpoint = start.kind == Kind::Write && self.checkpoints.met_since(start.at);
        self.queues[queue].ended(start, now, failed, in_checkpoint);
    }

    /// A front-end has connected.
    pub fn connect(&self) {
        self.connected.store(true, Ordering::SeqCst);
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.publish("connection");
    }

    /// It has gone.
    pub fn disconnect(&self) {
        self.connected.store(false, Ordering::SeqCst);
        self.publish("disconnect");
    }

    fn publish(&self, event: &str) {
        events::publish_of(Some(self.disk), event, json!({ "socket": self.access.name() }));
    }

    /// Figures of the queues that have been used.
    pub fn to_json(&self) -> Value {
        let used = self.queues.iter().enumerate().filter(|(_, queue)| queue.is_used());
        Value::Array(used.map(|(number, queue)| queue.to_json(number)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_used_queues_are_shown() {
        let monitor = Monitor::new("d", Access::Main, 4, Arc::default());
        let at = Instant::now();
        let start = Start { kind: Kind::Write, bytes: 4096, at };
        monitor.ended(2, &start, at + Duration::from_micros(100), false);
        monitor.ended(2, &start, at + Duration::from_micros(5), true);
        let value = monitor.to_json();
        assert_eq!(value.as_array().map(Vec::len), Some(1));
        let (queue, write) = (&value[0], &value[0]["write"]);
        assert_eq!(queue["queue"], 2);
        assert_eq!((&write["requests"], &write["bytes"]), (&json!(2), &json!(8192)));
        assert_eq!((&write["errors"], &write["latency_in_checkpoints"]), (&json!(1), &Value::Null));
        assert_eq!(queue["read"], Value::Null);
    }

    #[test]
    fn writes_in_checkpoints_are_counted_apart() {
        let checkpoints = Arc::new(Checkpoints::default());
        let monitor = Monitor::new("d", Access::Main, 1, checkpoints.clone());
        let ended = |kind, at: Instant, micros| {
            let start = Start { kind, bytes: 4096, at };
            monitor.ended(0, &start, at + Duration::from_micros(micros), false);
        };
        let before = Instant::now();
        ended(Kind::Write, before, 3);
        checkpoints.set_running(true);
        ended(Kind::Write, before, 40);
        ended(Kind::Read, before, 40);
        checkpoints.set_running(false);
        // It ended after the checkpoint, but had begun before.
        ended(Kind::Write, before, 600);
        ended(Kind::Write, Instant::now() + Duration::from_micros(1), 3);
        let value = monitor.to_json();
        let write = &value[0]["write"];
        assert_eq!(write["requests"], 4);
        assert_eq!(write["latency_in_checkpoints"]["sum_us"], 640);
        assert_eq!(write["latency_outside_checkpoints"]["sum_us"], 6);
        assert_eq!(value[0]["read"]["latency_in_checkpoints"], Value::Null);
    }
}
