//! Results, and how they are shown: a table on the terminal, JSON, Markdown for the README.

use crate::Result;
use crate::backend::Target;
use crate::goals;
use crate::host::Machine;
use crate::session::{Sample, Spent};
use crate::stats::{Estimate, estimate, median};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Everything that a measurement has shown.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// On what.
    pub machine: Machine,
    /// How: the command line.
    pub command: String,
    /// Each run.
    pub samples: Vec<Sample>,
}

/// What is compared of two samples.
pub type Figure = fn(&Sample) -> f64;

impl Results {
    /// Reads a JSON file.
    pub fn read(path: &Path) -> Result<Results> {
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    }

    /// Writes a JSON file.
    pub fn write(&self, path: &Path) -> Result<()> {
        Ok(fs::write(path, serde_json::to_string(self)? + "\n")?)
    }

    /// Takes the workloads of other results instead of its own.
    pub fn replace(&mut self, other: Results) {
        let names: Vec<String> = other.workloads().into_iter().map(str::to_owned).collect();
        self.samples.retain(|sample| !names.contains(&sample.workload));
        if other.machine.commit != self.machine.commit {
            let with = format!(" ({} with {})", names.join(", "), other.machine.commit);
            self.machine.commit += &with;
        }
        self.samples.extend(other.samples);
        let order = crate::workload::all();
        let place = |sample: &Sample| order.iter().position(|of| of.name == sample.workload);
        self.samples.sort_by_key(place);
        self.command += &format!("; {}", other.command);
    }

