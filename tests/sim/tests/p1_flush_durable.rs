//! P1: a flush that returned is durable through power loss, with every write completed before it.
//! P3: after any crash each sector reads as its last flushed value or a later written one.
//! P4: an image opens after any crash, and `check` finds 0 corruptions and 0 leaks.

use exd_sim::explore::{Limits, budget, run_many};
use exd_sim::real::Disk;

/// Half of the crash images of a run: every boundary of every kind of workload, recovery included.
#[test]
fn p1_p3_p4_every_boundary_of_mixed_workloads() {
    let profiles = ["mixed", "discard", "stream", "wrap", "prealloc"];
    let (counters, failures) =
        run_many::<Disk>("exd", &profiles, 0..u64::MAX, Limits::STANDARD, budget(60));
    eprintln!("P1 P3 P4 (files): {counters}");
    assert!(failures.is_empty(), "{}", failures[0]);
    assert!(counters.distinct >= budget(60));
}
