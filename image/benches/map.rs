//! How fast the map is, beside `std`'s BTreeMap in the same run. Times are the thread's own: what else the
//! machine does counts as little as can be.
//!
//! `cargo bench -p exd-image --features measure` prints tables. `... --bench map -- count NAME N` does `N`
//! steps of one kind and nothing else, for `cargo xtask counts`.

#![forbid(unsafe_code)]

use exd_image::measure::{Tree, append, set_overlay};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

/// Blocks of a disk of 1 TiB.
const BLOCKS: u64 = 1 << 28;
/// Lookups measured at a time.
const LOOKUPS: usize = 400_000;
/// A run takes at least so long.
const RUN_NANOSECONDS: f64 = 4e8;
/// The middle one of so many runs counts.
const RUNS: usize = 5;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(bound)) >> 64) as u64
    }
}

/// Random blocks of the disk, each an extent of its own, in order.
fn scattered(count: usize) -> Vec<(u64, u32)> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut blocks: Vec<u64> =
        (0..count + count / 8).map(|_| random.below(BLOCKS / 2) * 2).collect();
    blocks.sort_unstable();
    blocks.dedup();
    // Evenly thinned out: all of the disk stays in use.
    let step = blocks.len() as f64 / count as f64;
    let mut extents: Vec<(u64, u32)> =
        (0..count).map(|i| (blocks[(i as f64 * step) as usize], 1)).collect();
    extents.dedup();
    extents
}

/// Nanoseconds that this thread has had a processor, where the host tells; else of the clock.
fn cpu_time() -> f64 {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let told = told.and_then(|text| text.split_whitespace().next()?.parse().ok());
    told.unwrap_or_else(|| BEGUN.get_or_init(Instant::now).elapsed().as_nanos() as f64)
}

/// Nanoseconds for each of `LOOKUPS`, the middle one of the runs.
fn measure(mut lookup: impl FnMut(u64) -> u64, blocks: &[u64]) -> f64 {
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let (begun, mut lookups) = (cpu_time(), 0);
            // The host's clock may have steps of some milliseconds.
            while cpu_time() - begun < RUN_NANOSECONDS {
                let sum = blocks.iter().fold(0u64, |sum, block| sum.wrapping_add(lookup(*block)));
                black_box(sum);
                lookups += blocks.len();
            }
            (cpu_time() - begun) / lookups as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[RUNS / 2]
}

/// Random lookups; half of them hit an extent.
fn targets(extents: &[(u64, u32)]) -> Vec<u64> {
    let mut random = Random(77);
    (0..LOOKUPS)
        .map(|i| match i % 2 {
            0 => extents[random.below(extents.len() as u64) as usize].0,
            _ => random.below(BLOCKS),
        })
        .collect()
}

fn lookups(sizes: &[usize]) {
    println!("random lookups, 1 TiB in 4 KiB blocks, extents of one block, everything cached");
    println!(
        "{:>10} {:>10} {:>10} {:>8} {:>12}",
        "extents", "BTreeMap", "map", "ratio", "bytes/extent"
    );
    for &size in sizes {
        let extents = scattered(size);
        let blocks = targets(&extents);
        let ordered: BTreeMap<u64, (u64, u32)> =
            extents.iter().map(|&(first, length)| (first, (first * 8 + 8, length))).collect();
        let old = measure(
            |block| match ordered.range(..=block).next_back() {
                Some((first, (place, length))) if block < first + u64::from(*length) => *place,
                _ => 0,
            },
            &blocks,
        );
        drop(ordered);
        let mut tree = Tree::new(&extents, u64::MAX / 2, false);
        blocks.iter().for_each(|block| {
            black_box(tree.lookup(*block));
        });
        let new = measure(|block| tree.lookup(block), &blocks);
        println!(
            "{:>10} {old:>7.0} ns {new:>7.0} ns {:>7.1}x {:>12.1}",
            extents.len(),
            old / new,
            tree.bytes() as f64 / extents.len() as f64
        );
    }
}

/// What a lookup costs when most nodes are not cached, without the host's read.
fn misses(size: usize, cache: u64) {
    let extents = scattered(size);
    let mut tree = Tree::new(&extents, cache, true);
    let blocks = &targets(&extents)[..LOOKUPS / 10];
    let before = tree.misses;
    let begun = cpu_time();
    blocks.iter().for_each(|block| {
        black_box(tree.lookup(*block));
    });
    let time = (cpu_time() - begun) / blocks.len() as f64;
    let missed = (tree.misses - before) as f64 / blocks.len() as f64;
    println!(
        "{} extents, {} MiB of cache ({} held): {time:.0} ns and {missed:.2} node reads of 4 KiB a lookup",
        extents.len(),
        cache >> 20,
        tree.bytes() >> 20,
    );
}

fn changes() {
    let mut random = Random(5);
    let blocks: Vec<u64> = (0..16384).map(|_| random.below(BLOCKS)).collect();
    let begun = cpu_time();
    let mut ordered = BTreeMap::new();
    for (index, block) in blocks.iter().enumerate() {
        ordered.insert(*block, (index as u64, 1u64));
    }
    let old = (cpu_time() - begun) / blocks.len() as f64;
    black_box(ordered);
    let begun = cpu_time();
    black_box(set_overlay(&blocks));
    let new = (cpu_time() - begun) / blocks.len() as f64;
    println!("a change of the map: {new:.0} ns (inserting into a BTreeMap: {old:.0} ns)");
    for batch in [1, 32, 1024] {
        let begun = cpu_time();
        let entries = 64 * 1024;
        black_box(append(entries, batch));
        let time = (cpu_time() - begun) / entries as f64;
        println!("journaling, {batch} entries at a time: {time:.0} ns an entry");
    }
}

/// `steps` steps of one kind; what comes before them is the same for any number.
fn count(name: &str, steps: usize) -> Option<()> {
    let mut random = Random(3);
    match name {
        "lookup" => {
            let extents = scattered(20_000);
            let mut tree = Tree::new(&extents, u64::MAX / 2, false);
            let mut lookup = |_| {
                black_box(tree.lookup(random.below(BLOCKS)));
            };
            // Hints for all.
            (0..200_000).for_each(&mut lookup);
            (0..steps).for_each(lookup);
        }
        "change" => {
            let blocks: Vec<u64> = (0..steps).map(|_| random.below(BLOCKS)).collect();
            black_box(set_overlay(&blocks));
        }
        "append" => {
            black_box(append(steps as u64, 32));
        }
        _ => return None,
    }
    Some(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["count", name, steps] => {
            let steps = steps.parse().expect("a number of steps");
            count(name, steps).expect("lookup, change or append");
        }
        ["lookups", size] => lookups(&[size.parse().expect("a number of extents")]),
        _ => {
            lookups(&[100_000, 1_000_000, 10_000_000]);
            misses(10_000_000, 64 << 20);
            changes();
        }
    }
}
