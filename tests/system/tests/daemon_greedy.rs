//! P8: guests that take more than their share. Whatever one of them does with its ring, the daemon's memory
//! stays bounded and the other disk of the process goes on: its completions are counted, not timed.

#![forbid(unsafe_code)]

use exd_system_tests::daemon::Daemon;
use exd_system_tests::frontend::{FREE, Machine, NEXT, WRITE, assert_unharmed, desc};
use exd_system_tests::image;
use exd_system_tests::programs::{program, scratch};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

const IN: u32 = 0;
const MIB: u64 = 1 << 20;
/// Requests that the other disk must complete meanwhile.
const NEIGHBOURS: usize = 300;
/// Bytes by which the daemon may have grown.
const GROWTH_MAX: u64 = 64 << 20;

/// One test at a time: a greedy guest takes all of a processor.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often one comes at least: what the daemon keeps of each visit is seen if it is 1 MiB.
const VISITS: u64 = 100;

/// A daemon with two disks, and the sockets of both.
fn two_disks(dir: &Path) -> Daemon {
    let mut text = String::new();
    for name in ["greedy", "other"] {
        image::create(&dir.join(format!("{name}.exd")), 64 * MIB);
        let at = dir.display();
        text += "[[disk]]\nnum-queues = 2\n";
        text += &format!("blk-file = '{at}/{name}.exd'\nsocket-path = '{at}/{name}'\n");
    }
    let config = dir.join("config.toml");
    fs::write(&config, text).expect("write");
    let mut command = Command::new(program("vhost-daemon"));
    command.arg(format!("--config={}", config.display()));
    let mut daemon = Daemon::spawn(command, &dir.join("greedy"));
    daemon.wait_for("serving");
    daemon.wait_for("serving");
    daemon
}

fn private_bytes(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a size");
    let kib = line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok());
    kib.expect("a number") << 10
}

/// The other disk does its work while `greedy` goes on, and the daemon does not grow.
fn beside(daemon: &Daemon, dir: &Path, greedy: impl FnOnce(&AtomicBool) + Send) {
    let mut other = Machine::start(&dir.join("other"), 1, 16);
    assert_unharmed(&mut other, 0);
    let before = private_bytes(daemon);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| greedy(&done));
        // Also when this thread panics, for which the other one would else be waited for in vain.
        let _end = End(&done);
        for _ in 0..NEIGHBOURS {
            assert_unharmed(&mut other, 0);
            see_growth(daemon, before);
        }
    });
    see_growth(daemon, before);
}

fn see_growth(daemon: &Daemon, before: u64) {
    let now = private_bytes(daemon);
    assert!(now < before + GROWTH_MAX, "{before} bytes, then {now}");
}

/// Tells the greedy one to end.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Describes a read of 4 KiB whose head is `slot`.
fn describe_read(machine: &Machine, slot: u16, number: u64) {
    let at = FREE + 0x10000 + number * 0x2000;
    machine.put_header(at, IN, number * 8);
    machine.describe(0, slot, desc(at, 16, NEXT, slot + 1));
    machine.describe(0, slot + 1, desc(at + 0x1000, 4096, WRITE | NEXT, slot + 2));
    machine.describe(0, slot + 2, desc(at + 32, 1, WRITE, 0));
}

#[test]
fn one_that_never_stops_kicking() {
    let _alone = alone();
    let dir = scratch();
    let daemon = two_disks(dir.path());
    let machine = Machine::start(&dir.path().join("greedy"), 1, 16);
    let kicks = AtomicU64::new(0);
    beside(&daemon, dir.path(), |done| {
        while !done.load(Ordering::SeqCst) {
            machine.kick(0);
            kicks.fetch_add(1, Ordering::Relaxed);
        }
    });
    assert!(kicks.load(Ordering::Relaxed) > NEIGHBOURS as u64, "it kicked all the time");
    drop(machine);
    daemon.terminate();
}

/// It offers its requests anew as soon as they are taken, looks at no completion and reads no call.
#[test]
fn one_that_never_takes_its_completions() {
    let _alone = alone();
    let dir = scratch();
    let daemon = two_disks(dir.path());
    let mut machine = Machine::start(&dir.path().join("greedy"), 1, 256);
    for i in 0..64 {
        describe_read(&machine, i * 3, i.into());
    }
    let offered = AtomicU64::new(0);
    let mut taken = 0u64;
    beside(&daemon, dir.path(), |done| {
        let mut used = machine.used(0);
        let mut head = 0u16;
        let mut free = 64u64;
        while !done.load(Ordering::SeqCst) {
            // Only what has ended is offered again: more would be a broken ring.
            let now = machine.used(0);
            free += u64::from(now.wrapping_sub(used));
            taken += u64::from(now.wrapping_sub(used));
            used = now;
            if free == 64 {
                for _ in 0..64 {
                    machine.offer(0, head * 3);
                    head = (head + 1) % 64;
                    offered.fetch_add(1, Ordering::Relaxed);
                }
                free = 0;
                machine.kick(0);
            } else {
                thread::yield_now();
            }
        }
    });
    assert!(taken > 64, "it was served as well: {taken}");
    drop(machine);
    daemon.terminate();
}

/// Its queue is full of requests that it never asks the end of; it leaves with all of them.
#[test]
fn one_that_leaves_again_and_again() {
    let _alone = alone();
    let dir = scratch();
    let daemon = two_disks(dir.path());
    let socket = dir.path().join("greedy");
    beside(&daemon, dir.path(), |done| {
        let mut visits = 0;
        while visits < VISITS || !done.load(Ordering::SeqCst) {
            let mut machine = Machine::start(&socket, 1, 256);
            for i in 0..64 {
                describe_read(&machine, i * 3, i.into());
                machine.offer(0, i * 3);
            }
            machine.kick(0);
            visits += 1;
        }
    });
    daemon.terminate();
}
