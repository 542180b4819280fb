//! One run of one workload on one target, from the preparation of the image to the end of the back-end.

use crate::Result;
use crate::backend::{Backend, Closed, Target, create, write_fully};
use crate::client::{Connection, Op};
use crate::drive::{self, Order, Outcome, Pattern};
use crate::measure::{self, Cost, Counters, Device, wait_until_idle};
use crate::stats::Latencies;
use crate::trace::{self, Trace};
use crate::workload::{Body, State, Workload};
use exd_guest_tests::{Programs, process};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The engine looks for work every 100 ms; a pause longer than that is its end.
const QUIET_OWN: Duration = Duration::from_millis(130);
const QUIET: Duration = Duration::from_millis(16);
/// Requests in flight while an image is filled.
const FILL_DEPTH: usize = 16;
/// Bytes of each request then.
const FILL_LEN: usize = 1 << 20;
/// Largest range of a discard while an image is prepared.
const DISCARD_LEN: u64 = 64 << 20;
/// Requests in flight in a replay.
const TRACE_DEPTH: usize = 32;
/// Largest request of a replay; longer ones are cut.
const TRACE_SLOT: usize = 1 << 20;

/// What a run has shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Name of the workload.
    pub workload: String,
    /// Who.
    pub target: Target,
    /// Number of the run.
    pub run: usize,
    /// Requests, flushes not counted.
    pub ops: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Seconds from the first request until the final flush has ended and background work is idle.
    pub seconds: f64,
    /// Seconds until the final flush has ended.
    pub foreground_seconds: f64,
    /// What the machine spent.
    pub cost: Cost,
    /// The end of the back-end.
    pub closed: Closed,
    /// Latency of requests, microseconds: median, 99 %, 99.9 %.
    pub latency: [f64; 3],
    /// Latency of flushes.
    pub flush_latency: [f64; 3],
    /// Most memory that the back-end had, in bytes.
    #[serde(default)]
    pub memory: u64,
    /// Where the time of the run went.
    #[serde(default)]
    pub spent: Spent,
}

/// Wall-clock seconds of a run, beside those that are measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Spent {
    /// Making the image and bringing it into its first state, and cleaning up.
    pub preparation: f64,
    /// All of it.
    pub all: f64,
}

impl Sample {
    /// One of a thousand requests of 4 KiB, for tests of what is made from samples.
    #[cfg(test)]
    pub(crate) fn example(workload: &str, target: Target, run: usize, seconds: f64) -> Sample {
        let latency = serde_json::json!({ "p999_us_max": 1000 });
        let write = serde_json::json!({
            "latency_in_checkpoints": latency, "latency_outside_checkpoints": latency
        });
        let statistics = serde_json::json!({ "syncs": 10, "queues": [{ "write": write }] });
        Sample {
            workload: workload.to_owned(),
            target,
            run,
            ops: 1000,
            bytes: 1000 << 12,
            flushes: 10,
            seconds,
            foreground_seconds: seconds,
            cost: Cost { daemon_cpu: 0.5, ..Cost::default() },
            closed: Closed { statistics: Some(statistics), ..Closed::default() },
            latency: [1.0; 3],
            flush_latency: [1.0; 3],
            memory: 1 << 20,
            spent: Spent::default(),
        }
    }

    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.ops as f64 / self.seconds.max(1e-9)
    }

    /// CPU time of the back-end per request, microseconds.
    pub fn daemon_cpu(&self) -> f64 {
        self.cost.daemon_cpu * 1e6 / self.ops.max(1) as f64
    }

    /// A number of vhost-daemon's statistics.
    pub fn statistic(&self, name: &str) -> Option<u64> {
        self.closed.statistics.as_ref()?.get(name)?.as_u64()
    }
}

/// How long runs may be.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Targets other than EXD stop after this time, and EXD where no pool of zeroes is involved: their
    /// rate is steady, and all of them would take hours.
    pub limit: Duration,
    /// Numbers of requests are divided by this.
    pub divisor: u64,
}

/// Where runs take place, and the images that are kept between them.
pub struct Session {
    programs: Programs,
    dir: PathBuf,
    memory: PathBuf,
    device: Device,
    trace: Option<Trace>,
    extent: Extent,
    /// Further arguments of vhost-daemon.
    daemon_args: Vec<String>,
    kept: HashSet<PathBuf>,
}

/// How to make a session.
pub struct Place<'a> {
    /// The directory for the images.
    pub dir: &'a Path,
    /// A directory in memory.
    pub memory: &'a Path,
}

impl Session {
    /// A session without images.
    pub fn new(
        programs: Programs,
        place: Place<'_>,
        trace: Option<Trace>,
        extent: Extent,
        daemon_args: Vec<String>,
    ) -> Result<Session> {
        Ok(Session {
            programs,
            device: Device::of(place.dir)?,
            dir: place.dir.to_owned(),
            memory: place.memory.to_owned(),
            trace,
            extent,
            daemon_args,
            kept: HashSet::new(),
        })
    }