    /// Runs of a workload on a target.
    pub fn of<'a>(&'a self, workload: &'a str, target: Target) -> impl Iterator<Item = &'a Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.workload == workload && sample.target == target)
    }

    /// Median of a figure; `None` without runs.
    pub fn median(&self, workload: &str, target: Target, figure: Figure) -> Option<f64> {
        let values: Vec<f64> = self.of(workload, target).map(figure).collect();
        estimate(&values).map(|estimate| estimate.median)
    }

    /// The ratio of a figure between two cells, taken run by run: what disturbs the machine for a while
    /// disturbs both.
    pub fn ratio(
        &self,
        upper: (&str, Target),
        lower: (&str, Target),
        figure: Figure,
    ) -> Option<Estimate> {
        let pairs = self.of(upper.0, upper.1).filter_map(|sample| {
            let other = self.of(lower.0, lower.1).find(|other| other.run == sample.run)?;
            let divisor = figure(other);
            (divisor > 0.0).then(|| figure(sample) / divisor)
        });
        estimate(&pairs.collect::<Vec<f64>>())
    }

    /// The fastest variant of qcow2 among those with so many runs.
    pub fn best_qcow2(&self, workload: &str, runs: usize) -> Option<Target> {
        let rate = |target: &Target| self.median(workload, *target, Sample::rate).unwrap_or(0.0);
        let enough = |target: &Target| self.of(workload, *target).count() >= runs.max(1);
        let all = Target::QCOW2.into_iter().filter(enough);
        all.max_by(|a, b| rate(a).total_cmp(&rate(b)))
    }

    /// Names of the workloads, in the order they ran.
    pub fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for sample in &self.samples {
            if !names.contains(&sample.workload.as_str()) {
                names.push(&sample.workload);
            }
        }
        names
    }

    /// The table of one workload.
    pub fn table(&self, workload: &str, about: &str) -> String {
        let mut text = format!("\n{workload}: {about}\n");
        let _ = writeln!(
            text,
            "{:<12} {:>4} {:>9} {:>17} {:>20} {:>6} {:>6} {:>6} {:>6} {:>7} {:>7} {:>6} {:>6} {:>6} {:>7} {:>7}",
            "",
            "runs",
            "per s",
            "min-max",
            "x raw [95 %]",
            "fg",
            "cpu",
            "kern",
            "mach",
            "B/B",
            "dev B/B",
            "fl/fl",
            "space",
            "close",
            "p50 us",
            "p99.9"
        );
        for target in Target::ALL {
            let count = self.of(workload, target).count();
            if count > 0 {
                text += &self.row(workload, target, count);
            }
        }
        text
    }

    fn row(&self, workload: &str, target: Target, count: usize) -> String {
        let of = |figure: Figure| self.median(workload, target, figure).unwrap_or(0.0);
        let rates: Vec<f64> = self.of(workload, target).map(Sample::rate).collect();
        let (low, high) = estimate(&rates).map_or((0.0, 0.0), |_| {
            rates.iter().fold((f64::MAX, 0.0f64), |(a, b), rate| (a.min(*rate), b.max(*rate)))
        });
        let ratio = self.ratio((workload, target), (workload, Target::Raw), Sample::rate);
        let ratio = ratio.map_or("-".to_owned(), |ratio| {
            format!("{:.2} [{:.2}-{:.2}]", ratio.median, ratio.bounds.0, ratio.bounds.1)
        });
        let per_op = |seconds: f64, sample: &Sample| seconds * 1e6 / sample.ops.max(1) as f64;
        let kernel = median(self.of(workload, target).map(|s| per_op(s.cost.kernel_cpu, s)));
        let machine = median(self.of(workload, target).map(|s| per_op(s.cost.machine_cpu, s)));
        format!(
            "{:<12} {:>4} {:>9.0} {:>17} {:>20} {:>6.2} {:>6.1} {:>6.1} {:>6.1} {:>7.2} {:>7.2} {:>6.2} {:>6.2} {:>6.2} {:>7.0} {:>7.0}\n",
            target.name(),
            count,
            of(Sample::rate),
            format!("{low:.0}-{high:.0}"),
            ratio,
            of(|sample| sample.foreground_seconds / sample.seconds),
            of(Sample::daemon_cpu),
            kernel,
            machine,
            of(|sample| sample.cost.daemon_bytes as f64 / sample.bytes.max(1) as f64),
            of(|sample| sample.cost.device_bytes as f64 / sample.bytes.max(1) as f64),
            of(|sample| sample.cost.device_flushes as f64 / sample.flushes.max(1) as f64),
            of(|sample| sample.closed.space as f64 / sample.bytes.max(1) as f64),
            of(|sample| sample.closed.seconds),
            of(|sample| sample.latency[0].max(sample.flush_latency[0])),
            of(|sample| sample.latency[2].max(sample.flush_latency[2])),
        )
    }

    /// Where the wall-clock time of a workload went: for people, and for what to make shorter.
    pub fn spent(&self, workload: &str) -> String {
        let mut of = [0.0; 3];
        let mut targets: Vec<(Target, f64)> = Vec::new();
        for sample in self.samples.iter().filter(|sample| sample.workload == workload) {
            let Spent { preparation, all } = sample.spent;
            for (sum, seconds) in of.iter_mut().zip([all, preparation, sample.seconds]) {
                *sum += seconds;
            }
            match targets.iter_mut().find(|(target, _)| *target == sample.target) {
                Some((_, sum)) => *sum += all,
                None => targets.push((sample.target, all)),
            }
        }
        let [all, preparation, measured] = of;
        targets.sort_by(|a, b| b.1.total_cmp(&a.1));
        let each = targets.iter().map(|(target, sum)| format!("{} {sum:.1}", target.name()));
        format!(
            "  took {all:.1} s: {preparation:.1} preparation and cleaning up, {measured:.1} measured, \
             {:.1} start, verification, close ({})",
            (all - preparation - measured).max(0.0),
            each.collect::<Vec<String>>().join(", "),
        )
    }

    /// What vhost-daemon counted in a workload on EXD, by MiB and flush.
    pub fn counted(&self, workload: &str) -> Option<String> {
        let of = |name: &str| {
            let values = self.of(workload, Target::Exd).filter_map(|sample| sample.statistic(name));
            median(values.map(|value| value as f64))
        };
        let bytes = self.median(workload, Target::Exd, |sample| sample.bytes as f64)?;
        let flushes = self.median(workload, Target::Exd, |sample| sample.flushes as f64)?;
        let memory = self.median(workload, Target::Exd, |sample| sample.memory as f64)?;
        let gib = bytes / (1u64 << 30) as f64;
        let metadata = (of("metadata_bytes") + of("record_bytes")) / 1024.0;
        if of("writes") == 0.0 {
            return None;
        }
        Some(format!(
            "  exd: {:.2} syncs per flush, {:.0} KiB of metadata and records per GiB, \
             {:.0} checkpoints, {:.0} edge waits, zeroed ahead {:.0} MiB, memory {:.0} MiB",
            of("syncs") / flushes.max(1.0),
            metadata / gib.max(1e-9),
            of("checkpoints"),
            of("edge_waits"),
            of("zeroed_bytes").max(of("zeroed_ahead_bytes")) / f64::from(1 << 20),
            memory / f64::from(1 << 20),
        ))
    }
}

