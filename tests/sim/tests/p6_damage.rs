//! P6: damaged metadata is never used: every single flipped bit gives an error or the same disk.

use exd_sim::damage::{Golden, Outcomes, golden};
use exd_sim::real::Disk;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Flips the bits of all metadata sectors, every `stride`th.
fn flip_all(golden: &(dyn Fn() -> Golden + Sync), stride: u64) -> Outcomes {
    let sectors = golden().metadata();
    let next = AtomicUsize::new(0);
    let total = Mutex::new((Outcomes::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get().min(8)) {
            scope.spawn(|| {
                let golden = golden();
                let mut mine = Outcomes::default();
                'all: while let Some(sector) = sectors.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut bit = sector * 4096 + sector % stride;
                    while bit < (sector + 1) * 4096 {
                        match golden.flip::<Disk>(bit) {
                            Ok(outcomes) => mine.add(&outcomes),
                            Err(why) => {
                                total.lock().unwrap_or_else(|e| e.into_inner()).1.push(why);
                                break 'all;
                            }
                        }
                        bit += stride;
                    }
                }
                total.lock().unwrap_or_else(|e| e.into_inner()).0.add(&mine);
            });
        }
    });
    let (outcomes, failures) = total.into_inner().unwrap_or_else(|e| e.into_inner());
    eprintln!("P6: {} sectors of metadata: {outcomes:?}", sectors.len());
    assert!(failures.is_empty(), "{}", failures[0]);
    assert!(outcomes.damages > 0);
    outcomes
}

#[test]
fn p6_every_bit_of_a_closed_image() {
    flip_all(&|| golden::<Disk>(4096, true, 1).expect("a golden image"), 1);
}

#[test]
fn p6_every_bit_of_an_image_with_a_live_journal() {
    flip_all(&|| golden::<Disk>(4096, false, 2).expect("a golden image"), 1);
}

#[test]
fn p6_bits_of_images_of_other_block_sizes() {
    for block_size in [512, 65536] {
        for clean in [true, false] {
            flip_all(&|| golden::<Disk>(block_size, clean, 3).expect("a golden image"), 7);
        }
    }
}
