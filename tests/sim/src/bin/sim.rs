//! Long runs of the crash simulator, and repeating what one found.
//!
//!     sim --seeds A..B [--profile P|any|all] [--limits standard|deep|quick|flat]
//!     sim --seed N [--profile P] [--point K[/K..] --subset S[/S..]] [--verbose]
#![forbid(unsafe_code)]

use exd_sim::engine::Engine;
use exd_sim::explore::{Limits, Path, run_many, run_seed};
use exd_sim::real::Disk;
use exd_sim::toy::Toy;
use exd_sim::workload::PROFILES;
use std::process::ExitCode;

struct Arguments {
    seeds: std::ops::Range<u64>,
    profile: String,
    limits: Limits,
    path: Option<Path>,
    engine: String,
    bug: Option<String>,
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("sim: {why}");
            eprintln!(
                "usage: sim --seeds A..B | --seed N [--profile {}|any|all] \
                 [--limits standard|deep|quick|flat] [--point K/.. --subset S/..] [--verbose]",
                PROFILES.join("|")
            );
            return ExitCode::from(2);
        }
    };
    if let Some(name) = &arguments.bug
        && let Err(why) = exd_sim::real::set_bug_by_name(name)
    {
        eprintln!("sim: {why}");
        return ExitCode::from(2);
    }
    match arguments.engine.as_str() {
        "toy" => run::<Toy>("toy", &arguments),
        _ => run::<Disk>("exd", &arguments),
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        seeds: 0..0,
        profile: "any".to_owned(),
        limits: Limits::STANDARD,
        path: None,
        engine: "exd".to_owned(),
        bug: None,
        verbose: false,
    };
    let (mut points, mut subsets) = (Vec::new(), Vec::new());
    while let Some(word) = words.next() {
        if word == "--verbose" {
            arguments.verbose = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text:?}: {e}"));
        match word.as_str() {
            "--seed" => {
                let seed = number(&value)?;
                arguments.seeds = seed..seed + 1;
            }
            "--seeds" => {
                let (from, to) = value.split_once("..").ok_or("--seeds wants A..B")?;
                arguments.seeds = number(from)?..number(to)?;
            }
            "--profile" => arguments.profile = value,
            "--limits" => {
                arguments.limits =
                    Limits::named(&value).ok_or_else(|| format!("no limits {value:?}"))?;
            }
            "--point" => {
                points = value.split('/').map(number).collect::<Result<Vec<u64>, _>>()?;
            }
            "--subset" => {
                subsets = value.split('/').map(str::parse).collect::<Result<Vec<_>, _>>()?;
            }
            "--engine" => arguments.engine = value,
            "--bug" => arguments.bug = Some(value),
            other => return Err(format!("unknown option {other:?}")),
        }
    }
    if points.len() != subsets.len() {
        return Err("--point and --subset must have the same number of parts".to_owned());
    }
    if !points.is_empty() {
        arguments.path = Some(points.into_iter().zip(subsets).collect());
    }
    if arguments.seeds.is_empty() {
        return Err("no seeds".to_owned());
    }
    Ok(arguments)
}

fn run<E: Engine>(engine: &'static str, arguments: &Arguments) -> ExitCode {
    if cfg!(not(feature = "seeded-bugs")) && ["fragments", "storm"].contains(&&*arguments.profile) {
        eprintln!(
            "Sessions begin in rare ways in this profile, but not without --features seeded-bugs."
        );
    }
    let one = arguments.seeds.end - arguments.seeds.start == 1;
    if one && arguments.profile != "all" {
        let seed = arguments.seeds.start;
        let (path, verbose) = (arguments.path.clone(), arguments.verbose);
        let limits = arguments.limits;
        return match run_seed::<E>(engine, &arguments.profile, seed, limits, path, verbose) {
            Ok((counters, trace)) => {
                println!("seed {seed}: no violation; trace {trace:016x}; {counters}");
                ExitCode::SUCCESS
            }
            Err(failure) => {
                println!("{failure}");
                ExitCode::FAILURE
            }
        };
    }
    let profiles: Vec<&str> = match arguments.profile.as_str() {
        "all" => PROFILES.to_vec(),
        name => vec![name],
    };
    let (counters, failures) =
        run_many::<E>(engine, &profiles, arguments.seeds.clone(), arguments.limits, 0);
    println!("{counters}");
    for failure in &failures {
        println!("{failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
