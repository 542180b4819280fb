//! A simulator that never failed proves nothing: every bug of the toy disk is found, and without a
//! bug the toy passes.

use exd_sim::api::StorageError;
use exd_sim::explore::{Limits, run_many, run_seed};
use exd_sim::faults::{Phase, every_call};
use exd_sim::interleave::{BlockState, Effect, Orders, Scenario, menu};
use exd_sim::storage::CallKind;
use exd_sim::toy::{Toy, ToyBug, set_bug};

const EIO: StorageError = StorageError::Io(5);

#[test]
fn the_toy_without_bugs_passes() {
    let (counters, failures) = run_many::<Toy>("toy", &["toy"], 0..16, Limits::QUICK, 0);
    eprintln!("toy: {counters}");
    assert!(failures.is_empty(), "{}", failures[0]);
}

#[test]
fn every_crash_bug_of_the_toy_is_found() {
    for bug in ToyBug::ALL {
        if bug == ToyBug::FailedSyncIsForgotten {
            continue; // Needs injected errors.
        }
        set_bug(Some(bug));
        let found = (0..40)
            .find_map(|seed| run_seed::<Toy>("toy", "toy", seed, Limits::QUICK, None, false).err());
        set_bug(None);
        let failure = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        eprintln!("{bug:?}: {failure}");
    }
}

/// What a failure names as its path leads to the same failure again.
#[test]
fn a_failure_repeats_by_its_command() {
    set_bug(Some(ToyBug::FlushDoesNotWait));
    let mut tried = 0;
    for seed in 0..40 {
        let Err(first) = run_seed::<Toy>("toy", "toy", seed, Limits::QUICK, None, false) else {
            continue;
        };
        if first.path.is_empty() {
            continue;
        }
        let path = Some(first.path.clone());
        let again = run_seed::<Toy>("toy", "toy", seed, Limits::QUICK, path, false);
        let again = again.expect_err("the same violation");
        assert_eq!(first.what, again.what, "{first}");
        assert_eq!(first.command(), again.command());
        tried += 1;
    }
    set_bug(None);
    assert!(tried > 10, "only {tried} failures were repeated");
}

fn pairs() -> Result<Orders, String> {
    let mut sum = Orders::default();
    let menu = menu(4096);
    for state in BlockState::ALL {
        for first in &menu {
            for second in &menu {
                let requests = vec![*first, *second];
                if requests.iter().any(|r| format!("{r:?}").contains("durable: true")) {
                    continue; // The toy knows no durable writes.
                }
                let scenario = Scenario {
                    block_size: 4096,
                    alignment: 512,
                    state,
                    requests,
                    kick_each: false,
                    effect: Effect::Late,
                };
                sum.add(scenario.run::<Toy>(50, 10)?);
            }
        }
    }
    Ok(sum)
}

#[test]
fn orders_of_the_toy() {
    let orders = pairs().expect("the toy without bugs passes");
    eprintln!("toy: {orders:?}");
    set_bug(Some(ToyBug::UnalignedWriteReadsModifiesWritesWithoutLock));
    let found = pairs();
    set_bug(None);
    eprintln!("{}", found.expect_err("the race is found"));
}

fn failing_syncs() -> Result<u64, String> {
    let mut delivered = 0;
    for seed in 0..10 {
        let sync = CallKind::Sync;
        let sum = every_call::<Toy>(seed, "toy", Phase::Use, sync, EIO, false, 50)?;
        delivered += sum.delivered;
    }
    Ok(delivered)
}

#[test]
fn failed_syncs_of_the_toy() {
    assert!(failing_syncs().expect("the toy without bugs passes") > 10);
    set_bug(Some(ToyBug::FailedSyncIsForgotten));
    let found = failing_syncs();
    set_bug(None);
    let why = found.expect_err("the forgotten failure is found");
    assert!(why.contains("P5"), "{why}");
}
