//! The simulator is strong enough: each deliberate bug of the engine, switched on alone, is found by
//! the standard suite within a bounded number of seeds.
//!
//! `cargo test -p exd-sim --features seeded-bugs --test mutations`; `EXD_SIM_BUG=Name` hunts one.

use exd_image::bugs::{Bug, set};
use exd_sim::api::StorageError;
use exd_sim::damage::golden;
use exd_sim::explore::{Limits, run_seed};
use exd_sim::faults::{Phase, every_call};
use exd_sim::interleave::{BlockState, Effect, Scenario, menu};
use exd_sim::real::Disk;
use exd_sim::storage::CallKind;
use exd_sim::workload::PROFILES;

fn by_crashes(profiles: &[&str], seeds: u64) -> Option<String> {
    for seed in 0..seeds {
        for profile in profiles {
            let run = run_seed::<Disk>("exd", profile, seed, Limits::QUICK, None, false);
            if let Err(failure) = run {
                return Some(failure.to_string());
            }
        }
    }
    None
}

fn by_orders() -> Option<String> {
    let menu = menu(4096);
    for state in BlockState::ALL {
        for first in &menu {
            for second in &menu {
                let scenario = Scenario {
                    block_size: 4096,
                    alignment: 512,
                    state,
                    requests: vec![*first, *second],
                    kick_each: true,
                    effect: Effect::Late,
                };
                if let Err(why) = scenario.run::<Disk>(60, 10) {
                    return Some(why);
                }
            }
        }
    }
    None
}

fn by_failing_syncs() -> Option<String> {
    (0..10).find_map(|seed| {
        let error = StorageError::Io(5);
        every_call::<Disk>(seed, "mixed", Phase::Use, CallKind::Sync, error, false, 40).err()
    })
}

fn by_damage() -> Option<String> {
    for clean in [true, false] {
        let golden = match golden::<Disk>(4096, clean, 1) {
            Ok(golden) => golden,
            Err(why) => return Some(why),
        };
        for sector in golden.metadata() {
            for bit in (sector * 4096..(sector + 1) * 4096).step_by(5) {
                if let Err(why) = golden.flip::<Disk>(bit) {
                    return Some(why);
                }
            }
        }
    }
    None
}

/// What finds a bug first is tried first; all of it is the standard suite.
fn hunt(bug: Bug) -> Option<String> {
    match bug {
        Bug::SkipChecksum => by_damage(),
        Bug::ForgetFailedSync => by_failing_syncs(),
        Bug::SkipBlockOwnership => by_orders().or_else(|| by_crashes(&PROFILES, 20)),
        Bug::KeepTailOnShrink => by_crashes(&["resize"], 100),
        Bug::AllocateWhileZeroing | Bug::AllocateWhileDropping | Bug::SpareBeyondPlace => {
            by_crashes(&["pool"], 60)
        }
        Bug::LeaveUnnumbered | Bug::FastShowsLeft => by_crashes(&["left"], 60),
        Bug::FastHidesAligned => by_crashes(&["sectors"], 60),
        Bug::ForgetChangesEarly => by_crashes(&["fragments", "discard", "storm"], 40),
        Bug::TrustZeroesUnsynced => by_crashes(&["device-pool"], 60),
        Bug::ReuseBeforePunch
        | Bug::ReuseBeforeDurable
        | Bug::ReuseBeforeDrain
        | Bug::FastRecyclesEarly => {
            by_crashes(&["discard", "mixed", "device", "resize"], 100).or_else(by_orders)
        }
        _ => by_crashes(&PROFILES, 40),
    }
}

#[test]
fn every_seeded_bug_is_found() {
    let only = std::env::var("EXD_SIM_BUG").ok();
    let mut missed = Vec::new();
    for bug in Bug::ALL {
        if only.as_ref().is_some_and(|name| *name != format!("{bug:?}")) {
            continue;
        }
        set(Some(bug));
        let found = hunt(bug);
        set(None);
        match found {
            Some(why) => eprintln!("{bug:?}: found\n    {}", why.replace('\n', "\n    ")),
            None => {
                eprintln!("{bug:?}: MISSED");
                missed.push(bug);
            }
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// What finds the bugs finds nothing without them.
#[test]
fn without_a_bug_nothing_is_found() {
    set(None);
    assert_eq!(by_crashes(&PROFILES, 2), None);
    assert_eq!(by_failing_syncs(), None);
}
