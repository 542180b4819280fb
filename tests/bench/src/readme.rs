//! Results that are published: the file, the charts, and the table of the README.

use crate::Result;
use crate::plot;
use crate::report::{Results, goals_table, markdown};
use exd_guest_tests::programs;
use std::fmt::Write;
use std::fs;

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

/// Puts the results into tests/bench/results and into the README between its two marks.
pub fn publish(results: &Results) -> Result<()> {
    let root = programs::workspace();
    let dir = root.join("tests/bench/results");
    fs::create_dir_all(&dir)?;
    let date = results.machine.date.split(' ').next().unwrap_or_default();
    let kind = results.machine.kind();
    let name = format!("{date}-{kind}");
    let file = dir.join(format!("{name}.json"));
    results.write(&file)?;
    plot::write(results, &file)?;
    // Only text is kept in the repository.
    fs::remove_file(file.with_extension("png"))?;
    let mut table = markdown(results);
    let _ = writeln!(table, "\n![Speed relative to raw](tests/bench/results/{name}.svg)");
    let _ = writeln!(table, "\n<details><summary>Against the goals</summary>\n");
    let _ = writeln!(table, "```{}```\n\n</details>", goals_table(results));
    replace("bench", &table)?;
    println!("Published: {} and the README", file.display());
    Ok(())
}
