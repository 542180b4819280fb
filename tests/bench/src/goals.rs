//! The numbers to reach, and what of them is reached.

use crate::backend::Target;
use crate::report::{Figure, Results};
use crate::session::Sample;
use crate::stats::{Estimate, estimate};

/// A number to reach.
#[derive(Clone, Debug)]
pub struct Goal {
    /// What is compared.
    pub what: &'static str,
    /// What came out.
    pub measured: Option<Estimate>,
    /// What it must be.
    pub must: f64,
    /// What is wished for.
    pub reach: f64,
    /// Less is better.
    pub at_most: bool,
    /// What came out for F in our place: the host's limit for whoever writes blocks where the guest has them.
    pub full: Option<Estimate>,
}

impl Goal {
    /// In a word, by the median. With a question mark where there were too few runs for a bound: that is
    /// a hint and no result.
    pub fn verdict(&self) -> String {
        let Some(Estimate { median, coverage, .. }) = self.measured else { return "-".into() };
        let good = |goal: f64| if self.at_most { median <= goal } else { median >= goal };
        let word = match (good(self.reach), good(self.must)) {
            (true, _) => "reached",
            (false, true) => "met",
            (false, false) => "MISSED",
        };
        if coverage >= 0.95 { word.into() } else { format!("{word}?") }
    }
}

/// So many runs give a bound of 95 %.
const RUNS_BOUND: usize = 6;

use Target::{Exd, Full, OwnFull, Qcow2, Raw};

fn speed(sample: &Sample) -> f64 {
    sample.rate()
}

fn cpu(sample: &Sample) -> f64 {
    sample.daemon_cpu()
}

