//! The workloads: what is measured, on which targets, from which state of the image.

use crate::backend::{Shape, Target};
use crate::drive::{Flush, Kind, Order, Pattern};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// The start of the first partition of old partition tools.
const SECTOR_63: u64 = 63 * 512;
/// Size of every disk, unless a workload is about another. A little more than the span, for the shift.
const DISK: u64 = 4 * GIB + MIB;

/// The state of the image when the clock starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Never used.
    Fresh,
    /// The span was written, one block after another. The image is kept from run to run.
    Filled,
    /// The span was written in pieces of 4 KiB in random order. Kept too.
    FilledAtRandom,
    /// The same, and then moved together (`imgtool defrag`).
    Defragmented,
    /// Written one block after another, but anew for each run: the workload changes it.
    FilledOnce,
    /// The span was written and then discarded, in an image that keeps its space: each first write goes
    /// to space that has held data. In blocks of 4 KiB: with smaller ones a write at sector 63 has whole
    /// blocks, and there are no edge blocks to be ordered.
    Recycled,
}

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A pattern of requests.
    Pattern(Pattern),
    /// The trace, with its partition beginning at this sector.
    Trace(u64),
}

/// A workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    /// What is done.
    pub body: Body,
    /// On what.
    pub state: State,
    /// The image.
    pub shape: Shape,
    /// The image lies in memory (tmpfs): CPU is measured, not a disk.
    pub in_memory: bool,
    /// Who is measured, in the order of their turns.
    pub targets: &'static [Target],
    /// Part of `--quick`.
    pub quick: bool,
    /// It has a goal: late or not, it gets as many runs as a bound needs.
    pub goal: bool,
    /// Only run where it is named.
    pub extra: bool,
    /// Neighbours with the same word here take turns: a goal compares them with each other.
    pub group: &'static str,
}

use Target::{Exd, Full, OwnFull, OwnRaw, Qcow2, Qcow2Extl2, Qcow2Lazy, Qcow2Meta, Raw};

const ALL: &[Target] = &[Exd, OwnRaw, Raw, Full, Qcow2, Qcow2Lazy, Qcow2Extl2, Qcow2Meta];
const MAIN: &[Target] = &[Exd, Raw, Full, Qcow2];
const WITH_OWN: &[Target] = &[Exd, OwnRaw, Raw, Full, Qcow2];
const WRITTEN: &[Target] = &[Exd, OwnFull, Full, Qcow2];
const SPARSE: &[Target] = &[Exd, Raw, Qcow2];

/// Random 4 KiB writes at depth 32: what the others are made from.
fn writes(ops: u64) -> Pattern {
    Pattern {
        kind: Kind::Write,
        len: 4096,
        order: Order::Random,
        shift: 0,
        span: 2 * GIB,
        depth: 32,
        queues: 1,
        flush: Flush::Never,
        ops,
    }
}

fn workload(
    name: &'static str,
    about: &'static str,
    pattern: Pattern,
    targets: &'static [Target],
) -> Workload {
    let shape =
        Shape { size: DISK, span: pattern.span + MIB, keeps_space: false, block_size: None };
    let state = State::Fresh;
    let body = Body::Pattern(pattern);
    Workload {
        name,
        about,
        body,
        state,
        shape,
        in_memory: false,
        targets,
        quick: false,
        goal: false,
        extra: false,
        group: name,
    }
}

fn trace(name: &'static str, about: &'static str, start: u64) -> Workload {
    let shape = Shape { size: DISK, span: DISK, keeps_space: false, block_size: None };
    let body = Body::Trace(start);
    Workload {
        name,
        about,
        body,
        state: State::Fresh,
        shape,
        in_memory: false,
        targets: ALL,
        quick: true,
        goal: true,
        extra: false,
        group: "trace",
    }
}

impl Workload {
    fn quick(mut self) -> Self {
        self.quick = true;
        self
    }

    fn goal(mut self) -> Self {
        self.goal = true;
        self
    }

    fn extra(mut self) -> Self {
        self.extra = true;
        self
    }

    fn group(mut self, group: &'static str) -> Self {
        self.group = group;
        self
    }

    fn on(mut self, state: State) -> Self {
        self.state = state;
        self.shape.keeps_space = state == State::Recycled;
        self.shape.block_size = (state == State::Recycled).then_some(4096);
        self
    }

