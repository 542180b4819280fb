//! The ways of requests through the engine, on a file in memory, for `cargo xtask counts`:
//! `cargo bench -p exd-image --features measure --bench paths -- count NAME N` does `N` steps of one kind.

#![forbid(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Random, Rig, small_image};
use exd_image::fast::{Access, Fast};
use exd_image::{Disk, OpenOptions, Request};
use std::hint::black_box;

const BLOCK: u64 = 4096;
/// Blocks of the disk.
const BLOCKS: u64 = 16 << 10;

fn rig() -> Rig {
    let options = OpenOptions { window_bytes: 256 << 20, ..OpenOptions::default() };
    Rig::new(&small_image(BLOCKS * BLOCK), options)
}

/// A disk whose blocks are written, in pieces of 64 KiB.
fn written() -> Rig {
    let mut rig = rig();
    for block in (0..BLOCKS).step_by(16) {
        rig.write(block * BLOCK, 16 * BLOCK).expect("a write");
    }
    rig.checkpoint().expect("a checkpoint");
    rig
}

/// Blocks in an order that looks random, each once.
fn scattered(index: u64) -> u64 {
    index * 7919 % BLOCKS
}

/// First writes; with `flush`, each is made durable.
fn first_writes(steps: u64, flush: bool) -> Rig {
    let mut rig = rig();
    for index in 0..steps {
        rig.write(scattered(index) * BLOCK, BLOCK).expect("a write");
        if flush {
            rig.flush().expect("a flush");
        }
    }
    rig
}

fn overwrites(steps: u64) {
    let mut rig = written();
    let mut random = Random::new(1);
    for _ in 0..steps {
        rig.write(random.below(BLOCKS) * BLOCK, BLOCK).expect("a write");
    }
}

/// Overwrites that pass the engine by: finding the place, and telling of the end.
fn fast_overwrites(steps: u64) {
    let mut rig = written();
    let fast = Fast::new(1 << 20);
    rig.disk.share(&fast).expect("nobody else is behind it");
    for block in 0..BLOCKS {
        rig.request(Request::Read { offset: block * BLOCK, len: BLOCK }).expect("a read");
    }
    let mut lane = fast.lane();
    let mut random = Random::new(1);
    let mut parts = Vec::new();
    for _ in 0..steps {
        parts.clear();
        let offset = random.below(BLOCKS) * BLOCK;
        let ticket = lane.begin(Access::Overwrite, offset, BLOCK, &mut parts);
        lane.end(black_box(ticket).expect("it is known"));
    }
}

/// Recovery of a journal and a completion log with so many entries. Most of what it costs does not
/// depend on them, and does not count.
fn replay(steps: u64) {
    let mut left = first_writes(steps, false).storage.killed();
    let disk = Disk::open(&mut left, OpenOptions::default()).expect("it opens");
    black_box(disk.info());
}

fn count(name: &str, steps: u64) -> Option<()> {
    match name {
        "first-write" => drop(first_writes(steps, false)),
        "first-write-flush" => drop(first_writes(steps, true)),
        "overwrite" => overwrites(steps),
        "fast-overwrite" => fast_overwrites(steps),
        "write-and-replay" => replay(steps),
        _ => return None,
    }
    Some(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["count", name, steps] => {
            let steps = steps.parse().expect("a number of steps");
            count(name, steps).expect("a name that `cargo xtask counts` knows");
        }
        _ => println!("for `cargo xtask counts`"),
    }
}
