//! When the image's format makes checkpoints, for those who count what requests then take.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// One is under way.
const RUNNING: u64 = u64::MAX;

/// The checkpoints of one image. Asked at the end of each write, from any thread: a single relaxed load. An
/// answer that is late by a request or two does no harm.
#[derive(Debug)]
pub struct Checkpoints {
    base: Instant,
    /// When the last one ended, in nanoseconds since `base`; 0 before the first one.
    until: AtomicU64,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Checkpoints { base: Instant::now(), until: AtomicU64::new(0) }
    }
}

impl Checkpoints {
    /// One has begun, or ended.
    pub fn set_running(&self, running: bool) {
        let until = if running { RUNNING } else { self.since_base(Instant::now()) };
        self.until.store(until, Ordering::Relaxed);
    }

    /// What began then and is under way still has met a checkpoint.
    pub fn met_since(&self, begun: Instant) -> bool {
        self.since_base(begun) < self.until.load(Ordering::Relaxed)
    }

    fn since_base(&self, at: Instant) -> u64 {
        let nanos = at.saturating_duration_since(self.base).as_nanos();
        u64::try_from(nanos).unwrap_or(RUNNING - 1)
    }
}
