//! `cargo xtask installer-bench`.

#![forbid(unsafe_code)]

use clap::Parser;
use exd_bench::Result;
use exd_bench::backend::Target;
use exd_bench::host::Machine;
use exd_bench::installer::{self, STARTS, Step, TARGETS, Tree};
use exd_bench::measure::Device;
use exd_bench::readme;
use exd_bench::stats::{Estimate, estimate};
use exd_guest_tests::{Kit, Programs, programs};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::ExitCode;

/// Has a Linux guest unpack Debian packages on EXD, raw and qcow2, at sectors 2048 and 63. EXD_QEMU_ACCEL
/// chooses the accelerator (tcg).
#[derive(Parser, Debug)]
#[command(name = "cargo xtask installer-bench", max_term_width = 100)]
struct Args {
    /// Directory with the packages' files
    #[arg(long, value_name = "DIR")]
    packages: Option<PathBuf>,

    /// Guests, each with new images
    #[arg(long, value_name = "N", default_value_t = 1)]
    runs: usize,

    /// Directory for the images: chooses the file system that is measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Results file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Put the results into tests/bench/results and the table into the README
    #[arg(long)]
    readme: bool,

    /// Show the results of this file instead of measuring
    #[arg(long, value_name = "FILE")]
    show: Option<PathBuf>,
}

/// What was measured.
#[derive(Serialize, Deserialize)]
struct Results {
    machine: Machine,
    accelerator: String,
    steps: Vec<Step>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("installer-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let results = match &args.show {
        Some(file) => serde_json::from_str(&std::fs::read_to_string(file)?)?,
        None => measure(args)?,
    };
    println!("\n{}", table(&results));
    let text = serde_json::to_string(&results)? + "\n";
    if let Some(output) = &args.output {
        std::fs::write(output, &text)?;
        println!("Written: {}", output.display());
    }
    if args.readme {
        let dir = programs::workspace().join("tests/bench/results");
        std::fs::create_dir_all(&dir)?;
        let date = results.machine.date.split(' ').next().unwrap_or_default();
        std::fs::write(dir.join(format!("{date}-installer.json")), text)?;
        readme::replace("installer", &table(&results))?;
    }
    Ok(())
}

fn measure(args: &Args) -> Result<Results> {
    let packages = args.packages.as_ref().ok_or("--packages is missing")?;
    let parent = args.dir.clone().unwrap_or_else(|| programs::target().join("bench"));
    std::fs::create_dir_all(&parent)?;
    let scratch = tempfile::Builder::new().prefix("installer-").tempdir_in(&parent)?;
    let machine = Machine::of(scratch.path(), &Device::of(scratch.path())?.name);
    for line in machine.lines() {
        println!("{line}");
    }
    let accelerator = std::env::var("EXD_QEMU_ACCEL").unwrap_or_else(|_| "tcg".into());
    println!("accelerator: {accelerator}");
    let built = Programs::build()?;
    let kit = Kit::prepare(&built)?;
    let tree = Tree::build(&scratch.path().join("tree"), packages)?;
    let mut steps = Vec::new();
    for number in 0..args.runs {
        steps.extend(installer::run(&built, &kit, &tree, scratch.path(), number)?);
    }
    Ok(Results { machine, accelerator, steps })
}

/// The table, in Markdown.
fn table(results: &Results) -> String {
    let Results { machine, accelerator, steps } = results;
    let mut packages: Vec<&str> = steps.iter().map(|step| step.package.as_str()).collect();
    packages.sort_unstable();
    packages.dedup();
    let guests = steps.iter().map(|step| step.run + 1).max().unwrap_or(0);
    let mut text = format!(
        "Guest's time for dpkg to unpack {} packages with its own syncs, {} ({accelerator}), {guests} \
         guest(s), commit {}, load {} when it began; wall and disk-busy seconds for all packages, ratios \
         package by package: median and 95 % interval.\n\n",
        packages.len(),
        machine.date,
        machine.commit,
        machine.load.split(' ').next().unwrap_or_default(),
    );
    text += "| disk | sector | wall s | busy s | wall : raw | busy : raw |\n|---|---|---|---|---|---|\n";
    for start in STARTS {
        for target in TARGETS {
            let own = || steps.iter().filter(move |s| (s.target, s.start) == (target, start));
            text += &format!(
                "| {} | {start} | {:.1} | {:.1} | {} | {} |\n",
                target.name(),
                own().map(|step| step.wall).sum::<f64>(),
                own().map(|step| step.busy).sum::<f64>(),
                cell(ratio(steps, target, start, |step| step.wall)),
                cell(ratio(steps, target, start, |step| step.busy)),
            );
        }
    }
    text
}

/// The ratio to raw at the same sector, package by package.
fn ratio(steps: &[Step], target: Target, start: u64, figure: fn(&Step) -> f64) -> Option<Estimate> {
    let own = steps.iter().filter(|step| (step.target, step.start) == (target, start));
    let pairs = own.filter_map(|step| {
        let same = |other: &&Step| {
            (other.target, other.start) == (Target::Raw, start)
                && (&other.package, other.run) == (&step.package, step.run)
        };
        let other = figure(steps.iter().find(same)?);
        (other > 0.0).then(|| figure(step) / other)
    });
    estimate(&pairs.collect::<Vec<f64>>())
}

fn cell(estimate: Option<Estimate>) -> String {
    estimate.map_or("-".to_owned(), |estimate| {
        let (low, high) = estimate.bounds;
        format!("{:.2} [{low:.2}-{high:.2}]", estimate.median)
    })
}
