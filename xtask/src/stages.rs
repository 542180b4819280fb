//! `cargo xtask test`: everything, stage by stage, with a summary.

use crate::{counts, fuzz, setup, shell};
use std::time::{Duration, Instant};

/// Packages whose tests are stages of their own.
const OWN_STAGES: [&str; 3] = ["exd-sim", "exd-system-tests", "exd-guest-tests"];
/// Seconds for each fuzz target.
const FUZZ_SECONDS: u64 = 60;
/// Lines of a failed test that are shown again under the summary: the message and a seed, not a whole log.
const SHOWN_AGAIN: usize = 40;

type Run = fn(&mut Tally) -> Result<(), String>;

const STAGES: [(&str, Run); 12] = [
    ("setup", |_| setup::everything()),
    ("format", |_| formatting()),
    ("lint", |_| lint()),
    ("documentation", |_| documentation()),
    ("build", |_| shell::show(shell::cargo().args(["build", "--release"]))),
    ("unit", unit_tests),
    ("counts", |_| counts::run()),
    ("simulator", |tally| tests(&["-p", "exd-sim", "--features", "seeded-bugs"], tally)),
    ("system", |tally| tests(&["-p", "exd-system-tests"], tally)),
    ("decoder", decoder_tests),
    ("fuzz", |_| fuzz::run(FUZZ_SECONDS)),
    ("guest", guest_tests),
];

/// Tests counted in a stage's output.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    /// What each failed test printed, beginning with the line that names it.
    failures: Vec<Vec<String>>,
    /// Lines belong to the last of `failures`.
    in_failure: bool,
}

impl Tally {
    /// Takes cargo's `test result: ok. 3 passed; 0 failed; ..`, and what stands between
    /// `---- name stdout ----` and the list of names after the last of these.
    fn see(&mut self, line: &str) {
        if line.starts_with("---- ") && line.ends_with(" ----") {
            self.failures.push(Vec::new());
            self.in_failure = true;
        } else if line == "failures:" {
            self.in_failure = false;
        }
        if let Some(failure) = self.failures.last_mut().filter(|_| self.in_failure)
            && failure.len() < SHOWN_AGAIN
            && !line.is_empty()
        {
            failure.push(line.to_owned());
        }
        let Some((_, counts)) = line.split_once("test result: ") else { return };
        let count = |name: &str| {
            let (before, _) = counts.split_once(name)?;
            before.split_whitespace().next_back()?.parse::<u64>().ok()
        };
        self.passed += count(" passed").unwrap_or(0);
        self.failed += count(" failed").unwrap_or(0);
    }
}

/// Runs the named stages, or all of them. A failure stops nothing, and the last line counts.
pub fn run(names: &[&str]) -> Result<(), String> {
    let known = STAGES.map(|(name, _)| name);
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        return Err(format!("no stage {unknown}; there are: {}", known.join(" ")));
    }
    let chosen: Vec<(&str, Run)> =
        STAGES.into_iter().filter(|(name, _)| names.is_empty() || names.contains(name)).collect();
    let mut summary = Vec::new();
    let mut failures = Vec::new();
    let mut total = Tally::default();
    for (index, (name, run)) in chosen.iter().enumerate() {
        println!("\n=== {}/{} {name}", index + 1, chosen.len());
        let start = Instant::now();
        let mut tally = Tally::default();
        let result = run(&mut tally);
        // A stage without tests to count is one itself; so is what failed outside of a test.
        match &result {
            Ok(()) if tally.passed == 0 => tally.passed = 1,
            Err(_) if tally.failed == 0 => tally.failed = 1,
            _ => {}
        }
        if let Err(error) = result {
            println!("{error}");
            failures.extend(std::mem::take(&mut tally.failures).into_iter().flatten());
            failures.push(format!("{name}: {error}"));
        }
        total.passed += tally.passed;
        total.failed += tally.failed;
        summary.push(line(name, start.elapsed(), &tally));
    }
    if !failures.is_empty() {
        println!("\n=== failures\n{}", failures.join("\n"));
    }
    println!("\n=== summary\n{}", summary.join("\n"));
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed == 0 { Ok(()) } else { Err("not everything passed".into()) }
}

fn line(name: &str, time: Duration, tally: &Tally) -> String {
    let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
    let (passed, failed) = (tally.passed, tally.failed);
    format!(
        "{name:<14} {:>6.1} s  {verdict:<6} {passed} passed, {failed} failed",
        time.as_secs_f32()
    )
}

/// The workspace, and the fuzz targets, which are a workspace of their own.
fn formatting() -> Result<(), String> {
    let fuzz = ["--manifest-path", "tests/fuzz/Cargo.toml"];
    let own = shell::show(shell::cargo().args(["fmt", "--all", "--check"]));
    own.and(shell::show(shell::cargo().arg("fmt").args(fuzz).arg("--check")))
}

fn lint() -> Result<(), String> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--all-features"];
    shell::show(shell::cargo().args(arguments).args(["--", "-D", "warnings"]))
}

fn documentation() -> Result<(), String> {
    let arguments = ["doc", "--workspace", "--no-deps"];
    shell::show(shell::cargo().args(arguments).env("RUSTDOCFLAGS", "-D warnings"))
}

fn tests(arguments: &[&str], tally: &mut Tally) -> Result<(), String> {
    let mut command = shell::cargo();
    shell::watch(command.args(["test", "--no-fail-fast"]).args(arguments), |line| tally.see(line))
}

fn unit_tests(tally: &mut Tally) -> Result<(), String> {
    let excluded = OWN_STAGES.iter().flat_map(|package| ["--exclude", package]);
    let arguments: Vec<&str> = std::iter::once("--workspace").chain(excluded).collect();
    tests(&arguments, tally)
}

/// The decoder written from the specification alone, on the golden images.
fn decoder_tests(_: &mut Tally) -> Result<(), String> {
    let arguments = ["-m", "unittest", "discover", "--start-directory", "tests/decoder"];
    shell::show(shell::command("python3").args(arguments))
}

/// One guest at a time: each uses two processors. The tests on qemu-storage-daemon test the tests; they
/// run by `cargo test -p exd-guest-tests -- --ignored reference`.
fn guest_tests(tally: &mut Tally) -> Result<(), String> {
    let filter = ["--", "--include-ignored", "--skip", "reference", "--test-threads=1"];
    let arguments: Vec<&str> = ["-p", "exd-guest-tests"].into_iter().chain(filter).collect();
    tests(&arguments, tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_results_are_counted() {
        let mut tally = Tally::default();
        tally.see("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out");
        tally.see("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured");
        tally.see("test promise::it_holds ... ok");
        assert_eq!((tally.passed, tally.failed), (15, 2));
        assert!(tally.failures.is_empty());
    }

    #[test]
    fn failed_tests_are_kept_with_what_they_printed() {
        let mut tally = Tally::default();
        let printed = "failures:\n\n---- a::one stdout ----\nseed 7\n\n---- b stdout ----\nlost\n\n\
                       failures:\n    a::one\n    b\n\ntest result: FAILED. 0 passed; 2 failed";
        printed.lines().for_each(|line| tally.see(line));
        let kept = [vec!["---- a::one stdout ----", "seed 7"], vec!["---- b stdout ----", "lost"]];
        assert_eq!(tally.failures, kept);
        tally.see("---- c stdout ----");
        (0..100).for_each(|_| tally.see("line"));
        assert_eq!(tally.failures[2].len(), SHOWN_AGAIN);
    }
}
