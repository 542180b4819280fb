//! Traces of block requests: reading them, replaying them, and verifying what a replay has left.
//!
//! A trace is text. Lines begin with `#` (comment), `R` (read), `W` (write), `Z` (write zeroes) or `D`
//! (discard), each with first sector and number of sectors, or `F` (flush). In traces of version 1, which
//! begin with nothing else, a flush waits for everything before it and completes before the next line
//! starts. In version 2, which begins with a line `V 2`, a line `E n` says that request number n, counted
//! from 0, ended before the next one started: the replay keeps that order, and whatever was in flight
//! together may be in flight together again.

use crate::Result;
use crate::client::{Op, Queue};
use crate::stats::Latencies;
use exd_guest_tests::programs;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const SECTOR: u64 = 512;
/// Sectors below this one hold the partition table and stay where they are in a shifted replay.
const PARTITION: u64 = 2048;
/// Longer writes are cut: more than any front-end puts in one request.
const WRITE_MAX: u64 = 4 << 20;
/// Longer ranges are cut, in sectors: what qemu-storage-daemon takes at once.
const RANGE_MAX: u64 = 32 << 10;
/// Reads under way for the verification.
const VERIFY_DEPTH: usize = 8;
/// Bytes of each.
const VERIFY_STEP: u64 = 1 << 20;

/// What a line asks for, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read.
    Read(u64, u64),
    /// Write.
    Write(u64, u64),
    /// Write zeroes.
    Zero(u64, u64),
    /// Discard.
    Discard(u64, u64),
    /// Flush.
    Flush,
}

/// A request with what must have ended before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The request.
    pub request: Request,
    /// Numbers of requests that end before this one starts and were not named before.
    pub after: Vec<usize>,
    /// All requests before it end before it starts.
    pub alone: bool,
}

/// A recorded sequence of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The requests in the order of their start.
    pub steps: Vec<Step>,
    /// Requests that the recorder could not keep.
    pub missing: u64,
}

impl Trace {
    /// Reads a file, unpacking it if its name ends in `.xz`.
    pub fn read(path: &Path) -> Result<Trace> {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        if path.extension().is_some_and(|extension| extension == "xz") {
            let output = Command::new(programs::find("xz")?).arg("-dc").arg(path).output()?;
            if !output.status.success() {
                return Err(failed(&String::from_utf8_lossy(&output.stderr)).into());
            }
            return Trace::parse(&String::from_utf8(output.stdout)?);
        }
        let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
        Trace::parse(&text)
    }

    /// Reads a trace's text.
    pub fn parse(text: &str) -> Result<Trace> {
        let mut trace = Trace::default();
        let mut with_ends = false;
        let mut after = Vec::new();
        let mut alone = false;
        for (index, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let Some(kind) = words.next() else { continue };
            if kind.starts_with('#') {
                continue;
            }
            let numbers: Vec<u64> = words.map(str::parse).collect::<std::result::Result<_, _>>()?;
            let request = match (kind, &numbers[..]) {
                ("V", [2]) if trace.steps.is_empty() => {
                    with_ends = true;
                    continue;
                }
                ("E", [number]) if with_ends && (*number as usize) < trace.steps.len() => {
                    after.push(*number as usize);
                    continue;
                }
                ("M", [count]) if with_ends => {
                    trace.missing += count;
                    continue;
                }
                ("R", [sector, count]) => Request::Read(*sector, *count),
                ("W", [sector, count]) => Request::Write(*sector, *count),
                ("Z", [sector, count]) => Request::Zero(*sector, *count),
                ("D", [sector, count]) => Request::Discard(*sector, *count),
                ("F", []) => Request::Flush,
                _ => return Err(format!("line {}: not a request: {line}", index + 1).into()),
            };
            let flush = request == Request::Flush && !with_ends;
            let step = Step { request, after: std::mem::take(&mut after), alone: alone || flush };
            trace.steps.push(step);
            alone = flush;
        }
        Ok(trace)
    }

    /// The trace for a partition that begins at sector `start` instead of 2048.
    pub fn shifted(&self, start: u64) -> Trace {
        let moved = |sector: u64| {
            if sector >= PARTITION { sector - PARTITION + start } else { sector }
        };
        let mut trace = self.clone();
        for step in &mut trace.steps {
            step.request = match step.request {
                Request::Read(sector, count) => Request::Read(moved(sector), count),
                Request::Write(sector, count) => Request::Write(moved(sector), count),
                Request::Zero(sector, count) => Request::Zero(moved(sector), count),
                Request::Discard(sector, count) => Request::Discard(moved(sector), count),
                Request::Flush => Request::Flush,
            };
        }
        trace
    }

