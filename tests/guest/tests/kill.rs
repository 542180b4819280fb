//! P2: SIGKILL of the daemon under a running guest, again and again: the guest sees a pause and nothing
//! else. No I/O error, every block verifies, and the image is without fault.
//!
//! `EXD_KILLS` says how often (default 100), `EXD_SEED` when. That the test can fail is shown by `untracked`,
//! where nobody keeps a record of what is in flight: the guest loses requests. So it does with
//! `cargo test -p exd-guest-tests --test kill -- --ignored reference` (qemu-storage-daemon).

use exd_guest_tests::{Disk, Format, Guest, Result, World, process, stamp};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest life of a daemon that may die before it has served anything: at its start, while the machine
/// connects, at its first requests.
const SHORT_LIFE_MAX: Duration = Duration::from_millis(400);
/// Longest life of one that dies while the machine connects, from the connection on.
const HANDSHAKE_MAX: Duration = Duration::from_millis(15);
/// Longest life of a daemon from its first request on.
const LIFE_MAX: Duration = Duration::from_millis(300);
/// The seed of a run that is given none.
const SEED: u64 = 1;

macro_rules! killed {
    ($($module:ident $format:ident $share:literal;)*) => {
        $(mod $module {
            use super::*;

            #[test]
            #[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
            fn daemon_killed_under_a_running_guest() -> Result<()> {
                let name = concat!(stringify!($module), "-killed-running");
                let world = World::new(name, Format::$format)?;
                let mut disk = world.disk("a")?;
                killed(&world, &mut disk, number("EXD_KILLS", 100) / $share, &PATIENT)?;
                world.finish(vec![disk])
            }
        })*
    };
}

killed! {
    exd Exd 1;
    raw Raw 4;
    reference Reference 1;
}

/// Without the record of requests in flight the same is seen to fail.
#[test]
#[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
fn untracked_requests_are_lost() -> Result<()> {
    let world = World::new("exd-killed-untracked", Format::Exd)?;
    let mut disk = world.idle_disk("a")?.with(&["--no-inflight"]);
    disk.serve()?;
    match killed(&world, &mut disk, 1000, &IMPATIENT) {
        Ok(()) => Err("1000 kills, and nothing was lost: this test cannot fail".into()),
        Err(error) => {
            let error = error.to_string();
            println!("as expected: {error}");
            let expected =
                ["is not a head", "the guest was silent", "asks for something: not within"];
            assert!(expected.iter().any(|sign| error.contains(sign)), "{error}");
            Ok(())
        }
    }
}

/// How long a guest may do without its disk.
struct Patience {
    /// Until it asks a new daemon for something.
    request: Duration,
    /// Until its program has ended.
    program: Duration,
}

const PATIENT: Patience =
    Patience { request: Duration::from_secs(120), program: Duration::from_secs(300) };
const IMPATIENT: Patience =
    Patience { request: Duration::from_secs(20), program: Duration::from_secs(30) };

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn killed(world: &World, disk: &mut Disk, wanted: u64, patience: &Patience) -> Result<()> {
    let mut guest = world.boot(&[disk], 2)?;
    guest.set_patience(patience.program);
    let (kills, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let (done, kills, pauses) = (&done, &kills, Vec::new());
            let mut killer = Killer { disk, done, kills, patience, pauses };
            let seed = number("EXD_SEED", SEED);
            let killed = killer.kill_until(wanted, seed).and_then(|()| killer.rest());
            killer.report();
            killed
        });
        let ran = work_until(guest, &kills, wanted, || killer.is_finished());
        done.store(true, Ordering::SeqCst);
        let killed = killer.join().expect("no panic");
        killed.and(ran)
    })
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

/// Kills the daemon, all on one thread: daemons end with the thread that has started them.
struct Killer<'a> {
    disk: &'a mut Disk,
    done: &'a AtomicBool,
    kills: &'a AtomicU64,
    patience: &'a Patience,
    pauses: Vec<Duration>,
}

impl Killer<'_> {
    /// Kills until that has happened often enough, or the guest has done its work. Every other daemon may die
    /// at any moment of its life, from its start on, or while the machine connects; the one after it must
    /// have served before it dies, so that no daemon hides what its predecessor has spoilt.
    fn kill_until(&mut self, wanted: u64, seed: u64) -> Result<()> {
        println!("repeat with EXD_SEED={seed} EXD_KILLS={wanted}");
        let mut chance = seed;
        let mut life = |longest: Duration| {
            let micros = longest.as_micros() as u64 + 1;
            std::thread::sleep(Duration::from_micros(stamp::next_random(&mut chance) % micros));
        };
        for turn in 0u32.. {
            if self.is_done() || self.kills.load(Ordering::SeqCst) >= wanted {
                break;
            }
            let begin = Instant::now();
            self.kill();
            let old = self.disk.log().len();
            self.disk.launch()?;
            if turn % 2 == 0 || !self.disk.is_ours() {
                life(SHORT_LIFE_MAX);
            } else {
                self.see_connection(old)?;
                life(HANDSHAKE_MAX);
            }
            self.kill();
            self.disk.serve()?;
            if self.disk.is_ours() {
                self.see_request()?;
                self.pauses.push(begin.elapsed());
            }
            life(LIFE_MAX);
        }
        Ok(())
    }

    /// Waits until the daemon has said, after so many bytes of its log, that a machine has connected.
    fn see_connection(&self, old: usize) -> Result<()> {
        let kills = self.kills.load(Ordering::SeqCst);
        let what = format!("after {kills} kills the machine connects");
        process::wait_and_look(Duration::from_millis(1), &what, self.patience.request, || {
            Ok(self.is_done() || self.disk.log_from(old).contains("front-end connected"))
        })
    }

    fn kill(&mut self) {
        self.disk.kill();
        self.kills.fetch_add(1, Ordering::SeqCst);
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits until the daemon has completed a request.
    fn see_request(&self) -> Result<()> {
        let kills = self.kills.load(Ordering::SeqCst);
        let what = format!("after {kills} kills the guest asks for something");
        process::wait_until(&what, self.patience.request, || {
            Ok(self.is_done() || self.disk.completed(0) > 0)
        })
    }

    /// The last daemon lives until the work is done.
    fn rest(&mut self) -> Result<()> {
        while !self.is_done() {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.disk.stop()
    }

    fn report(&self) {
        let kills = self.kills.load(Ordering::SeqCst);
        let longest = self.pauses.iter().max().copied().unwrap_or_default().as_millis();
        let mean = self.pauses.iter().sum::<Duration>().as_millis();
        let mean = mean.checked_div(self.pauses.len() as u128).unwrap_or_default();
        println!("{kills} kills; pauses of the guest: {mean} ms, the longest {longest} ms");
    }
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
