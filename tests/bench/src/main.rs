//! `cargo xtask bench`.

#![forbid(unsafe_code)]

use clap::Parser;
use exd_bench::Result;
use exd_bench::backend::Target;
use exd_bench::host::{LOOP_KINDS, LoopFileSystem, Machine};
use exd_bench::measure::Device;
use exd_bench::report::{LEGEND, Results, goals_table};
use exd_bench::session::{Extent, Place, Session};
use exd_bench::trace::Trace;
use exd_bench::workload::{self, Body, Workload};
use exd_bench::{plot, readme};
use exd_guest_tests::{Programs, programs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Measures EXD against raw files and qcow2, with the same vhost-user client taking turns.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench", max_term_width = 100)]
struct Args {
    /// Two minutes: fewer workloads, targets, runs and requests
    #[arg(long)]
    quick: bool,

    /// Only workloads whose names begin with one of these; `--list` shows them
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    only: Vec<String>,

    /// Only these targets
    #[arg(long, value_name = "TARGET", value_delimiter = ',')]
    targets_only: Vec<String>,

    /// Runs of each workload; default: 7, of the trace 15; with --quick 3
    #[arg(long, value_name = "N")]
    runs: Option<usize>,

    /// Minutes after which workloads get fewer runs: at least 3, with --quick 1. The default is 20, with --quick
    /// 2; by default workloads with a goal get 7 all the same
    #[arg(long, value_name = "MINUTES")]
    budget: Option<f64>,

    /// Directory for the images: chooses the file system that is measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// As root: make a file system of this kind on a loop device over a fully written file of 12 GiB in
    /// the directory, which is kept, and measure there. Bytes and flushes of the device are then exact
    #[arg(long = "loop", value_name = "KIND", value_parser = LOOP_KINDS)]
    loop_kind: Option<String>,

    /// Trace to replay instead of the install trace; alone, replays nothing else
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Argument passed on to vhost-daemon
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    daemon_arg: Vec<String>,

    /// Print the numbers to reach and which of them are
    #[arg(long)]
    targets: bool,

    /// Put the results, or those of --show, into tests/bench/results and into the README
    #[arg(long)]
    readme: bool,

    /// Results file; the plots go beside it. Default: bench/DATE.json in the target directory
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Show the results of this file instead of measuring; of several, the last that has a workload
    /// counts for it
    #[arg(long, value_name = "FILE")]
    show: Vec<PathBuf>,

    /// List the workloads
    #[arg(long)]
    list: bool,
}

const QUICK_TARGETS: [Target; 4] = [Target::Exd, Target::Raw, Target::Full, Target::Qcow2];
/// Runs of a workload: a bound of 95 % needs 6.
const RUNS: usize = 7;
/// Fewest runs of a workload without a goal when it is late, and of all where a budget was named.
const RUNS_LEAST: usize = 3;
/// Runs after which only the best variant of qcow2 goes on.
const RUNS_TRIAL: usize = 3;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.list {
        for workload in workload::all() {
            let extra = if workload.extra { " (only where it is named)" } else { "" };
            println!("{:<18} {}{extra}", workload.name, workload.about);
        }
        return Ok(());
    }
    let results = match args.show.split_first() {
        Some((first, others)) => {
            let mut results = Results::read(first)?;
            for file in others {
                results.replace(Results::read(file)?);
            }
            show(&results);
            results
        }
        None => measure(args)?,
    };
    if args.targets {
        print!("{}", goals_table(&results));
    }
    if args.readme {
        readme::publish(&results)?;
    }
    Ok(())
}

/// The command line as others would type it: where files lie is nobody's concern.
fn without_paths(args: impl Iterator<Item = String>) -> String {
    let with_value = ["--dir", "--output", "--trace"];
    let mut kept = Vec::new();
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        let name = arg.split('=').next().unwrap_or_default();
        if !with_value.contains(&name) {
            kept.push(arg);
        } else if name == arg {
            args.next();
        }
    }
    kept.join(" ")
}

