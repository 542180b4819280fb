//! `cargo xtask installer-bench`.

#![forbid(unsafe_code)]

use clap::Parser;
use exd_bench::Result;
use exd_bench::backend::Target;
use exd_bench::host::Machine;
use exd_bench::installer::{self, STARTS, Step, TARGETS, Tree};
use exd_bench::measure::Device;
use exd_bench::stats::{Estimate, estimate};
use exd_guest_tests::{Kit, Programs, programs};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Has a Linux guest unpack Debian packages on EXD, raw and qcow2, at sectors 2048 and 63. EXD_QEMU_ACCEL
/// chooses the accelerator (tcg).
#[derive(Parser, Debug)]
#[command(name = "cargo xtask installer-bench", max_term_width = 100)]
struct Args {
    /// Directory with the packages' files
    #[arg(long, value_name = "DIR")]
    packages: PathBuf,

    /// Guests, each with new images
    #[arg(long, value_name = "N", default_value_t = 1)]
    runs: usize,

    /// Directory for the images: chooses the file system that is measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Results file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
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
    let tree = Tree::build(&scratch.path().join("tree"), &args.packages)?;
    let mut steps = Vec::new();
    for number in 0..args.runs {
        steps.extend(installer::run(&built, &kit, &tree, scratch.path(), number)?);
    }
    print_table(&steps);
    if let Some(output) = &args.output {
        let results = json!({ "machine": machine, "accelerator": accelerator, "steps": steps });
        std::fs::write(output, format!("{results}\n"))?;
        println!("Written: {}", output.display());
    }
    Ok(())
}

fn print_table(steps: &[Step]) {
    println!(
        "\n{:<8} {:>6} {:>8} {:>8} {:>20} {:>20}",
        "", "sector", "wall s", "busy s", "wall : raw [95 %]", "busy : raw [95 %]"
    );
    for start in STARTS {
        for target in TARGETS {
            let own = || steps.iter().filter(move |s| (s.target, s.start) == (target, start));
            println!(
                "{:<8} {start:>6} {:>8.1} {:>8.1} {:>20} {:>20}",
                target.name(),
                own().map(|step| step.wall).sum::<f64>(),
                own().map(|step| step.busy).sum::<f64>(),
                text(ratio(steps, target, start, |step| step.wall)),
                text(ratio(steps, target, start, |step| step.busy)),
            );
        }
    }
    println!(
        "Seconds for all packages together; ratios package by package: their median and 95 % interval."
    );
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

fn text(estimate: Option<Estimate>) -> String {
    estimate.map_or("-".to_owned(), |estimate| {
        let (low, high) = estimate.bounds;
        format!("{:.2} [{low:.2}-{high:.2}]", estimate.median)
    })
}
