//! P7: overlapping unaligned requests lose nothing, in any completion order; reads that overlap them
//! see whole sectors of one or the other.

use exd_sim::api::Request;
use exd_sim::interleave::{BlockState, Effect, Orders, Scenario, menu};
use exd_sim::real::Disk;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Hosts and block sizes: (block size, host alignment).
const SHAPES: [(u32, u64); 5] =
    [(4096, 512), (65536, 512), (4096, 4096), (65536, 4096), (512, 512)];

fn run_all(scenarios: &[Scenario], most: u64, samples: u64) -> Orders {
    let next = AtomicUsize::new(0);
    let total = Mutex::new((Orders::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get().min(8)) {
            scope.spawn(|| {
                while let Some(scenario) = scenarios.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = scenario.run::<Disk>(most, samples);
                    let mut total = total.lock().unwrap_or_else(|e| e.into_inner());
                    match result {
                        Ok(orders) => total.0.add(orders),
                        Err(why) => {
                            total.1.push(why);
                            break;
                        }
                    }
                }
            });
        }
    });
    let (orders, failures) = total.into_inner().unwrap_or_else(|e| e.into_inner());
    assert!(failures.is_empty(), "{}", failures[0]);
    orders
}

fn scenarios(requests: impl Fn(u32) -> Vec<Vec<Request>>) -> Vec<Scenario> {
    let mut all = Vec::new();
    for (block_size, alignment) in SHAPES {
        for state in BlockState::ALL {
            for (index, requests) in requests(block_size).into_iter().enumerate() {
                // Both ways of each are covered by different request sets.
                let kick_each = index & 1 == 1;
                let effect = if index & 2 == 2 { Effect::Early } else { Effect::Late };
                all.push(Scenario { block_size, alignment, state, requests, kick_each, effect });
            }
        }
    }
    all
}

#[test]
fn p7_every_order_of_two_requests() {
    let pairs = |block| {
        let menu = menu(block);
        let mut pairs = Vec::new();
        for first in &menu {
            for second in &menu {
                pairs.push(vec![*first, *second]);
            }
        }
        pairs
    };
    let orders = run_all(&scenarios(pairs), 60, 10);
    eprintln!("P7, two requests: {orders:?}");
}

fn sampled(count: usize, sets: usize, salt: u64) -> impl Fn(u32) -> Vec<Vec<Request>> {
    move |block| {
        let menu = menu(block);
        let mut rng = fastrand::Rng::with_seed(salt ^ u64::from(block));
        (0..sets).map(|_| (0..count).map(|_| menu[rng.usize(0..menu.len())]).collect()).collect()
    }
}

#[test]
fn p7_orders_of_three_requests() {
    let orders = run_all(&scenarios(sampled(3, 24, 33)), 120, 20);
    eprintln!("P7, three requests: {orders:?}");
}

#[test]
fn p7_orders_of_four_requests() {
    let orders = run_all(&scenarios(sampled(4, 10, 44)), 200, 40);
    eprintln!("P7, four requests: {orders:?}");
}
