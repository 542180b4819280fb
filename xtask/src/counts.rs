//! `cargo xtask counts`: instructions of the engine's hot paths, counted by callgrind, against the bounds
//! in `image/benches/counts.txt`. Counts do not depend on what else the machine does, as times would.

use crate::shell;
use std::path::{Path, PathBuf};

const BOUNDS: &str = "image/benches/counts.txt";
/// Above the count that was noted, a count may be higher by so many percent: compilers differ, too.
const SLACK_PERCENT: u64 = 15;

/// A line of the bounds.
struct Bound {
    /// The bench that has it.
    bench: String,
    /// What it calls it.
    name: String,
    /// Steps of the two runs whose difference counts: setting up is the same in both.
    steps: [u64; 2],
    /// Instructions of one step when they were counted last.
    noted: u64,
}

/// Counts and compares.
pub fn run() -> Result<(), String> {
    let Some(valgrind) = shell::find("valgrind") else {
        println!("Skipped: instructions are counted by valgrind, which is not installed");
        return Ok(());
    };
    let bounds = bounds()?;
    let mut worse = Vec::new();
    println!("{:<20} {:>8} {:>8}", "instructions a step", "noted", "now");
    for bound in &bounds {
        let program = program(&bound.bench)?;
        let [few, many] = bound.steps;
        let count = |steps| instructions(&valgrind, &program, &bound.name, steps);
        let now = count(many)?.saturating_sub(count(few)?) / (many - few);
        println!("{:<20} {:>8} {now:>8}", bound.name, bound.noted);
        if now * 100 > bound.noted * (100 + SLACK_PERCENT) {
            worse.push(format!("{}: {now}, was {}", bound.name, bound.noted));
        }
    }
    if worse.is_empty() {
        return Ok(());
    }
    Err(format!(
        "more than {SLACK_PERCENT} % above {BOUNDS} ({}): if that is worth it, note the new counts there",
        worse.join("; ")
    ))
}

fn bounds() -> Result<Vec<Bound>, String> {
    let path = shell::workspace().join(BOUNDS);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| parse(line).ok_or_else(|| format!("{BOUNDS}: {line}"))).collect()
}

fn parse(line: &str) -> Option<Bound> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [bench, name, few, many, noted] = words[..] else { return None };
    let steps = [few.parse().ok()?, many.parse().ok()?];
    let bound = Bound { bench: bench.into(), name: name.into(), steps, noted: noted.parse().ok()? };
    (steps[0] < steps[1]).then_some(bound)
}

/// Builds a bench, and finds where it is.
fn program(bench: &str) -> Result<PathBuf, String> {
    let mut build = shell::cargo();
    build.args(["bench", "-p", "exd-image", "--features", "measure", "--no-run", "--bench", bench]);
    let output = build.output().map_err(|error| format!("{}: {error}", shell::line(&build)))?;
    let told = String::from_utf8_lossy(&output.stderr);
    let path = told.lines().find_map(|line| {
        let (_, path) = line.split_once("Executable ")?.1.split_once('(')?;
        Some(shell::workspace().join(path.strip_suffix(')')?))
    });
    path.filter(|_| output.status.success())
        .ok_or_else(|| format!("{}: {}\n{told}", shell::line(&build), output.status))
}

fn instructions(valgrind: &Path, program: &Path, name: &str, steps: u64) -> Result<u64, String> {
    let mut command = shell::command(valgrind);
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(program).args(["count", name, &steps.to_string()]);
    let output = command.output().map_err(|error| format!("{}: {error}", shell::line(&command)))?;
    let told = String::from_utf8_lossy(&output.stderr);
    told.lines()
        .filter(|_| output.status.success())
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .ok_or_else(|| format!("{}: {}\n{told}", shell::line(&command), output.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_can_be_read() {
        assert!(!bounds().expect("they are well-formed").is_empty());
        assert!(parse("map lookup 10 5 77").is_none());
        assert!(parse("map lookup 10").is_none());
    }
}