    /// Bytes up to the end of the last sector named.
    pub fn span(&self) -> u64 {
        let ends = self.steps.iter().filter_map(|step| step.request.range());
        ends.map(|(start, count)| start.saturating_add(count)).max().unwrap_or(0) * SECTOR
    }

    /// Bytes written, and number of flushes.
    pub fn totals(&self) -> (u64, u64) {
        let mut totals = (0, 0);
        for step in &self.steps {
            match step.request {
                Request::Write(_, count) => totals.0 += count * SECTOR,
                Request::Flush => totals.1 += 1,
                _ => {}
            }
        }
        totals
    }

    /// Ranges that are zeroed or discarded, in bytes.
    pub fn cleared(&self) -> Vec<(u64, u64)> {
        let clears = self.steps.iter().filter_map(|step| match step.request {
            Request::Zero(sector, count) | Request::Discard(sector, count) => {
                Some((sector * SECTOR, (sector + count) * SECTOR))
            }
            _ => None,
        });
        clears.collect()
    }
}

impl Request {
    /// First sector and number of sectors.
    fn range(self) -> Option<(u64, u64)> {
        match self {
            Request::Read(sector, count)
            | Request::Write(sector, count)
            | Request::Zero(sector, count)
            | Request::Discard(sector, count) => Some((sector, count)),
            Request::Flush => None,
        }
    }

    fn changes(self) -> bool {
        !matches!(self, Request::Read(..) | Request::Flush)
    }
}

/// What a sector should hold after a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Zeroes.
    Zero,
    /// Anything: it was discarded.
    Any,
    /// The data of this request.
    Write(u64),
}

/// What a replay has left on the disk: runs of sectors by their first one.
#[derive(Debug, Default)]
pub struct Expected {
    runs: BTreeMap<u64, (u64, Content)>,
}

impl Expected {
    fn set(&mut self, start: u64, count: u64, content: Content) {
        let end = start + count;
        if let Some((first, (last, old))) =
            self.runs.range(..start).next_back().map(|(k, v)| (*k, *v))
            && last > start
        {
            self.runs.insert(first, (start, old));
            if last > end {
                self.runs.insert(end, (last, old));
            }
        }
        while let Some((first, (last, old))) =
            self.runs.range(start..end).next().map(|(k, v)| (*k, *v))
        {
            self.runs.remove(&first);
            if last > end {
                self.runs.insert(end, (last, old));
            }
        }
        self.runs.insert(start, (end, content));
    }

    /// Parts of at most so many sectors whose content is known: first sector, number, content.
    fn parts(&self, step: u64) -> impl Iterator<Item = (u64, u64, Content)> {
        let known = self.runs.iter().filter(|(_, (_, content))| *content != Content::Any);
        known.flat_map(move |(first, (end, content))| {
            let starts = (*first..*end).step_by(step as usize);
            starts.map(move |sector| (sector, step.min(end - sector), *content))
        })
    }

    /// Reads everything back, several parts at a time. Returns the number of bytes compared.
    pub fn verify(&self, queue: &mut Queue) -> Result<u64> {
        let mut bytes = 0;
        let mut parts = self.parts(VERIFY_STEP.min(queue.slot_size() as u64) / SECTOR);
        let mut free: Vec<usize> = (0..queue.depth().min(VERIFY_DEPTH)).collect();
        let mut reads = vec![None; free.len()];
        let mut ends = Vec::new();
        loop {
            while let Some(slot) = free.pop() {
                reads[slot] = parts.next();
                let Some((sector, count, _)) = reads[slot] else { break };
                queue.start(slot, Op::Read(sector * SECTOR, (count * SECTOR) as usize));
            }
            if queue.in_flight() == 0 {
                return Ok(bytes);
            }
            queue.wait(&mut ends)?;
            for (slot, result) in &ends {
                let Some((sector, count, content)) = reads[*slot].take() else { continue };
                if *result != 0 {
                    return Err(format!("sector {sector} could not be read: {result}").into());
                }
                let data = queue.buffer(*slot, (count * SECTOR) as usize);
                for (index, found) in data.chunks_exact(SECTOR as usize).enumerate() {
                    check_sector(found, sector + index as u64, content)?;
                }
                bytes += count * SECTOR;
                free.push(*slot);
            }
        }
    }
}

