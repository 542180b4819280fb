//! I/O limits: operations and bytes per second, with bursts, per disk.
//!
//! The model is QEMU's (its docs/throttle.txt): a bucket that what is done fills and time empties at the
//! permitted rate. A request may start while the bucket is not overfull, whatever its own size. Without a
//! burst rate the bucket holds a tenth of a second's worth. With one (`-max`, for `-max-length` seconds)
//! it holds that much, and a second bucket keeps the burst itself to its rate.
//!
//! Flushes move no data and are not limited; discards and write-zeroes count as writes of no bytes. Reads
//! and writes do not wait for each other. The threads of a disk take turns of a few requests, and a thread
//! takes its queues in turn. A drain is not held up: what is delayed then starts at once.

use crate::clock::Clock;
use crate::disk::{Finished, Port, Submission};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use crate::queue::worker::queue_of;
use exd_image::Request;
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests in a turn.
const TURN: u32 = 8;
/// Largest rate that is believed.
const RATE_MAX: u64 = 1 << 50;

/// One limit. All zero: none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limit {
    /// Units per second in the long run.
    pub rate: u64,
    /// Units per second in a burst; 0: no bursts.
    pub max: u64,
    /// Seconds of a burst; 0 means 1.
    pub max_length: u64,
}

/// The limits of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Operations: all, reads, writes.
    pub iops: [Limit; 3],
    /// Bytes: all, reads, writes.
    pub bps: [Limit; 3],
    /// A request counts as one operation for each so many bytes of it, and for the rest; 0: as one.
    pub iops_size: u64,
}

const DIRECTIONS: [&str; 3] = ["total", "read", "write"];

impl Limits {
    /// Nothing is limited.
    pub fn is_none(&self) -> bool {
        self.iops.iter().chain(&self.bps).all(|limit| limit.rate == 0)
    }

    /// The number with this name in QEMU's throttling options.
    fn field(&mut self, key: &str) -> Option<&mut u64> {
        if key == "iops-size" {
            return Some(&mut self.iops_size);
        }
        let (limits, rest) = match key.strip_prefix("iops-") {
            Some(rest) => (&mut self.iops, rest),
            None => (&mut self.bps, key.strip_prefix("bps-")?),
        };
        let (direction, kind) = rest.split_once('-').unwrap_or((rest, ""));
        let limit = &mut limits[DIRECTIONS.iter().position(|name| *name == direction)?];
        match kind {
            "" => Some(&mut limit.rate),
            "max" => Some(&mut limit.max),
            "max-length" => Some(&mut limit.max_length),
            _ => None,
        }
    }

    fn check(&self) -> Result<(), String> {
        for limits in [&self.iops, &self.bps] {
            let [total, read, write] = limits;
            if total.rate > 0 && (read.rate > 0 || write.rate > 0) {
                return Err("a total and a limit of one direction exclude each other".to_owned());
            }
            for limit in limits {
                if limit.rate > RATE_MAX || limit.max > RATE_MAX {
                    return Err(format!("a rate is above {RATE_MAX}"));
                }
                if limit.max > 0 && limit.rate == 0 {
                    return Err("-max needs the rate in the long run".to_owned());
                }
                if limit.max > 0 && limit.max < limit.rate {
                    return Err("-max is below the rate in the long run".to_owned());
                }
                if limit.max_length > 0 && limit.max == 0 {
                    return Err("-max-length needs -max".to_owned());
                }
                if limit.max_length > 1_000_000 {
                    return Err("-max-length is above 1000000 seconds".to_owned());
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Limits {
    /// What makes the same limits when it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut show = |key: &str, value: u64| {
            if value == 0 {
                return Ok(());
            }
            write!(f, "{separator}{key}={value}")?;
            separator = ",";
            Ok(())
        };
        for (unit, limits) in [("iops", &self.iops), ("bps", &self.bps)] {
            for (direction, limit) in DIRECTIONS.iter().zip(limits) {
                show(&format!("{unit}-{direction}"), limit.rate)?;
                show(&format!("{unit}-{direction}-max"), limit.max)?;
                show(&format!("{unit}-{direction}-max-length"), limit.max_length)?;
            }
        }
        show("iops-size", self.iops_size)
    }
}

impl FromStr for Limits {
    type Err = String;

    /// `iops-total=1000,bps-read=50000000`; empty: none.
    fn from_str(text: &str) -> Result<Limits, String> {
        let mut limits = Limits::default();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or(format!("no '=' in '{pair}'"))?;
            let field = limits.field(key).ok_or(format!("unknown limit '{key}'"))?;
            *field = value.parse().map_err(|_| format!("'{value}' is no number"))?;
        }
        limits.check()?;
        Ok(limits)
    }
}

/// How full a limit's buckets are, in units.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    limit: Limit,
    level: f64,
    burst: f64,
}

impl Bucket {
    fn leak(&mut self, seconds: f64) {
        self.level = (self.level - self.limit.rate as f64 * seconds).max(0.0);
        self.burst = (self.burst - self.limit.max as f64 * seconds).max(0.0);
    }

