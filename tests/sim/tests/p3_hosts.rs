//! P1, P3, P4 on hosts that differ: coarse direct I/O, block devices full of other people's data,
//! hosts without hole punching; and with resizing, big requests.

use exd_sim::explore::{Limits, budget, run_many};
use exd_sim::real::Disk;

fn family(profile: &'static str, share: u64) {
    let (counters, failures) =
        run_many::<Disk>("exd", &[profile], 0..u64::MAX, Limits::STANDARD, budget(share));
    eprintln!("P1 P3 P4 ({profile}): {counters}");
    assert!(failures.is_empty(), "{}", failures[0]);
    assert!(counters.distinct >= budget(share));
}

#[test]
fn p3_coarse_direct_io() {
    family("coarse", 8);
}

#[test]
fn p3_block_devices_never_show_what_was_there() {
    family("device", 8);
}

#[test]
fn p3_without_hole_punching() {
    family("nopunch", 8);
}

#[test]
fn p3_resizing() {
    family("resize", 10);
}

#[test]
fn p3_big_requests() {
    family("big", 6);
}