fn check_sector(found: &[u8], sector: u64, content: Content) -> Result<()> {
    let right = match content {
        Content::Any => true,
        Content::Zero => found.iter().all(|byte| *byte == 0),
        Content::Write(number) => found.starts_with(&stamp(sector, number)),
    };
    if right { Ok(()) } else { Err(format!("sector {sector} does not hold {content:?}").into()) }
}

/// The first bytes of a written sector: its number and that of the write, never all zero.
fn stamp(sector: u64, number: u64) -> [u8; 16] {
    let mut stamp = [0; 16];
    stamp[..8].copy_from_slice(&(sector + 1).to_le_bytes());
    stamp[8..].copy_from_slice(&(number + 1).to_le_bytes());
    stamp
}

/// Marks each sector of a write.
pub fn stamp_all(data: &mut [u8], sector: u64, number: u64) {
    for (index, target) in data.chunks_exact_mut(SECTOR as usize).enumerate() {
        target[..16].copy_from_slice(&stamp(sector + index as u64, number));
    }
}

/// Replays a trace with at most the queue's depth in flight. Requests that overlap keep their order, as
/// they did in the guest. Times of flushes go to `flushes`.
pub fn replay(queue: &mut Queue, trace: &Trace, flushes: &mut Latencies) -> Result<Expected> {
    let mut replay = Replay::new(queue, trace.steps.len());
    for (number, step) in trace.steps.iter().enumerate() {
        if step.alone {
            replay.wait_while(flushes, |replay| replay.queue.in_flight() > 0)?;
        }
        for before in &step.after {
            replay.wait_while(flushes, |replay| replay.left[*before] > 0)?;
        }
        replay.start(number, step.request, flushes)?;
    }
    replay.wait_while(flushes, |replay| replay.queue.in_flight() > 0)?;
    Ok(replay.expected)
}

struct Replay<'a> {
    queue: &'a mut Queue,
    free: Vec<usize>,
    /// By slot: number of the request, its sectors, when it started.
    running: Vec<Option<Running>>,
    /// By request: parts that have not ended.
    left: Vec<u32>,
    expected: Expected,
    ends: Vec<(usize, i32)>,
}

#[derive(Clone, Copy)]
struct Running {
    number: usize,
    range: (u64, u64),
    changes: bool,
    begun: Instant,
}

impl<'a> Replay<'a> {
    fn new(queue: &'a mut Queue, requests: usize) -> Self {
        let depth = queue.depth();
        for slot in 0..depth {
            let size = queue.slot_size();
            fastrand::Rng::with_seed(slot as u64).fill(queue.buffer(slot, size));
        }
        Replay {
            queue,
            free: (0..depth).collect(),
            running: vec![None; depth],
            left: vec![0; requests],
            expected: Expected::default(),
            ends: Vec::new(),
        }
    }

    fn wait_while(
        &mut self,
        flushes: &mut Latencies,
        condition: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        while condition(self) {
            let mut ends = std::mem::take(&mut self.ends);
            self.queue.wait(&mut ends)?;
            for (slot, result) in &ends {
                let Some(running) = self.running[*slot].take() else { continue };
                if *result != 0 {
                    return Err(format!("request {} failed: {result}", running.number).into());
                }
                if running.range.1 == 0 {
                    flushes.add(running.begun.elapsed().as_nanos() as u64);
                }
                self.left[running.number] -= 1;
                self.free.push(*slot);
            }
            self.ends = ends;
        }
        Ok(())
    }

    fn start(&mut self, number: usize, request: Request, flushes: &mut Latencies) -> Result<()> {
        let Some((sector, count)) = request.range() else {
            return self.start_part(number, request, flushes);
        };
        let step = match request {
            Request::Read(..) | Request::Write(..) => {
                WRITE_MAX.min(self.queue.slot_size() as u64) / SECTOR
            }
            _ => RANGE_MAX,
        };
        let mut at = sector;
        while at < sector + count {
            let take = step.min(sector + count - at);
            let part = match request {
                Request::Read(..) => Request::Read(at, take),
                Request::Write(..) => Request::Write(at, take),
                Request::Zero(..) => Request::Zero(at, take),
                Request::Discard(..) => Request::Discard(at, take),
                Request::Flush => Request::Flush,
            };
            self.start_part(number, part, flushes)?;
            at += take;
        }
        Ok(())
    }