/// What the columns mean.
pub const LEGEND: &str = "\
per s: requests per second from the first request until the final flush has ended and background work is
idle, median; x raw: ratio to `raw`, run by run, median and 95 % interval (sign test); fg: share of the
time before the final flush's end; cpu, kern, mach: microseconds per request of the back-end, of all kernel
threads, of the whole machine with client and strangers; B/B: bytes the back-end wrote per byte of the
guest's; dev B/B and fl/fl: bytes and flushes of the device (whoever caused them) per byte and flush of the
guest's; space: host space after the end per byte; close: seconds from SIGTERM to the end; p50, p99.9:
latency of requests, or of flushes where they are longer.";

/// The Markdown that goes into the README.
pub fn markdown(results: &Results) -> String {
    let machine = &results.machine;
    let mut text = String::new();
    let _ = writeln!(
        text,
        "Measured {} on {}, {} MiB, Linux {}, {}, {} (journal_task {}), commit {}.\n",
        machine.date,
        machine.processor,
        machine.memory_mib,
        machine.kernel,
        machine.qemu,
        machine.file_system,
        machine.journal_task,
        machine.commit
    );
    let counts = results.workloads().into_iter().map(|name| results.of(name, Target::Exd).count());
    let (least, most) = counts.fold((usize::MAX, 0), |(a, b), count| (a.min(count), b.max(count)));
    let _ = writeln!(
        text,
        "{least} to {most} runs of each; load average {} when it began (by `{}`). Fewer than 6 runs, or a \
         load, make these hints and no results.\n",
        machine.load.split(' ').next().unwrap_or_default(),
        results.command
    );
    text += "| requests per second (x raw) | exd | raw, sparse | raw, written before | qcow2 | best other qcow2 |\n";
    text += "|---|---|---|---|---|---|\n";
    for workload in results.workloads() {
        let cell = |target: Target| match results.median(workload, target, Sample::rate) {
            None => "-".to_owned(),
            Some(rate) => {
                let raw = (workload, Target::Raw);
                let ratio = results.ratio((workload, target), raw, Sample::rate);
                let ratio = ratio.filter(|_| target != Target::Raw);
                let ratio = ratio.map_or(String::new(), |ratio| format!(" ({:.2})", ratio.median));
                format!("{}{ratio}", thousands(rate))
            }
        };
        let others = Target::QCOW2.iter().filter(|target| **target != Target::Qcow2);
        let rate = |target: &Target| results.median(workload, *target, Sample::rate);
        let best = others
            .filter(|target| rate(target).is_some())
            .max_by(|a, b| rate(a).unwrap_or(0.0).total_cmp(&rate(b).unwrap_or(0.0)));
        let _ = writeln!(
            text,
            "| {workload} | {} | {} | {} | {} | {} |",
            cell(Target::Exd),
            cell(Target::Raw),
            cell(Target::Full),
            cell(Target::Qcow2),
            best.map_or("-".to_owned(), |target| cell(*target)),
        );
    }
    text
}

/// A rate for people.
pub fn thousands(rate: f64) -> String {
    if rate >= 10_000.0 {
        format!("{:.0} k", rate / 1000.0)
    } else {
        format!("{:.1} k", rate / 1000.0)
    }
}

/// The goals as a table for the terminal.
pub fn goals_table(results: &Results) -> String {
    let mut text = format!(
        "\n{:<62} {:>20} {:>6} {:>6} {:>6}  verdict\n",
        "goal", "measured [95 %]", "F", "must", "reach"
    );
    let all = goals::all(results);
    let (measured, others): (Vec<_>, Vec<_>) = all.iter().partition(|goal| goal.measured.is_some());
    for goal in measured {
        let measured = goal.measured.map_or("not measured".to_owned(), |estimate| {
            let (low, high) = estimate.bounds;
            format!("{:.2} [{low:.2}-{high:.2}]", estimate.median)
        });
        let full = goal.full.map_or(String::new(), |full| format!("{:.2}", full.median));
        let _ = writeln!(
            text,
            "{:<62} {measured:>20} {full:>6} {:>6.2} {:>6.2}  {}",
            goal.what,
            goal.must,
            goal.reach,
            goal.verdict()
        );
    }
    text += "?: fewer than 6 runs, no 95 % bound; F: the same of a raw file written before, in EXD's place\n";
    if !others.is_empty() {
        let names: Vec<&str> = others.iter().map(|goal| goal.what).collect();
        let _ = writeln!(text, "not measured: {}", names.join("; "));
    }
    text
}