fn about(name: &str) -> &'static str {
    let all = workload::all();
    all.iter().find(|workload| workload.name == name).map_or("", |workload| workload.about)
}

fn show(results: &Results) {
    for line in results.machine.lines() {
        println!("{line}");
    }
    println!("{LEGEND}");
    for name in results.workloads() {
        print!("{}", results.table(name, about(name)));
        if let Some(line) = results.counted(name) {
            println!("{line}");
        }
    }
}

fn measure(args: &Args) -> Result<Results> {
    let chosen = choose(args)?;
    let parent = args.dir.clone().unwrap_or_else(|| programs::target().join("bench"));
    std::fs::create_dir_all(&parent)?;
    let built = Programs::build()?;
    let own = args.loop_kind.as_ref().map(|kind| {
        println!("Making {kind} on a loop device");
        LoopFileSystem::make(&parent, kind)
    });
    let own = own.transpose()?;
    let parent = own.as_ref().map_or(&*parent, LoopFileSystem::dir);
    let scratch = tempfile::Builder::new().prefix("images-").tempdir_in(parent)?;
    let dir = scratch.path().to_owned();
    let memory = tempfile::Builder::new().prefix("exd-bench-").tempdir_in("/dev/shm")?;
    let trace = read_trace(args, &chosen)?;
    let machine = Machine::of(&dir, &Device::of(&dir)?.name);
    let command = without_paths(std::env::args().skip(1));
    let mut results = Results { machine, command, samples: Vec::new() };
    for line in results.machine.lines() {
        println!("{line}");
    }
    println!("{LEGEND}");
    let place = Place { dir: &dir, memory: memory.path() };
    let limit = Duration::from_millis(400);
    let extent = Extent { limit, divisor: if args.quick { 4 } else { 1 } };
    let daemon_args = args.daemon_arg.clone();
    let mut session = Session::new(built, place, trace, extent, daemon_args)?;
    let output = args.output.clone().unwrap_or_else(|| output_name(&results.machine));
    if let Some(parent) = output.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let begun = Instant::now();
    let budget = args.budget.unwrap_or(if args.quick { 2.0 } else { 20.0 }) * 60.0;
    let groups: Vec<&[Workload]> = chosen.chunk_by(|a, b| a.group == b.group).collect();
    let weight = |group: &[Workload]| group.iter().map(weight).sum::<f64>();
    let all: f64 = groups.iter().copied().map(weight).sum();
    let mut share = 0.0;
    for group in groups {
        share += weight(group) / all;
        let end = begun + Duration::from_secs_f64(budget * share);
        take_turns(args, &mut session, group, end, &mut results)?;
        for workload in group {
            print!("{}", results.table(workload.name, workload.about));
            if let Some(line) = results.counted(workload.name) {
                println!("{line}");
            }
            println!("{}", results.spent(workload.name));
            session.forget(workload)?;
        }
        // Each time: a run that is stopped has not been for nothing.
        results.write(&output)?;
    }
    println!("\n{:.0} s; load {}", begun.elapsed().as_secs_f64(), load());
    drop((session, scratch, own));
    plot::write(&results, &output)?;
    println!("Written: {} and the charts beside it", output.display());
    Ok(results)
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

fn output_name(machine: &Machine) -> PathBuf {
    let date: String = machine.date.chars().filter(|c| c.is_ascii_digit() || *c == '-').collect();
    programs::target().join("bench").join(format!("{date}.json"))
}

fn choose(args: &Args) -> Result<Vec<Workload>> {
    let wanted = |workload: &Workload| {
        let named = args.only.iter().any(|name| workload.name.starts_with(name.as_str()));
        let by_trace = args.trace.is_some() && matches!(workload.body, Body::Trace(_));
        match (args.only.is_empty(), args.trace.is_some()) {
            (false, _) => named,
            (true, true) => by_trace,
            (true, false) if args.quick => workload.quick,
            (true, false) => !workload.extra,
        }
    };
    let list: Vec<Workload> = workload::all().into_iter().filter(wanted).collect();
    if list.is_empty() { Err("no such workload; --list shows them".into()) } else { Ok(list) }
}

fn read_trace(args: &Args, chosen: &[Workload]) -> Result<Option<Trace>> {
    if !chosen.iter().any(|workload| matches!(workload.body, Body::Trace(_))) {
        return Ok(None);
    }
    let fixture = Path::new("fixtures/traces/debian-install.trace.xz");
    let path = args.trace.clone().unwrap_or_else(|| programs::workspace().join(fixture));
    let trace = Trace::read(&path)?;
    if trace.missing > 0 {
        println!("{}: the recorder lost {} requests", path.display(), trace.missing);
    }
    Ok(Some(trace))
}

/// How much of the time a workload may take.
fn weight(workload: &Workload) -> f64 {
    let targets = workload.targets.len() as f64;
    match workload.body {
        Body::Trace(_) => targets * 4.0,
        Body::Pattern(_) => targets,
    }
}

fn targets(args: &Args, workload: &Workload) -> Vec<Target> {
    let quick = |target: &Target| !args.quick || QUICK_TARGETS.contains(target);
    let named = |target: &Target| {
        let names = &args.targets_only;
        names.is_empty() || names.iter().any(|name| name == target.name())
    };
    let list = workload.targets.iter().copied();
    list.filter(|target| if args.targets_only.is_empty() { quick(target) } else { named(target) })
        .collect()
}

/// How many runs a workload gets of a target at most, and how many however late it is.
fn runs(args: &Args, workload: &Workload) -> (usize, usize) {
    let most = match (&workload.body, args.quick) {
        (_, true) => 3,
        (Body::Trace(_), _) => 15,
        _ => RUNS,
    };
    let least = match args.budget {
        _ if args.quick => 1,
        None if workload.goal => RUNS,
        _ => RUNS_LEAST,
    };
    args.runs.map_or((most, least), |runs| (runs, runs))
}

/// Who is here only for the best variant of qcow2, or for comparison. Where the trace is compared, default
/// qcow2 is one of them.
fn is_variant(workload: &Workload, target: Target) -> bool {
    match target {
        Target::Qcow2 => matches!(workload.body, Body::Trace(_)),
        Target::OwnRaw => workload.targets.len() > 5,
        _ => Target::QCOW2.contains(&target),
    }
}

/// Whether a variant gets one more run: after a few, only the best one of qcow2 does, and no more than a
/// bound needs.
fn variant_goes_on(results: &Results, workload: &Workload, target: Target, run: usize) -> bool {
    run < RUNS_TRIAL || run < RUNS && results.best_qcow2(workload.name, RUNS_TRIAL) == Some(target)
}

/// Runs the workloads of a group on all their targets in turn, again and again; each round begins with
/// another one.
fn take_turns(
    args: &Args,
    session: &mut Session,
    group: &[Workload],
    end: Instant,
    results: &mut Results,
) -> Result<()> {
    // Those who are compared with each other are neighbours.
    let mut cells: Vec<(&Workload, Target)> = Vec::new();
    for target in Target::ALL {
        let with = group.iter().filter(|workload| targets(args, workload).contains(&target));
        cells.extend(with.map(|workload| (workload, target)));
    }
    let all = group.iter().map(|workload| runs(args, workload).0).max().unwrap_or(0);
    for run in 0..all {
        let late = Instant::now() > end;
        for index in 0..cells.len() {
            let (workload, target) = cells[(index + run) % cells.len()];
            let (most, least) = runs(args, workload);
            let over = run >= most || late && run >= least;
            let idle = args.runs.is_none()
                && is_variant(workload, target)
                && !variant_goes_on(results, workload, target, run);
            if !over && !idle {
                results.samples.push(session.run(workload, target, run)?);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_not_published() {
        let line =
            ["--runs", "7", "--dir", "/a", "--output=/b", "--only", "durable", "--trace", "/c"];
        let kept = without_paths(line.into_iter().map(str::to_owned));
        assert_eq!(kept, "--runs 7 --only durable");
    }
}