    /// Seconds until a request may start.
    fn wait(&self) -> f64 {
        let Limit { rate, max, max_length } = self.limit;
        if rate == 0 {
            return 0.0;
        }
        let (rate, max) = (rate as f64, max as f64);
        if max == 0.0 {
            return ((self.level - rate / 10.0) / rate).max(0.0);
        }
        let length = max_length.max(1) as f64;
        let long = (self.level - max * length) / rate;
        let short = (self.burst - max / 10.0) / max;
        long.max(short).max(0.0)
    }

    fn fill(&mut self, units: u64) {
        self.level += units as f64;
        self.burst += units as f64;
    }
}

/// Which way a request moves data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Read,
    Write,
}

/// What a request costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cost {
    direction: Direction,
    bytes: u64,
}

/// `None` for what is not limited.
fn cost(request: &Request) -> Option<Cost> {
    match request {
        Request::Read { len, .. } => Some(Cost { direction: Direction::Read, bytes: *len }),
        Request::Write { len, .. } => Some(Cost { direction: Direction::Write, bytes: *len }),
        Request::Discard { .. } | Request::WriteZeroes { .. } => {
            Some(Cost { direction: Direction::Write, bytes: 0 })
        }
        _ => None,
    }
}

/// Decides when requests start. Shared by the threads of a disk.
#[derive(Debug)]
pub struct Limiter {
    clock: Arc<Clock>,
    active: AtomicBool,
    state: Mutex<State>,
    next_id: AtomicU64,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    iops: [Bucket; 3],
    bps: [Bucket; 3],
    leaked: Instant,
    /// For each direction.
    turns: [Turns; 2],
}

/// Whose turn it is.
#[derive(Debug, Default)]
struct Turns {
    /// Threads that wait; the first one has the turn.
    queue: VecDeque<(u64, Arc<Event>)>,
    /// Requests started in this turn.
    started: u32,
}

impl Default for Limiter {
    fn default() -> Self {
        Limiter::new(Arc::default())
    }
}

impl Limiter {
    /// Without limits so far.
    pub fn new(clock: Arc<Clock>) -> Limiter {
        let state = State {
            limits: Limits::default(),
            iops: Default::default(),
            bps: Default::default(),
            leaked: Instant::now(),
            turns: Default::default(),
        };
        Limiter {
            clock,
            active: AtomicBool::new(false),
            state: Mutex::new(state),
            next_id: AtomicU64::new(0),
        }
    }

