//! Messages on standard error. Those that a guest or front-end can provoke are limited in rate.

use log::{LevelFilter, Log, Metadata, Record};
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limited messages in a burst, and the time in which one more becomes possible.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_millis(500);
/// Targets whose messages are limited: `guest` is ours, the rest are libraries that log what the ring or
/// the socket holds.
const LIMITED: [&str; 4] = ["guest", "virtio_queue", "vhost", "vhost_user_backend"];

struct Logger(Mutex<Limit>);

#[derive(Debug)]
struct Limit {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Limit {
    fn new(now: Instant) -> Limit {
        Limit { tokens: BURST, refilled: now, suppressed: 0 }
    }

    /// Whether a message may pass, with the number of those that did not since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.refilled);
        let earned = elapsed.as_millis() / REFILL.as_millis();
        if earned > 0 {
            self.tokens =
                BURST.min(self.tokens.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.suppressed += 1;
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let crate_name = record.target().split("::").next().unwrap_or("");
        let mut missing = 0;
        if LIMITED.contains(&crate_name) {
            let mut limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match limit.admit(Instant::now()) {
                Some(suppressed) => missing = suppressed,
                None => return,
            }
        }
        let level = record.level().as_str().to_ascii_lowercase();
        let mut text = format!("vhost-daemon: {level}: {}\n", record.args());
        if missing > 0 {
            text = format!("vhost-daemon: {level}: {missing} messages left out\n{text}");
        }
        // Nowhere to report that standard error is gone.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    fn flush(&self) {}
}

/// Sends messages to standard error from now on.
pub fn start(level: LevelFilter) {
    let logger = Box::new(Logger(Mutex::new(Limit::new(Instant::now()))));
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floods_are_cut_and_counted() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        for _ in 0..BURST {
            assert_eq!(limit.admit(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.admit(start), None);
        }
        let later = start + REFILL;
        assert_eq!(limit.admit(later), Some(1000));
        assert_eq!(limit.admit(later), None);
    }
}
