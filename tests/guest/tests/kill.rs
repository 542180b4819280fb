//! P2: SIGKILL of the daemon under a running guest, again and again: the guest sees a pause and nothing
//! else. No I/O error, every block verifies, and the image is without fault.
//!
//! `EXD_KILLS` says how often (default 100). That the test can fail is shown by `EXD_NO_INFLIGHT=1`, and by
//! `cargo test -p exd-guest-tests --test kill -- --ignored reference` (qemu-storage-daemon): where nobody
//! keeps a record of what is in flight, the guest loses requests and waits for ever.

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
    let guest = world.boot(&[&disk], 2)?;
    let wanted = if world.format == Format::Raw { wanted_kills() / 4 } else { wanted_kills() };
    let (kills, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let disk = &mut disk;
        let killer = scope.spawn(|| kill_until(disk, &done, &kills, wanted));
        let ran = work_until(guest, &kills, wanted, || killer.is_finished());
        done.store(true, Ordering::SeqCst);
        let killed = killer.join().expect("no panic");
        ran.and(killed)
    })?;
    world.finish(vec![disk])
}

/// Rounds of fio until the daemon has been killed often enough (or cannot be any more).
fn work_until(
    mut guest: Guest,
    kills: &AtomicU64,
    wanted: u64,
    is_over: impl Fn() -> bool,
) -> Result<()> {
    let begin = Instant::now();
    for round in 1.. {
        let ran = fio(&mut guest, round).and_then(|()| guest.see_no_errors());
        let count = kills.load(Ordering::SeqCst);
        ran.map_err(|error| format!("round {round}, after {count} kills: {error}"))?;
        println!("round {round}: {count} kills in {:.0} s", begin.elapsed().as_secs_f32());
        if count >= wanted || is_over() {
            break;
        }
    }
    guest.power_off()
}

/// Kills the daemon at random moments of its life, and starts the next one, until that has happened often
/// enough; the last one lives until the work is done. All on one thread: daemons end with it.
fn kill_until(disk: &mut Disk, done: &AtomicBool, kills: &AtomicU64, wanted: u64) -> Result<()> {
    let mut chance = 1;
    while !done.load(Ordering::SeqCst) && kills.load(Ordering::SeqCst) < wanted {
        let life = stamp::next_random(&mut chance) % (LIFE_MAX.as_micros() as u64 + 1);
        std::thread::sleep(Duration::from_micros(life));
        let before = disk.connections();
        disk.kill();
        disk.serve()?;
        if disk.tells_of_connections() {
            process::wait_until("the machine reconnects", RECONNECT_LIMIT, || {
                Ok(disk.connections() > before || done.load(Ordering::SeqCst))
            })?;
        }
        kills.fetch_add(1, Ordering::SeqCst);
    }
    while !done.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(10));
    }
    disk.stop()
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