    /// Other limits from now on.
    pub fn set(&self, limits: Limits) {
        let mut state = self.state();
        state.limits = limits;
        let fresh = |limits: [Limit; 3]| limits.map(|limit| Bucket { limit, ..Bucket::default() });
        (state.iops, state.bps) = (fresh(limits.iops), fresh(limits.bps));
        state.leaked = Instant::now();
        self.active.store(!limits.is_none(), Ordering::Release);
        for (_, event) in state.turns.iter().flat_map(|turns| &turns.queue) {
            event.signal();
        }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request of thread `id` may start now. If not, `event` is signalled when it is worth
    /// asking again, or [`Limiter::leave`] is called.
    fn admit(&self, id: u64, event: &Arc<Event>, cost: Cost, now: Instant) -> bool {
        let mut state = self.state();
        if state.limits.is_none() {
            return true;
        }
        let State { limits, iops, bps, leaked, turns } = &mut *state;
        let turns = &mut turns[cost.direction as usize];
        if !turns.has(id) {
            turns.join(id, event);
            return false;
        }
        let seconds = now.saturating_duration_since(*leaked).as_secs_f64();
        *leaked = now.max(*leaked);
        for bucket in iops.iter_mut().chain(bps.iter_mut()) {
            bucket.leak(seconds);
        }
        let direction = 1 + cost.direction as usize;
        let buckets = [&iops[0], &iops[direction], &bps[0], &bps[direction]];
        let wait = buckets.into_iter().map(Bucket::wait).fold(0.0, f64::max);
        if wait > 0.0 {
            turns.join(id, event);
            // A rate of 1 per second and a request of 4 GiB: days, but no overflow.
            let pause = Duration::try_from_secs_f64(wait.min(86400.0)).unwrap_or(Duration::ZERO);
            self.clock.wake_at(now + pause, event);
            return false;
        }
        let operations = match limits.iops_size {
            0 => 1,
            size => cost.bytes.div_ceil(size).max(1),
        };
        for number in [0, direction] {
            iops[number].fill(operations);
            bps[number].fill(cost.bytes);
        }
        turns.started += 1;
        if turns.started >= TURN {
            turns.leave(id);
        }
        true
    }

    /// Thread `id` has nothing to start in this direction any more.
    fn leave(&self, id: u64, direction: Direction) {
        self.state().turns[direction as usize].leave(id);
    }
}

impl Turns {
    /// Nobody has a better right.
    fn has(&self, id: u64) -> bool {
        self.queue.front().is_none_or(|(first, _)| *first == id)
    }

    fn join(&mut self, id: u64, event: &Arc<Event>) {
        if !self.queue.iter().any(|(known, _)| *known == id) {
            self.queue.push_back((id, event.clone()));
        }
    }

    /// Ends the turn or the waiting of thread `id`.
    fn leave(&mut self, id: u64) {
        if self.has(id) {
            self.started = 0;
            self.queue.pop_front();
            if let Some((_, event)) = self.queue.front() {
                event.signal();
            }
        } else {
            self.queue.retain(|(known, _)| *known != id);
        }
    }
}

/// See the module.
pub struct LimitPort {
    port: Box<dyn Port>,
    limiter: Arc<Limiter>,
    event: Arc<Event>,
    id: u64,
    /// What may not start yet: reads, writes.
    delayed: [Delayed; 2],
    count: usize,
    batch: Vec<Submission>,
    hurry: bool,
}

/// Requests by queue. The queue in front is the next to start one.
type Delayed = VecDeque<(u16, VecDeque<Submission>)>;

const BOTH: [Direction; 2] = [Direction::Read, Direction::Write];

impl LimitPort {
    /// Around `port`.
    pub fn new(port: Box<dyn Port>, limiter: Arc<Limiter>, event: Arc<Event>) -> LimitPort {
        LimitPort {
            port,
            id: limiter.next_id.fetch_add(1, Ordering::Relaxed),
            limiter,
            event,
            delayed: Default::default(),
            count: 0,
            batch: Vec::new(),
            hurry: false,
        }
    }

    fn delay(&mut self, submission: Submission, direction: Direction) {
        let queue = queue_of(submission.id);
        let delayed = &mut self.delayed[direction as usize];
        let position = delayed.iter().position(|(number, _)| *number == queue);
        let position = position.unwrap_or_else(|| {
            delayed.push_back((queue, VecDeque::new()));
            delayed.len() - 1
        });
        delayed[position].1.push_back(submission);
        self.count += 1;
    }

    /// Starts what may start. False if that is nothing.
    fn start(&mut self, finished: &mut Vec<Finished>) -> bool {
        let now = Instant::now();
        for direction in BOTH {
            self.select(direction, now);
        }
        let any = !self.batch.is_empty();
        if any {
            self.port.submit(&mut self.batch, finished);
        }
        any
    }