/// All goals that are ratios of what is measured here.
pub fn all(results: &Results) -> Vec<Goal> {
    let ratio = |upper: (&str, Target), lower: (&str, Target), figure: Figure| {
        results.ratio(upper, lower, figure)
    };
    let most = |what, measured, must, reach| Goal {
        what,
        measured,
        must,
        reach,
        at_most: true,
        full: None,
    };
    let pair = |what, workload: &str, other, must, reach| {
        // F against itself says nothing.
        let over = |target| {
            ratio((workload, target), (workload, other), speed).filter(|_| target != other)
        };
        faster(what, over, must, reach)
    };
    let own = |what, workload: &str, other: &str, must, reach| {
        let over = |target| ratio((workload, target), (other, target), speed);
        faster(what, over, must, reach)
    };
    // Where each flush of a raw file commits a journal, more can be won.
    let durable = if results.machine.kind() == "ext4-journal" { 1.7 } else { 1.2 };
    let mut list = vec![
        own("trace at 63 : itself at 2048", "trace-63", "trace-2048", 0.95, 1.0),
        pair("trace at 63 : R at 63", "trace-63", Raw, 1.9, 1.9),
        pair("trace at 63 : F at 63 (reach)", "trace-63", Full, 0.0, 1.0),
        pair("trace at 2048 : R", "trace-2048", Raw, 1.1, 1.1),
        pair("trace at 2048 : F (reach)", "trace-2048", Full, 0.0, 1.0),
        best_qcow2("trace at 2048 : best qcow2", results, "trace-2048", 1.35, 1.5),
        best_qcow2("trace at 63 : best qcow2", results, "trace-63", 1.8, 2.2),
        pair("random 4 KiB into holes : R", "random-holes", Raw, 1.5, 2.5),
        pair("random 4 KiB into holes : qcow2", "random-holes", Qcow2, 3.0, 3.0),
        pair("random 4 KiB into holes at 63 : R at 63", "random-holes-63", Raw, 3.5, 6.0),
        own("random 4 KiB into holes at 63 : aligned", "random-holes-63", "random-holes", 0.9, 0.9),
        own("all edge blocks ordered : aligned", "recycled-63", "random-holes", 0.6, 0.8),
        own("all edge blocks ordered : aligned recycled", "recycled-63", "recycled", 0.6, 0.8),
        pair("flush every 32 : R", "flush-32", Raw, 1.8, 3.0),
        pair("flush every 32 : qcow2", "flush-32", Qcow2, 4.0, 4.0),
        pair("depth 1, flush each : R", "durable", Raw, durable, durable),
        pair("depth 1, flush each : F", "durable", Full, 0.7, 0.95),
        pair("16 flushers : R", "flushers-16", Raw, 2.5, 4.0),
        most("16 flushers: syncs per flush", per_flush(results, "flushers-16"), 0.2, 0.2),
        most(
            "a lone flush : own raw, which groups none (median latency)",
            ratio(("lone-flush", Exd), ("lone-flush", OwnFull), |s| s.flush_latency[0]),
            1.1,
            1.0,
        ),
        most(
            "the same (99 %)",
            ratio(("lone-flush", Exd), ("lone-flush", OwnFull), |s| s.flush_latency[1]),
            1.1,
            1.0,
        ),
        most(
            "p99.9 of writes while a checkpoint runs : without",
            checkpoints(results, "random-4g"),
            2.0,
            1.0,
        ),
        own("random into 1 TiB : own rate on 4 GiB", "random-1t", "random-4g", 0.9, 0.9),
        pair("random into 1 TiB : qcow2", "random-1t", Qcow2, 8.0, 15.0),
        pair("sequential 64 KiB into holes : R", "seq-64k", Raw, 1.0, 1.0),
        pair("sequential 64 KiB into holes : F (reach)", "seq-64k", Full, 0.0, 1.0),
        pair("64 KiB reads after a random fill : F", "readback", Full, 0.6, 0.85),
        pair("the same, defragmented : F", "defragmented", Full, 0.95, 0.95),
    ];
    let written: [(&str, &str); 8] = [
        ("overwrite 4 KiB, depth 1 : F", "overwrite-4k-q1"),
        ("overwrite 4 KiB, depth 32 : F", "overwrite-4k"),
        ("overwrite 64 KiB, depth 1 : F", "overwrite-64k-q1"),
        ("overwrite 64 KiB, depth 32 : F", "overwrite-64k"),
        ("read 4 KiB, depth 1 : F", "read-4k-q1"),
        ("read 4 KiB, depth 32 : F", "read-4k"),
        ("read 64 KiB, depth 1 : F", "read-64k-q1"),
        ("read 64 KiB, depth 32 : F", "read-64k"),
    ];
    list.extend(written.map(|(what, workload)| pair(what, workload, Full, 0.95, 0.98)));
    let cpu_over_raw: [(&str, &str); 4] = [
        ("overwrite 4 KiB, depth 32: CPU us per I/O over own raw", "overwrite-4k"),
        ("read 4 KiB, depth 32: CPU us per I/O over own raw", "read-4k"),
        ("read on tmpfs: CPU us per I/O over own raw", "memory-read"),
        ("overwrite on tmpfs: CPU us per I/O over own raw", "memory-write"),
    ];
    list.extend(cpu_over_raw.map(|(what, workload)| {
        let mut goal = most(what, difference(results, workload, Exd, OwnFull, cpu), 0.5, 0.5);
        if goal.measured.is_none() {
            goal.measured = difference(results, workload, Exd, Target::OwnRaw, cpu);
        }
        goal
    }));
    list.extend([
        most(
            "CPU per 4 KiB read on tmpfs : qemu-storage-daemon",
            ratio(("memory-read", Exd), ("memory-read", Full), cpu),
            0.6,
            0.4,
        ),
        most(
            "CPU per 4 KiB overwrite on tmpfs : qemu-storage-daemon",
            ratio(("memory-write", Exd), ("memory-write", Full), cpu),
            0.6,
            0.4,
        ),
        own("2 queues : 1, reads on tmpfs (needs 4 cores)", "memory-2q", "memory-read", 1.6, 1.9),
        most(
            "syncs beyond the guest's flushes per 64 MiB (trace)",
            extra_syncs(results, "trace-2048"),
            1.0,
            1.0,
        ),
        most(
            "syncs beyond the guest's flushes per 64 MiB (random 4 KiB)",
            extra_syncs(results, "random-4g"),
            1.0,
            1.0,
        ),
        most("host bytes per byte, flush each", bytes_per_byte(results, "durable"), 2.1, 2.1),
        most("host bytes per byte, flush every 32", bytes_per_byte(results, "flush-32"), 1.1, 1.1),
        most("space closed : data (random 4 KiB)", space(results, "random-holes"), 1.02, 1.02),
    ]);
    list
}

fn best_qcow2(
    what: &'static str,
    results: &Results,
    workload: &str,
    must: f64,
    reach: f64,
) -> Goal {
    // Variants that lost their first runs got no more.
    let best = [RUNS_BOUND, 1].into_iter().find_map(|runs| results.best_qcow2(workload, runs));
    let over = |target| results.ratio((workload, target), (workload, best?), speed);
    faster(what, over, must, reach)
}

/// A goal for what `over` says of EXD, with what it says of F in its place.
fn faster(
    what: &'static str,
    over: impl Fn(Target) -> Option<Estimate>,
    must: f64,
    reach: f64,
) -> Goal {
    Goal { what, measured: over(Exd), must, reach, at_most: false, full: over(Full) }
}

/// The engine's syncs per flush of the guest.
fn per_flush(results: &Results, workload: &str) -> Option<Estimate> {
    let each = results.of(workload, Exd).filter_map(|sample| {
        Some(sample.statistic("syncs")? as f64 / sample.flushes.max(1) as f64)
    });
    estimate(&each.collect::<Vec<f64>>())
}

