//! P2: SIGKILL of the daemon under a running guest, again and again: the guest sees a pause and nothing
//! else. No I/O error, every block verifies, and the image is without fault.
//!
//! `EXD_KILLS` says how often (default 100). That the test can fail is shown by
//! `cargo test -p exd-guest-tests --test kill -- --ignored reference`: qemu-storage-daemon keeps no record of
//! what is in flight, and a guest that loses a request waits for ever.

use exd_guest_tests::{Disk, Format, Guest, Result, World, process, stamp};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest time between the daemon's connection and its death.
const LIFE_MAX: Duration = Duration::from_millis(500);
/// How long a machine may take to find the daemon again.
const RECONNECT_LIMIT: Duration = Duration::from_secs(120);

macro_rules! killed {
    ($($module:ident $format:ident;)*) => {
        $(mod $module {
            use super::*;

            #[test]
            #[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
            fn daemon_killed_under_a_running_guest() -> Result<()> {
                let name = concat!(stringify!($module), "-killed-running");
                killed(World::new(name, Format::$format)?)
            }
        })*
    };
}

killed! {
    exd Exd;
    raw Raw;
    reference Reference;
}

fn wanted_kills() -> u64 {
    std::env::var("EXD_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(100)
}

fn killed(world: World) -> Result<()> {
    let mut disk = world.disk("a")?;
    let mut guest = world.boot(&[&disk], 2)?;
    let wanted = if world.format == Format::Raw { wanted_kills() / 4 } else { wanted_kills() };
    let kills = AtomicU64::new(0);
    let begin = Instant::now();
    let mut round = 0;
    while kills.load(Ordering::SeqCst) < wanted {
        round += 1;
        let done = AtomicBool::new(false);
        let (ran, killer) = std::thread::scope(|scope| {
            let disk = &mut disk;
            let killer = scope.spawn(|| kill_until(disk, round, &done, &kills, wanted));
            let ran = fio(&mut guest, round);
            done.store(true, Ordering::SeqCst);
            (ran, killer.join().expect("no panic"))
        });
        let ran = ran.and_then(|()| guest.see_no_errors());
        let count = kills.load(Ordering::SeqCst);
        ran.map_err(|error| format!("round {round}, after {count} kills: {error}"))?;
        killer?;
        println!("round {round}: {count} kills in {:.0} s", begin.elapsed().as_secs_f32());
    }
    guest.power_off()?;
    world.finish(vec![disk])
}

/// Kills the daemon at random moments of its life, and starts the next one, until the work is done or it
/// has been killed often enough.
fn kill_until(
    disk: &mut Disk,
    seed: u64,
    done: &AtomicBool,
    kills: &AtomicU64,
    wanted: u64,
) -> Result<()> {
    let mut chance = seed;
    while !done.load(Ordering::SeqCst) && kills.load(Ordering::SeqCst) < wanted {
        let life = stamp::next_random(&mut chance) % (LIFE_MAX.as_micros() as u64 + 1);
        std::thread::sleep(Duration::from_micros(life));
        let before = disk.connections();
        disk.kill();
        kills.fetch_add(1, Ordering::SeqCst);
        disk.serve()?;
        if disk.tells_of_connections() {
            process::wait_until("the machine reconnects", RECONNECT_LIMIT, || {
                Ok(disk.connections() > before)
            })?;
        }
    }
    Ok(())
}

/// Random writes at depth 32 on each of two processors, and so on two queues; then all is read back and
/// verified. Another seed in each round: what an earlier one left is not taken for this one's.
fn fio(guest: &mut Guest, round: u64) -> Result<()> {
    let seed = format!("--randseed={round}");
    let mut argv = vec!["fio", "--ioengine=libaio", "--direct=1", "--iodepth=32", "--rw=randwrite"];
    argv.extend(["--filename=/dev/vda", "--verify=crc32c", "--verify_fatal=1", "--thread=1"]);
    argv.extend(["--fsync=64", seed.as_str(), "--group_reporting=1"]);
    argv.extend(["--name=small", "--bs=4k", "--offset=512", "--size=12m", "--cpus_allowed=0"]);
    argv.extend(["--name=mixed", "--bsrange=512-32k", "--offset=512m", "--size=24m"]);
    argv.extend(["--cpus_allowed=1"]);
    guest.run(&argv).map(|_| ())
}
