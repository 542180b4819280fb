//! The same seed makes the same steps: otherwise no failure could be repeated.

use exd_sim::explore::{Limits, run_seed};
use exd_sim::real::Disk;
use exd_sim::workload::PROFILES;

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..20 {
        for profile in PROFILES {
            let run = || {
                let nothing = Some(vec![(u64::MAX, "h::0:1".parse().expect("a choice"))]);
                run_seed::<Disk>("exd", profile, seed, Limits::FLAT, nothing, false)
            };
            let (first, second) = (run(), run());
            let (first, second) =
                (first.map_err(|f| f.to_string()), second.map_err(|f| f.to_string()));
            let trace = |r: &Result<_, String>| match r {
                Ok((_, trace)) => *trace,
                Err(why) => panic!("{why}"),
            };
            assert_eq!(trace(&first), trace(&second), "seed {seed}, profile {profile}");
        }
    }
}