    fn disk(mut self, size: u64) -> Self {
        self.shape.size = size;
        self
    }

    fn in_memory(mut self) -> Self {
        self.in_memory = true;
        self.shape.size = self.shape.span.next_multiple_of(MIB) + MIB;
        self
    }
}

/// All workloads, in the order they run: those with goals first, so that a late end costs the least.
pub fn all() -> Vec<Workload> {
    let mut list = traces();
    list.extend(holes());
    list.extend(written());
    list.extend(read_back());
    list.extend(in_memory());
    let (goals, others): (Vec<_>, Vec<_>) = list.into_iter().partition(|workload| workload.goal);
    goals.into_iter().chain(others).collect()
}

fn traces() -> Vec<Workload> {
    vec![
        trace("trace-2048", "install trace, partition at sector 2048", 2048),
        trace("trace-63", "install trace, partition at sector 63", 63),
    ]
}

fn shifted(pattern: Pattern) -> Pattern {
    Pattern { shift: SECTOR_63, ..pattern }
}

/// Workloads on space that was never written, or not since it was given back.
fn holes() -> Vec<Workload> {
    let holes = writes(128 * KIB);
    let flush_32 = Pattern { flush: Flush::Every(32), ..writes(64 * KIB) };
    let durable = Pattern { flush: Flush::Each, depth: 1, ..writes(6 * KIB) };
    let flushers = Pattern { flush: Flush::Each, depth: 16, ..writes(32 * KIB) };
    let huge = Pattern { span: TIB - GIB, ..writes(64 * KIB) };
    let recycled = Pattern { span: GIB, ..writes(64 * KIB) };
    let sequential = |len: u64, total: u64| Pattern {
        order: Order::Sequential,
        len: len as usize,
        ..writes(total / len)
    };
    let (seq_4k, seq_64k) = (sequential(4 * KIB, 512 * MIB), sequential(64 * KIB, GIB));
    let large = Pattern { len: 64 << 10, ..writes(12 * KIB) };
    let two_queues = Pattern { queues: 2, ..holes };
    let sparse = Pattern { span: 16 * TIB - GIB, ..writes(1_000_000) };
    let many = Pattern { span: 4 * GIB, ..writes(MIB) };
    let same = "the same at sector 63";
    vec![
        workload("random-holes", "4 KiB random into holes, depth 32", holes, ALL)
            .quick()
            .goal()
            .group("random"),
        workload("random-holes-63", same, shifted(holes), MAIN).quick().goal().group("random"),
        workload(
            "recycled",
            "4 KiB random into space that held data, depth 32, block_size=4096",
            recycled,
            &[Exd],
        )
        .on(State::Recycled)
        .quick()
        .goal()
        .group("random"),
        workload(
            "recycled-63",
            "the same at sector 63: each write has two edge blocks, which are ordered",
            shifted(recycled),
            &[Exd],
        )
        .on(State::Recycled)
        .quick()
        .goal()
        .group("random"),
        workload("flush-32", "4 KiB random into holes, depth 32, flush every 32", flush_32, MAIN)
            .quick()
            .goal(),
        workload("flush-32-63", same, shifted(flush_32), MAIN),
        workload("durable", "4 KiB random into holes, depth 1, flush each", durable, WITH_OWN)
            .quick()
            .goal(),
        workload("durable-63", same, shifted(durable), MAIN),
        workload("flushers-16", "16 concurrent write+flush loops into holes", flushers, MAIN)
            .quick()
            .goal(),
        workload("random-1t", "4 KiB random into holes of 1 TiB, depth 32", huge, SPARSE)
            .disk(TIB)
            .quick()
            .goal()
            .group("wide"),
        workload("random-4g", "4 KiB random into holes, as many as 4 GiB have", many, &[Exd])
            .goal()
            .group("wide"),
        workload("seq-64k", "64 KiB sequential into holes, depth 32", seq_64k, MAIN).quick().goal(),
        workload("seq-64k-63", same, shifted(seq_64k), MAIN),
        workload("queues-2", "4 KiB random into holes, depth 32, 2 queues", two_queues, MAIN),
        workload("random-64k", "64 KiB random into holes, depth 32", large, MAIN),
        workload("random-64k-63", same, shifted(large), MAIN),
        workload("seq-4k", "4 KiB sequential into holes, depth 32", seq_4k, MAIN),
        workload("seq-4k-63", same, shifted(seq_4k), MAIN),
        workload("random-16t", "a million of 4 KiB, random over 16 TiB", sparse, &[Exd])
            .disk(16 * TIB)
            .extra(),
    ]
}

