//! The fuzz targets on random inputs, without the fuzzer: `plain SECONDS [SEED]`, that long for each.
//!
//! A failing input is printed with its target and seed; `plain 0 SEED` runs the inputs of that seed only.
#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// An input that takes longer counts as a hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// The input under way: its target, its seed, and when it began.
static UNDER_WAY: Mutex<Option<(&str, u64, Instant)>> = Mutex::new(None);

fn under_way(value: Option<(&'static str, u64, Instant)>) {
    *UNDER_WAY.lock().expect("nobody panics while holding it") = value;
}

fn fail(target: &str, seed: u64, what: &str) -> ! {
    eprintln!("target {target}, seed {seed}: {what}: {:02x?}", exd_fuzz::random_input(seed));
    std::process::exit(1);
}

fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let current = *UNDER_WAY.lock().expect("nobody panics while holding it");
        if let Some((target, seed, start)) = current
            && start.elapsed() > PATIENCE
        {
            fail(target, seed, "does not end");
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |what: &str| {
        let parse = |word: String| word.parse::<u64>().unwrap_or_else(|_| panic!("{what}: {word}"));
        arguments.next().map(parse)
    };
    let seconds = number("not a number of seconds").unwrap_or(60);
    let from = number("not a seed").unwrap_or(0);
    std::thread::spawn(watch);
    for (name, body) in exd_fuzz::TARGETS {
        let start = Instant::now();
        let mut seed = from;
        loop {
            under_way(Some((name, seed, Instant::now())));
            let input = exd_fuzz::random_input(seed);
            if std::panic::catch_unwind(|| body(&input)).is_err() {
                fail(name, seed, "panics");
            }
            seed += 1;
            if start.elapsed() >= Duration::from_secs(seconds) {
                break;
            }
        }
        under_way(None);
        println!("{name}: {} inputs, no failure", seed - from);
    }
}
