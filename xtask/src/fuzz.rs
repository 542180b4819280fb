//! The fuzz targets.

use crate::{setup, shell};
use std::process::Command;

/// Runs each target for `seconds`.
pub fn run(seconds: u64) -> Result<(), String> {
    let dir = shell::workspace().join("tests/fuzz");
    // cargo-fuzz knows no --locked: it would mend a lock file that has fallen behind.
    let metadata = ["metadata", "--locked", "--format-version", "1"];
    shell::output(shell::cargo().args(metadata).current_dir(&dir))?;
    if let Err(error) = setup::fuzzer() {
        println!("No coverage-guided fuzzing, random inputs instead: {error}");
        return plain_loops(seconds);
    }
    let cargo_fuzz = setup::cargo_fuzz().ok_or("cargo-fuzz is not where it was installed")?;
    let fuzz = |arguments: &[&str]| {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly"]).arg(&cargo_fuzz).arg("fuzz").args(arguments);
        // cargo's own variable would lead cargo-fuzz back to the stable compiler.
        command.current_dir(&dir).env_remove("CARGO");
        command
    };
    let list = shell::output(&mut fuzz(&["list", "--fuzz-dir", "."]))?;
    let mut failed = Vec::new();
    for target in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        println!("fuzz target {target}, {seconds} s");
        let time = format!("-max_total_time={seconds}");
        // No input may drive a large allocation, however large the lengths it names.
        let memory = ["-rss_limit_mb=1024", "-malloc_limit_mb=256"];
        // A line for each input found would push everything else out of a log that is kept in part.
        let limits = ["--", &time, "-timeout=10", "-print_final_stats=1", "-verbosity=0"];
        // What the fuzzer finds goes to the first directory; the seeds stay as they are.
        let corpus = dir.join("corpus").join(target);
        std::fs::create_dir_all(&corpus).map_err(|e| format!("{}: {e}", corpus.display()))?;
        let seeds = shell::workspace().join("fixtures/fuzz-seeds").join(target);
        let mut run = fuzz(&["run", "--fuzz-dir", ".", target]);
        run.arg(corpus).args(seeds.is_dir().then_some(seeds)).args(limits).args(memory);
        if shell::show(&mut run).is_err() {
            failed.push(target.to_owned());
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(" "))) }
}

/// The same targets on random inputs, with a stable compiler.
fn plain_loops(seconds: u64) -> Result<(), String> {
    let manifest = ["--manifest-path", "tests/fuzz/Cargo.toml", "--bin", "plain"];
    let seconds = seconds.to_string();
    shell::show(shell::cargo().args(["run", "--release"]).args(manifest).args(["--", &seconds]))
}
