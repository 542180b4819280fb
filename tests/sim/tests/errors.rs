//! P5 and the honesty of errors: each host call fails once, or from then on; the error reaches the
//! caller, the image stays consistent, ENOSPC passes when space is made, a failed sync never does.

use exd_sim::api::StorageError;
use exd_sim::faults::{Injections, Phase, every_call};
use exd_sim::real::Disk;
use exd_sim::storage::CallKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const EIO: StorageError = StorageError::Io(5);
const ERRORS: [StorageError; 2] = [EIO, StorageError::NoSpace];

fn every(phase: Phase, kinds: &[CallKind], seeds: u64, most: u64) -> Injections {
    let mut work = Vec::new();
    for seed in 0..seeds {
        for profile in ["mixed", "discard", "stream", "resize", "coarse", "prealloc", "nopunch"] {
            for kind in kinds {
                for error in ERRORS {
                    for persistent in [false, true] {
                        work.push((seed, profile, *kind, error, persistent));
                    }
                }
            }
        }
    }
    let next = AtomicUsize::new(0);
    let total = Mutex::new((Injections::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get().min(8)) {
            scope.spawn(|| {
                while let Some(item) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (seed, profile, kind, error, persistent) = *item;
                    let result =
                        every_call::<Disk>(seed, profile, phase, kind, error, persistent, most);
                    let mut total = total.lock().unwrap_or_else(|e| e.into_inner());
                    match result {
                        Ok(sum) => {
                            total.0.trials += sum.trials;
                            total.0.delivered += sum.delivered;
                        }
                        Err(why) => {
                            total.1.push(why);
                            break;
                        }
                    }
                }
            });
        }
    });
    let (sum, failures) = total.into_inner().unwrap_or_else(|e| e.into_inner());
    eprintln!("errors in {phase:?} {kinds:?}: {sum:?}");
    assert!(failures.is_empty(), "{}", failures[0]);
    sum
}

#[test]
fn p5_a_failed_sync_is_final() {
    let sum = every(Phase::Use, &[CallKind::Sync], 4, 60);
    assert!(sum.delivered > 0);
}

#[test]
fn p5_a_sync_fails_during_recovery() {
    every(Phase::Recovery, &[CallKind::Sync], 8, 60);
}

#[test]
fn errors_of_writes() {
    every(Phase::Use, &[CallKind::Write], 3, 80);
}

#[test]
fn errors_of_reads() {
    every(Phase::Use, &[CallKind::ReadBytes, CallKind::ReadRequest], 3, 60);
}

#[test]
fn errors_of_space_calls() {
    let kinds = [CallKind::Punch, CallKind::Allocate, CallKind::SetLen, CallKind::NextData];
    every(Phase::Use, &kinds, 3, 60);
}

#[test]
fn errors_during_recovery() {
    every(Phase::Recovery, &CallKind::ALL, 3, 60);
}

#[test]
fn errors_during_creation() {
    every(Phase::Create, &CallKind::ALL, 1, 60);
}
