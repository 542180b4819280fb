//! The fuzz targets on random inputs, without the fuzzer: `plain SECONDS [SEED]`, that long for each.
//!
//! The seed of a failing input is printed first; `plain 0 SEED` runs the inputs of that seed only.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |what: &str| {
        arguments
            .next()
            .map(|word| word.parse::<u64>().unwrap_or_else(|_| panic!("{what}: {word}")))
    };
    let seconds = number("not a number of seconds").unwrap_or(60);
    let from = number("not a seed").unwrap_or(0);
    for (name, body) in exd_fuzz::TARGETS {
        let start = Instant::now();
        let mut seed = from;
        loop {
            let input = exd_fuzz::random_input(seed);
            let result = std::panic::catch_unwind(|| body(&input));
            if result.is_err() {
                eprintln!("target {name}, seed {seed}: {input:02x?}");
                std::process::exit(1);
            }
            seed += 1;
            if start.elapsed() >= Duration::from_secs(seconds) {
                break;
            }
        }
        println!("{name}: {} inputs, no failure", seed - from);
    }
}
