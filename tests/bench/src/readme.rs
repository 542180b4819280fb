//! Results that are published: the file, the charts, and the table of the README.

use crate::Result;
use crate::backend::Target;
use crate::plot;
use crate::report::{Results, goals_table, markdown, thousands};
use crate::session::Sample;
use exd_guest_tests::programs;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Replaces what is between the two marks of this name in the README.
pub fn replace(mark: &str, content: &str) -> Result<()> {
    let path = programs::workspace().join("README.md");
    let text = fs::read_to_string(&path)?;
    let (begin, end) = (format!("<!-- {mark}: begin -->\n"), format!("<!-- {mark}: end -->\n"));
    let parts = text.split_once(&begin);
    let parts = parts.and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = parts.ok_or_else(|| format!("README.md has not the marks {mark}"))?;
    Ok(fs::write(&path, format!("{before}{begin}{content}{end}{after}"))?)
}

/// Puts the results into tests/bench/results and into the README between its two marks. What was measured on
/// a file system of our own has a table beside the main one.
pub fn publish(results: &Results) -> Result<()> {
    let root = programs::workspace();
    let dir = root.join("tests/bench/results");
    fs::create_dir_all(&dir)?;
    let date = results.machine.date.split(' ').next().unwrap_or_default();
    let is_loop = results.machine.is_loop();
    let kind = results.machine.kind() + if is_loop { "-loop" } else { "" };
    let name = format!("{date}-{kind}");
    let file = dir.join(format!("{name}.json"));
    results.write(&file)?;
    if is_loop {
        replace("file-systems", &file_systems(&read_loops(&dir)?))?;
    } else {
        plot::write(results, &file)?;
        // Only text is kept in the repository.
        fs::remove_file(file.with_extension("png"))?;
        let mut table = markdown(results);
        let _ = writeln!(table, "\n![Speed relative to raw](tests/bench/results/{name}.svg)");
        let _ = writeln!(table, "\n<details><summary>Against the goals</summary>\n");
        let _ = writeln!(table, "```{}```\n\n</details>", goals_table(results));
        replace("bench", &table)?;
    }
    println!("Published: {} and the README", file.display());
    Ok(())
}

/// The latest published results of each kind of file system on a loop device.
fn read_loops(dir: &Path) -> Result<Vec<Results>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.to_string_lossy().ends_with("-loop.json"));
    files.sort();
    let mut latest = BTreeMap::new();
    for file in files {
        let results = Results::read(&file)?;
        latest.insert(results.machine.kind(), results);
    }
    Ok(latest.into_values().collect())
}

/// Their table: a column of EXD and one of each raw file for each of them.
fn file_systems(all: &[Results]) -> String {
    const RAW: [(Target, &str); 2] = [(Target::Raw, "raw"), (Target::Full, "written before")];
    let mut text = String::from("Each kind of file system by itself, on a loop device (`--loop`):");
    for results in all {
        let machine = &results.machine;
        let counts = results.workloads();
        let counts = counts.iter().map(|name| results.of(name, Target::Exd).count());
        let _ = write!(
            text,
            " {} {}, commit {}, at least {} runs;",
            machine.kind(),
            machine.date,
            machine.commit,
            counts.min().unwrap_or(0),
        );
    }
    text += " ratios to raw on the same file system, run by run, with the 95 % interval where there are 6 \
             runs, else the range.\n\n| requests per second |";
    let mut line = String::from("\n|---|");
    for results in all {
        let kind = results.machine.kind();
        let _ = write!(text, " {kind}: exd (x raw) |");
        RAW.iter().for_each(|(_, name)| {
            let _ = write!(text, " {name} |");
        });
        line += "---|---|---|";
    }
    text += &(line + "\n");
    let mut names: Vec<&str> = Vec::new();
    for name in all.iter().flat_map(Results::workloads) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in names {
        let _ = write!(text, "| {name} |");
        for results in all {
            let rate = |target| results.median(name, target, Sample::rate);
            let show = |rate: Option<f64>| rate.map_or("-".to_owned(), thousands);
            let ratio = results.ratio((name, Target::Exd), (name, Target::Raw), Sample::rate);
            let ratio = ratio.map_or(String::new(), |ratio| {
                format!(" ({:.2} [{:.2}-{:.2}])", ratio.median, ratio.bounds.0, ratio.bounds.1)
            });
            let _ = write!(text, " {}{ratio} |", show(rate(Target::Exd)));
            RAW.iter().for_each(|(target, _)| {
                let _ = write!(text, " {} |", show(rate(*target)));
            });
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Machine;

    #[test]
    fn file_systems_are_columns() {
        let on = |file_system: &str, journal: &str| Results {
            machine: Machine {
                file_system: file_system.into(),
                journal_task: journal.into(),
                device: "loop3".into(),
                ..Machine::default()
            },
            ..Results::default()
        };
        let (mut ext4, mut xfs) = (on("ext4 rw", "71"), on("xfs rw", "-"));
        for run in 0..7 {
            ext4.samples.push(Sample::example("durable", Target::Exd, run, 0.5));
            ext4.samples.push(Sample::example("durable", Target::Raw, run, 1.0));
            xfs.samples.push(Sample::example("flush-32", Target::Exd, run, 1.0));
        }
        let text = file_systems(&[ext4, xfs]);
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
        let columns: Vec<usize> = rows.iter().map(|row| row.matches('|').count()).collect();
        assert_eq!(columns, [8, 8, 8], "{text}");
        assert!(rows[0].contains("ext4-journal: exd") && rows[0].contains("xfs: exd"), "{text}");
        assert_eq!(rows[1], "| durable | 2.0 k (2.00 [2.00-2.00]) | 1.0 k | - | - | - | - |");
        assert_eq!(rows[2], "| flush-32 | - | - | - | 1.0 k | - | - |");
    }
}
