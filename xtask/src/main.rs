//! The tasks of this repository: `cargo xtask`.
//!
//! Standard library only, so that the first command on a fresh machine starts at once.

#![forbid(unsafe_code)]

mod counts;
mod debian;
mod fuzz;
mod setup;
mod shell;
mod stages;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask COMMAND

  demo                show what EXD does: a Linux guest on an EXD disk, a SIGKILL, nothing lost
  test [STAGE..]      install what is missing and run every test, or only the named stages
  setup               install what the two commands above need
  fuzz [--seconds N]  run each fuzz target for N seconds (60)
  bench [OPTION..]    measure against raw files and qcow2; --help shows the options
  installer-bench     have a guest unpack Debian packages on EXD, raw and qcow2; --help: options
  counts              compare instruction counts of the engine's hot paths with their bounds
  sim --seeds A..B    run the simulator's long search over these seeds
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["demo"] => demo(),
        ["test", stages @ ..] => stages::run(stages),
        ["setup"] => setup::everything(),
        ["fuzz"] => fuzz::run(60),
        ["fuzz", "--seconds", seconds] => match seconds.parse() {
            Ok(seconds) => fuzz::run(seconds),
            Err(_) => Err(format!("not a number of seconds: {seconds}")),
        },
        ["bench", arguments @ ..] => bench(arguments),
        ["installer-bench", arguments @ ..] => installer_bench(arguments),
        ["counts"] => counts::run(),
        ["sim", arguments @ ..] => simulator(arguments),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Installs what the guest needs, builds the programs and runs the demonstration.
fn demo() -> Result<(), String> {
    setup::guest()?;
    println!("Building the programs (release mode; a few minutes the first time)");
    let packages = ["-p", "imgtool", "-p", "vhost-daemon", "-p", "exd-guest-tests", "--bins"];
    shell::show(shell::cargo().args(["build", "--release"]).args(packages))?;
    shell::show(&mut shell::command(shell::target().join("release/exd-demo")))
}

/// Builds the programs and measures.
fn bench(arguments: &[&str]) -> Result<(), String> {
    setup::bench()?;
    let packages = ["-p", "imgtool", "-p", "vhost-daemon", "-p", "exd-bench", "--bins"];
    shell::show(shell::cargo().args(["build", "--quiet", "--release"]).args(packages))?;
    let programs = shell::target().join("release");
    let mut bench = shell::command(programs.join("exd-bench"));
    shell::show(bench.env("EXD_BIN_DIR", programs).args(arguments))
}

/// Fetches the packages, builds the programs and has a guest unpack the packages.
fn installer_bench(arguments: &[&str]) -> Result<(), String> {
    setup::guest()?;
    let packages = setup::installer_packages()?;
    let build = ["-p", "imgtool", "-p", "vhost-daemon", "-p", "exd-guest-tests", "-p", "exd-bench"];
    shell::show(shell::cargo().args(["build", "--quiet", "--release", "--bins"]).args(build))?;
    let programs = shell::target().join("release");
    let mut bench = shell::command(programs.join("exd-installer-bench"));
    bench.arg("--packages").arg(packages).args(arguments);
    shell::show(bench.env("EXD_BIN_DIR", programs))
}

fn simulator(arguments: &[&str]) -> Result<(), String> {
    // With the feature, sessions also begin in the ways that are rare otherwise.
    let package = ["--release", "-p", "exd-sim", "--features", "seeded-bugs", "--bin", "sim", "--"];
    shell::show(shell::cargo().arg("run").args(package).args(arguments))
}