    fn start_part(
        &mut self,
        number: usize,
        request: Request,
        flushes: &mut Latencies,
    ) -> Result<()> {
        let range = request.range().unwrap_or((0, 0));
        let changes = request.changes();
        self.wait_while(flushes, |replay| {
            let clashes = |running: &Running| {
                (running.changes || changes)
                    && running.range.0 < range.0 + range.1
                    && range.0 < running.range.0 + running.range.1
            };
            replay.free.is_empty() || replay.running.iter().flatten().any(clashes)
        })?;
        let Some(slot) = self.free.pop() else { return Err("no free slot".into()) };
        let (start, bytes) = (range.0 * SECTOR, range.1 * SECTOR);
        let op = match request {
            Request::Read(..) => Op::Read(start, bytes as usize),
            Request::Write(..) => {
                stamp_all(self.queue.buffer(slot, bytes as usize), range.0, number as u64);
                Op::Write(start, bytes as usize)
            }
            Request::Zero(..) => Op::Zero(start, bytes, true),
            Request::Discard(..) => Op::Discard(start, bytes),
            Request::Flush => Op::Flush,
        };
        let content = match request {
            Request::Write(..) => Some(Content::Write(number as u64)),
            Request::Zero(..) => Some(Content::Zero),
            Request::Discard(..) => Some(Content::Any),
            _ => None,
        };
        if let Some(content) = content {
            self.expected.set(range.0, range.1, content);
        }
        self.running[slot] = Some(Running { number, range, changes, begun: Instant::now() });
        self.left[number] += 1;
        self.queue.start(slot, op);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_orders_by_flushes() {
        let trace = Trace::parse("# text\nW 2048 8\nW 4096 8\nF\nW 0 8\n").expect("a trace");
        let alone: Vec<bool> = trace.steps.iter().map(|step| step.alone).collect();
        assert_eq!(alone, [false, false, true, true]);
        let shifted = trace.shifted(63);
        assert_eq!(shifted.steps[0].request, Request::Write(63, 8));
        assert_eq!(shifted.steps[3].request, Request::Write(0, 8));
        assert_eq!((trace.span(), trace.totals()), (4104 * 512, (3 * 4096, 1)));
    }

    #[test]
    fn version_2_orders_by_ends() {
        let trace = Trace::parse("V 2\nW 0 8\nW 8 8\nE 1\nF\nE 0\nE 2\nR 0 8\nM 3\n");
        let trace = trace.expect("a trace");
        let after: Vec<&[usize]> = trace.steps.iter().map(|step| &step.after[..]).collect();
        assert_eq!(after, [&[][..], &[], &[1], &[0, 2]]);
        assert!(trace.steps.iter().all(|step| !step.alone));
        assert_eq!(trace.missing, 3);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["X 1 2", "W 1", "E 0", "V 2\nE 0", "V 3", "F 1", "W a 1", "W 0 8\nV 2"] {
            assert!(Trace::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_known_is_verified_in_parts() {
        let mut expected = Expected::default();
        expected.set(0, 20, Content::Write(0));
        expected.set(20, 5, Content::Any);
        expected.set(30, 8, Content::Zero);
        let parts: Vec<_> = expected.parts(8).collect();
        let data = Content::Write(0);
        let wanted = [(0, 8, data), (8, 8, data), (16, 4, data), (30, 8, Content::Zero)];
        assert_eq!(parts, wanted);
    }

    #[test]
    fn later_contents_cut_earlier_ones() {
        let mut expected = Expected::default();
        expected.set(0, 100, Content::Write(0));
        expected.set(10, 10, Content::Zero);
        expected.set(15, 90, Content::Write(2));
        expected.set(50, 1, Content::Any);
        let runs: Vec<_> =
            expected.runs.iter().map(|(start, (end, c))| (*start, *end, *c)).collect();
        let wanted = [
            (0, 10, Content::Write(0)),
            (10, 15, Content::Zero),
            (15, 50, Content::Write(2)),
            (50, 51, Content::Any),
            (51, 105, Content::Write(2)),
        ];
        assert_eq!(runs, wanted);
    }
}