    /// Makes what may start in one direction part of the batch.
    fn select(&mut self, direction: Direction, now: Instant) {
        let delayed = &mut self.delayed[direction as usize];
        if delayed.is_empty() {
            return;
        }
        while let Some((_, requests)) = delayed.front_mut() {
            let Some(request) = requests.front() else {
                delayed.pop_front();
                continue;
            };
            let admitted = self.hurry
                || cost(&request.request)
                    .is_none_or(|cost| self.limiter.admit(self.id, &self.event, cost, now));
            if !admitted {
                return;
            }
            self.batch.extend(requests.pop_front());
            self.count -= 1;
            delayed.rotate_left(1);
        }
        self.limiter.leave(self.id, direction);
    }
}

impl Port for LimitPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        if self.count == 0 && !self.limiter.active.load(Ordering::Acquire) {
            self.port.submit(batch, finished);
            return;
        }
        for submission in batch.drain(..) {
            match cost(&submission.request) {
                None => self.batch.push(submission),
                Some(cost) => self.delay(submission, cost.direction),
            }
        }
        self.start(finished);
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let progress = self.port.reap(finished);
        if self.count == 0 {
            return progress;
        }
        self.start(finished) || progress
    }

    fn intercept(&mut self, finished: &mut Vec<Finished>) {
        self.port.intercept(finished);
    }

    fn hurry(&mut self, hurry: bool) {
        self.hurry = hurry;
        self.port.hurry(hurry);
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        self.port.lone_calls()
    }

    fn unfinished(&self) -> usize {
        self.port.unfinished() + self.count
    }
}