/// Syncs that are not the guest's, in each 64 MiB written.
fn extra_syncs(results: &Results, workload: &str) -> Option<Estimate> {
    let each = results.of(workload, Exd).filter_map(|sample| {
        let extra = sample.statistic("syncs")? as f64 - sample.flushes as f64;
        Some(extra.max(0.0) * f64::from(64 << 20) / sample.bytes.max(1) as f64)
    });
    estimate(&each.collect::<Vec<f64>>())
}

/// Bytes written to the host per byte of the guest's, without zeroes ahead.
fn bytes_per_byte(results: &Results, workload: &str) -> Option<Estimate> {
    let each = results.of(workload, Exd).map(|sample| {
        let zeroes = ["zeroed_bytes", "ring_zeroed_bytes"];
        let zeroes: u64 = zeroes.iter().filter_map(|name| sample.statistic(name)).sum();
        sample.cost.daemon_bytes.saturating_sub(zeroes) as f64 / sample.bytes.max(1) as f64
    });
    estimate(&each.collect::<Vec<f64>>())
}

/// The latency that 99.9 % of the writes stay under which were under way while a checkpoint was, against that
/// of the others in the same run.
fn checkpoints(results: &Results, workload: &str) -> Option<Estimate> {
    let each = results.of(workload, Exd).filter_map(|sample| {
        let write = sample.closed.statistics.as_ref()?.get("queues")?.get(0)?.get("write")?;
        let of = |name: &str| write.get(name)?.get("p999_us_max")?.as_f64();
        let (during, without) = ("latency_in_checkpoints", "latency_outside_checkpoints");
        Some(of(during)? / of(without)?.max(1.0))
    });
    estimate(&each.collect::<Vec<f64>>())
}

fn space(results: &Results, workload: &str) -> Option<Estimate> {
    let each = results
        .of(workload, Exd)
        .map(|sample| sample.closed.space as f64 / sample.bytes.max(1) as f64);
    estimate(&each.collect::<Vec<f64>>())
}

/// The difference of a figure between two targets, run by run.
fn difference(
    results: &Results,
    workload: &str,
    upper: Target,
    lower: Target,
    figure: Figure,
) -> Option<Estimate> {
    let each = results.of(workload, upper).filter_map(|sample| {
        let other = results.of(workload, lower).find(|other| other.run == sample.run)?;
        Some(figure(sample) - figure(other))
    });
    estimate(&each.collect::<Vec<f64>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{self, Workload};

    fn sample(workload: &Workload, target: Target, run: usize) -> Sample {
        Sample::example(workload.name, target, run, 1.0)
    }

    fn measured(workloads: &[Workload]) -> Vec<&'static str> {
        let mut results = Results::default();
        for workload in workloads {
            for target in workload.targets {
                results.samples.extend((0..7).map(|run| sample(workload, *target, run)));
            }
        }
        let goals = all(&results);
        goals.iter().filter(|goal| goal.measured.is_some()).map(|goal| goal.what).collect()
    }

    /// Each goal is measured, by the workloads that are marked as having one, and by no other.
    #[test]
    fn goals_and_workloads_fit() {
        let workloads = workload::all();
        let every = measured(&workloads);
        assert_eq!(every.len(), all(&Results::default()).len(), "{every:?}");
        for left_out in &workloads {
            let others: Vec<Workload> =
                workloads.iter().filter(|workload| *workload != left_out).cloned().collect();
            let needed = measured(&others).len() < every.len();
            assert_eq!(left_out.goal, needed, "{}", left_out.name);
        }
    }

    /// A variant that was lucky in its few runs does not count against one that has all.
    #[test]
    fn the_best_variant_has_enough_runs() {
        let all = workload::all();
        let mut results = Results::default();
        for (target, runs, seconds) in [(Exd, 7, 1.0), (Qcow2, 7, 2.0), (Target::Qcow2Lazy, 3, 1.5)]
        {
            results
                .samples
                .extend((0..runs).map(|run| Sample { seconds, ..sample(&all[0], target, run) }));
        }
        let goal = best_qcow2("", &results, all[0].name, 1.0, 1.0);
        assert_eq!(goal.measured.map(|estimate| estimate.median), Some(2.0));
        results.samples.retain(|sample| sample.run < 3);
        let goal = best_qcow2("", &results, all[0].name, 1.0, 1.0);
        assert_eq!(goal.measured.map(|estimate| estimate.median), Some(1.5));
    }

    /// Who takes turns must be neighbours, or the groups are not what they seem.
    #[test]
    fn groups_are_together() {
        let all = workload::all();
        let groups: Vec<&str> =
            all.chunk_by(|a, b| a.group == b.group).map(|g| g[0].group).collect();
        let mut goals: Vec<&str> =
            all.iter().filter(|workload| workload.goal).map(|workload| workload.group).collect();
        goals.dedup();
        let mut once = goals.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), goals.len(), "{groups:?}");
    }
}