fn over(kind: Kind, len: u64, depth: usize, ops: u64) -> Pattern {
    Pattern { kind, len: len as usize, depth, span: GIB, ..writes(ops) }
}

/// Workloads on data that was written before.
fn written() -> Vec<Workload> {
    let (four, many) = (4 * KIB, 64 * KIB);
    let (read, write) = (Kind::Read, Kind::Write);
    let lone = Pattern { flush: Flush::Each, ..over(write, four, 1, 6 * KIB) };
    let list = [
        ("lone-flush", "overwrites, 4 KiB random, depth 1, flush each", lone),
        ("overwrite-4k-q1", "overwrites, 4 KiB random, depth 1", over(write, four, 1, 12 * KIB)),
        ("overwrite-4k", "overwrites, 4 KiB random, depth 32", over(write, four, 32, 48 * KIB)),
        ("overwrite-64k-q1", "overwrites, 64 KiB, depth 1", over(write, many, 1, 6 * KIB)),
        ("overwrite-64k", "overwrites, 64 KiB, depth 32", over(write, many, 32, 12 * KIB)),
        ("read-4k-q1", "reads, 4 KiB random, depth 1", over(read, four, 1, 12 * KIB)),
        ("read-4k", "reads, 4 KiB random, depth 32", over(read, four, 32, 64 * KIB)),
        ("read-64k-q1", "reads, 64 KiB random, depth 1", over(read, many, 1, 6 * KIB)),
        ("read-64k", "reads, 64 KiB random, depth 32", over(read, many, 32, 16 * KIB)),
    ];
    let quick = ["overwrite-4k", "read-4k"];
    let mut all: Vec<Workload> = list
        .into_iter()
        .map(|(name, about, pattern)| Workload {
            quick: quick.contains(&name),
            ..workload(name, about, pattern, WRITTEN).on(State::Filled).goal()
        })
        .collect();
    let mixed = over(Kind::Mixed(70), four, 32, 48 * KIB);
    let about = "70 % reads, 30 % overwrites, 4 KiB, depth 32";
    all.push(workload("mixed", about, mixed, WRITTEN).on(State::Filled));
    let discard = Pattern { span: 512 * MIB, ..over(Kind::Discard, many, 32, 8 * KIB) };
    let about = "64 KiB discards of written data, random";
    all.push(workload("discard", about, discard, SPARSE).on(State::FilledOnce));
    all
}

fn read_back() -> Vec<Workload> {
    let pattern = Pattern {
        order: Order::Sequential,
        span: 256 * MIB,
        ..over(Kind::Read, 64 * KIB, 32, 8 * KIB)
    };
    vec![
        workload(
            "readback",
            "64 KiB sequential reads after a 4 KiB random fill",
            pattern,
            &[Exd, Raw, Full, Qcow2],
        )
        .on(State::FilledAtRandom)
        .quick()
        .goal(),
        workload(
            "defragmented",
            "64 KiB sequential reads after a 4 KiB random fill and defragmentation",
            pattern,
            &[Exd, Full],
        )
        .on(State::Defragmented)
        .goal(),
    ]
}

fn in_memory() -> Vec<Workload> {
    let reads = Pattern { span: 256 * MIB, ..over(Kind::Read, 4 * KIB, 32, 256 * KIB) };
    let overwrites = Pattern { kind: Kind::Write, ..reads };
    let two = |pattern| Pattern { queues: 2, ..pattern };
    let make = |name, about, pattern, targets| {
        workload(name, about, pattern, targets).on(State::Filled).in_memory().group("memory")
    };
    let three: &[Target] = &[Exd, OwnFull, Full];
    vec![
        make("memory-read", "reads, 4 KiB random, depth 32, on tmpfs", reads, three).quick().goal(),
        make("memory-2q", "reads, 4 KiB random, depth 32, 2 queues, on tmpfs", two(reads), three)
            .goal(),
        make("memory-write", "overwrites, 4 KiB random, depth 32, on tmpfs", overwrites, three)
            .goal(),
        make(
            "memory-overwrite-2q",
            "overwrites, 4 KiB random, depth 32, 2 queues, on tmpfs",
            two(overwrites),
            &[Exd, OwnFull],
        ),
    ]
}