impl Drop for LimitPort {
    fn drop(&mut self) {
        for direction in BOTH {
            self.limiter.leave(self.id, direction);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::policy::tests::{ScriptPort, submission};

    fn read(len: u64) -> Request {
        Request::Read { offset: 0, len }
    }

    #[test]
    fn what_is_shown_can_be_said() {
        for text in [
            "",
            "iops-total=1000",
            "iops-read=10,iops-read-max=20,iops-read-max-length=3,bps-write=4096,iops-size=512",
        ] {
            let limits: Limits = text.parse().expect("valid");
            assert_eq!(limits.to_string(), text);
        }
    }

    #[test]
    fn names_and_contradictions() {
        let limits: Limits =
            "iops-total=100,iops-total-max=200,iops-total-max-length=5,bps-read=4096,iops-size=512"
                .parse()
                .expect("valid");
        assert_eq!(limits.iops[0], Limit { rate: 100, max: 200, max_length: 5 });
        assert_eq!(limits.bps[1].rate, 4096);
        assert_eq!(limits.iops_size, 512);
        assert!("".parse::<Limits>().expect("valid").is_none());
        for wrong in [
            "iops-total",
            "iops-total=x",
            "iops-both=1",
            "iops-total-min=1",
            "iops-total=1,iops-read=1",
            "iops-total-max=1",
            "iops-total=10,iops-total-max=1",
            "iops-total=1,iops-total-max-length=1",
        ] {
            assert!(wrong.parse::<Limits>().is_err(), "{wrong}");
        }
    }

    /// Starts as many requests as a greedy thread can in `seconds`, by a clock of the test's own.
    fn started_in(limiter: &Limiter, cost: Cost, begun: Instant, seconds: u64) -> u64 {
        let event = Arc::new(Event::new().expect("event"));
        let mut started = 0;
        for millisecond in 0..seconds * 1000 {
            let now = begun + Duration::from_millis(millisecond);
            while limiter.admit(1, &event, cost, now) {
                started += 1;
            }
        }
        limiter.leave(1, cost.direction);
        started
    }

    #[test]
    fn rates_and_bursts() {
        let limiter = Limiter::default();
        let one = Cost { direction: Direction::Write, bytes: 4096 };
        let begun = Instant::now() + Duration::from_secs(1);
        limiter.set("iops-write=100".parse().expect("valid"));
        // The bucket in the beginning, and the rate.
        let started = started_in(&limiter, one, begun, 10);
        assert!((1000..=1012).contains(&started), "{started}");
        // Reads are not limited by that.
        let event = Arc::new(Event::new().expect("event"));
        let read = Cost { direction: Direction::Read, bytes: 4096 };
        assert!((0..5000).all(|_| limiter.admit(1, &event, read, begun + Duration::from_secs(10))));

        limiter.set("bps-total=409600".parse().expect("valid"));
        let started = started_in(&limiter, one, begun, 10);
        assert!((1000..=1012).contains(&started), "{started}");

        // Five seconds at 1000, then 100.
        let burst = "iops-total=100,iops-total-max=1000,iops-total-max-length=5";
        limiter.set(burst.parse().expect("valid"));
        let started = started_in(&limiter, one, begun, 5);
        assert!((5000..=5102).contains(&started), "{started}");
        let later = started_in(&limiter, one, begun + Duration::from_secs(5), 10);
        assert!((1000..=1600).contains(&later), "{later}");

        // Large requests count for more than one.
        limiter.set("iops-total=100,iops-size=1024".parse().expect("valid"));
        let started = started_in(&limiter, one, begun, 10);
        assert!((250..=254).contains(&started), "{started}");
    }

    #[test]
    fn threads_take_turns() {
        let limiter = Limiter::default();
        limiter.set("iops-total=1000".parse().expect("valid"));
        let event = Arc::new(Event::new().expect("event"));
        let cost = Cost { direction: Direction::Read, bytes: 512 };
        let begun = Instant::now() + Duration::from_secs(1);
        let mut started = [0u32; 2];
        for millisecond in 0..2000 {
            let now = begun + Duration::from_millis(millisecond);
            for (id, started) in started.iter_mut().enumerate() {
                // The first is greedier than the second can ever be.
                let tries = if id == 0 { 100 } else { 1 };
                for _ in 0..tries {
                    *started += u32::from(limiter.admit(id as u64, &event, cost, now));
                }
            }
        }
        let [a, b] = started;
        assert!(b * 3 > a, "{a} and {b}");
    }

    fn port(limiter: &Arc<Limiter>) -> (ScriptPort, LimitPort) {
        let script = ScriptPort::default();
        let event = Arc::new(Event::new().expect("event"));
        let port = LimitPort::new(Box::new(script.clone()), limiter.clone(), event);
        (script, port)
    }

    #[test]
    fn what_is_delayed_starts_later_and_flushes_pass() {
        let limiter = Arc::new(Limiter::default());
        // A request a minute.
        limiter.set("bps-total=1".parse().expect("valid"));
        let (script, mut port) = port(&limiter);
        let mut batch: Vec<_> = (0..3).map(|id| submission(id, read(60))).collect();
        batch.push(submission(9, Request::Flush));
        port.submit(&mut batch, &mut Vec::new());
        let seen: Vec<u64> = script.take().into_iter().map(|(id, _)| id.0).collect();
        assert_eq!(seen, [9, 0]);
        assert_eq!(port.unfinished(), 2);
        assert!(!port.reap(&mut Vec::new()));
        // Limits may be lifted.
        limiter.set(Limits::default());
        port.reap(&mut Vec::new());
        assert_eq!(script.take().len(), 2);
        assert_eq!(port.unfinished(), 0);
    }

    #[test]
    fn a_drain_does_not_wait() {
        let limiter = Arc::new(Limiter::default());
        limiter.set("iops-total=1".parse().expect("valid"));
        let (script, mut port) = port(&limiter);
        let mut batch: Vec<_> = (0..50).map(|id| submission(id, read(512))).collect();
        port.submit(&mut batch, &mut Vec::new());
        assert!(port.unfinished() > 40);
        port.hurry(true);
        port.reap(&mut Vec::new());
        assert_eq!(port.unfinished(), 0);
        assert_eq!(script.take().len(), 50);
    }

    #[test]
    fn queues_take_turns() {
        let limiter = Arc::new(Limiter::default());
        limiter.set("iops-total=10".parse().expect("valid"));
        let (script, mut port) = port(&limiter);
        // Queue 0 has many, queue 1 has one.
        let mut batch: Vec<_> = (0..20).map(|id| submission(id, read(512))).collect();
        batch.push(submission(1 << 16, read(512)));
        port.submit(&mut batch, &mut Vec::new());
        let seen = script.take();
        assert!(seen.len() < 10);
        assert_eq!(seen[1].0.0, 1 << 16);
    }
}