    /// The device under the images.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Runs a workload once on one target.
    pub fn run(&mut self, workload: &Workload, target: Target, run: usize) -> Result<Sample> {
        let context = |error: crate::Error| {
            format!("{} on {}, run {}: {error}", workload.name, target.name(), run + 1)
        };
        let begun = Instant::now();
        let path = self.prepare(workload, target).map_err(context)?;
        let prepared = begun.elapsed();
        let mut sample = self.measure(workload, target, run, &path).map_err(context)?;
        let measured = Instant::now();
        if target.is_full() {
            self.restore(workload, &path).map_err(context)?;
        } else if !self.kept.contains(&path) {
            fs::remove_file(&path)?;
        }
        sample.spent = Spent {
            preparation: (prepared + measured.elapsed()).as_secs_f64(),
            all: begun.elapsed().as_secs_f64(),
        };
        Ok(sample)
    }

    /// Removes the images that only one workload uses, when it is over.
    pub fn forget(&mut self, workload: &Workload) -> Result<()> {
        if matches!(workload.state, State::FilledAtRandom | State::Defragmented | State::Recycled)
            || workload.in_memory
        {
            for target in Target::ALL {
                let path = self.path(workload, target);
                if self.kept.remove(&path) {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    fn path(&self, workload: &Workload, target: Target) -> PathBuf {
        let dir = if workload.in_memory { &self.memory } else { &self.dir };
        // The two targets on a full raw file use the same one.
        let name = if target.is_full() { "full" } else { target.name() };
        let state = match workload.state {
            _ if target.is_full() => "written",
            State::Fresh => "fresh",
            State::Filled => "filled",
            State::FilledAtRandom => "random",
            State::Defragmented => "defragmented",
            State::FilledOnce => "once",
            State::Recycled => "recycled",
        };
        dir.join(format!("{name}-{state}"))
    }

    /// Makes the image and brings it into the state the workload begins with.
    fn prepare(&mut self, workload: &Workload, target: Target) -> Result<PathBuf> {
        let path = self.path(workload, target);
        let is_new = !self.kept.contains(&path);
        if is_new {
            if path.exists() {
                fs::remove_file(&path)?;
            }
            create(&self.programs, target, &path, workload.shape)?;
        }
        let keep = !matches!(workload.state, State::Fresh | State::FilledOnce);
        if keep || target.is_full() {
            self.kept.insert(path.clone());
        }
        if target.is_full() || workload.state == State::Fresh {
            return Ok(path);
        }
        if !is_new && workload.state != State::Recycled {
            return Ok(path);
        }
        let backend = Backend::start(&self.programs, target, &path, 1, &[])?;
        let mut connection = Connection::open(backend.socket(), 1, FILL_DEPTH, FILL_LEN)?;
        let queue = &mut connection.queues[0];
        let span = workload.shape.span;
        if is_new {
            let (len, order) = match workload.state {
                State::FilledAtRandom | State::Defragmented => (4096, Order::Random),
                _ => (FILL_LEN, Order::Sequential),
            };
            drive::fill(queue, span, len, order)?;
        }
        if workload.state == State::Recycled {
            for at in (0..span).step_by(DISCARD_LEN as usize) {
                queue.carry_out(0, Op::Discard(at, DISCARD_LEN.min(span - at)))?;
            }
            queue.carry_out(0, Op::Flush)?;
        }
        wait_until_idle(backend.pid(), QUIET_OWN);
        drop(connection);
        backend.close()?;
        if workload.state == State::Defragmented {
            let mut defrag = Command::new(&self.programs.imgtool);
            process::output(defrag.arg("defrag").arg(&path))?;
        }
        Ok(path)
    }

    /// A full file after a workload that zeroes or discards: writes there again.
    fn restore(&self, workload: &Workload, path: &Path) -> Result<()> {
        let Some(trace) = self.trace_for(workload) else { return Ok(()) };
        for (start, end) in trace.cleared() {
            write_fully(path, start, end)?;
        }
        Ok(())
    }

    fn trace_for(&self, workload: &Workload) -> Option<Trace> {
        match workload.body {
            Body::Trace(start) => self.trace.as_ref().map(|trace| trace.shifted(start)),
            Body::Pattern(_) => None,
        }
    }

    /// Requests of the pattern in this session.
    fn scaled(&self, pattern: Pattern) -> Pattern {
        Pattern { ops: (pattern.ops / self.extent.divisor).max(1), ..pattern }
    }

    fn measure(
        &self,
        workload: &Workload,
        target: Target,
        run: usize,
        path: &Path,
    ) -> Result<Sample> {
        let trace = self.trace_for(workload);
        let queues = match workload.body {
            Body::Pattern(pattern) => pattern.queues,
            Body::Trace(_) => 1,
        };
        let backend = Backend::start(&self.programs, target, path, queues, &self.daemon_args)?;
        let pid = backend.pid();
        let (depth, slot) = match workload.body {
            Body::Pattern(pattern) => (pattern.depth / pattern.queues, pattern.len),
            Body::Trace(_) => (TRACE_DEPTH, TRACE_SLOT),
        };
        let mut connection = Connection::open(backend.socket(), queues, depth, slot)?;
        let before = Counters::read(pid, &self.device);
        let begun = Instant::now();
        let done = match (&workload.body, &trace) {
            (Body::Pattern(pattern), _) => {
                self.run_pattern(&mut connection, workload, target, self.scaled(*pattern))?
            }
            (Body::Trace(_), Some(trace)) => run_trace(&mut connection, trace)?,
            (Body::Trace(_), None) => return Err("no trace was read".into()),
        };
        connection.queues[0].carry_out(0, Op::Flush)?;
        let foreground = begun.elapsed();
        let quiet = if target == Target::Exd { QUIET_OWN } else { QUIET };
        let idle = wait_until_idle(pid, quiet);
        let seconds = idle.duration_since(begun).max(foreground).as_secs_f64();
        let cost = Counters::read(pid, &self.device).since(&before);
        let memory = measure::memory(pid);
        done.verify(&mut connection, workload, target, run)?;
        drop(connection);
        let closed = backend.close()?;
        let quantiles =
            |latencies: &Latencies| [0.5, 0.99, 0.999].map(|share| latencies.quantile(share));
        Ok(Sample {
            workload: workload.name.to_owned(),
            target,
            run,
            ops: done.outcome.ops,
            bytes: done.bytes,
            flushes: done.outcome.flushes + 1,
            seconds,
            foreground_seconds: foreground.as_secs_f64(),
            cost,
            closed,
            latency: quantiles(&done.outcome.requests),
            flush_latency: quantiles(&done.outcome.flush_times),
            memory,
            spent: Spent::default(),
        })
    }

    fn run_pattern(
        &self,
        connection: &mut Connection,
        workload: &Workload,
        target: Target,
        pattern: Pattern,
    ) -> Result<Done> {
        let complete =
            target == Target::Exd && matches!(workload.state, State::Fresh | State::Recycled);
        let limit = if complete { Duration::from_secs(120) } else { self.extent.limit };
        let outcomes: Vec<Result<Outcome>> = std::thread::scope(|scope| {
            let queues = connection.queues.iter_mut().enumerate();
            let threads: Vec<_> = queues
                .map(|(number, queue)| {
                    scope.spawn(move || drive::run(queue, number, &pattern, limit))
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Outcome>>| {
                thread.join().unwrap_or_else(|_| Err("a client thread failed".into()))
            };
            threads.into_iter().map(join).collect()
        });
        let mut all = Outcome::default();
        for outcome in outcomes {
            let outcome = outcome?;
            all.ops += outcome.ops;
            all.flushes += outcome.flushes;
            all.requests.merge(&outcome.requests);
            all.flush_times.merge(&outcome.flush_times);
            all.samples.extend(outcome.samples);
        }
        let bytes = all.ops * pattern.len as u64;
        Ok(Done { outcome: all, bytes, pattern: Some(pattern), expected: None })
    }
}

/// What a run leaves to be verified.
struct Done {
    outcome: Outcome,
    bytes: u64,
    pattern: Option<Pattern>,
    expected: Option<trace::Expected>,
}

impl Done {
    /// Reads back what was written: everything after the trace, samples of patterns. The others than EXD
    /// only once.
    fn verify(
        &self,
        connection: &mut Connection,
        workload: &Workload,
        target: Target,
        run: usize,
    ) -> Result<()> {
        if target != Target::Exd && run > 0 {
            return Ok(());
        }
        let queue = &mut connection.queues[0];
        if let Some(expected) = &self.expected {
            expected.verify(queue)?;
        }
        match &self.pattern {
            Some(pattern) if workload.state != State::FilledOnce => {
                drive::check_samples(queue, pattern, &self.outcome.samples)
            }
            _ => Ok(()),
        }
    }
}

fn run_trace(connection: &mut Connection, trace: &Trace) -> Result<Done> {
    let mut outcome = Outcome::default();
    let queue = &mut connection.queues[0];
    let expected = trace::replay(queue, trace, &mut outcome.flush_times)?;
    let (bytes, flushes) = trace.totals();
    outcome.flushes = flushes;
    outcome.ops = trace.steps.len() as u64 - flushes;
    Ok(Done { outcome, bytes, pattern: None, expected: Some(expected) })
}
