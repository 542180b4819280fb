//! P2: a write that completed survives the death of the daemon, at any moment.
//!
//! `EXD_KILLS` sets how often each test kills (default 40; 200 and more for a full run), `EXD_SEED` the
//! seed.

#![forbid(unsafe_code)]

use exd_file::lock;
use exd_file::{HostFile, LockMode, OpenMode};
use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::history::{History, Promise, SECTOR};
use exd_system_tests::image;
use exd_system_tests::private_disk::{PrivateDisk, Throttle};
use exd_system_tests::programs::scratch;
use exd_system_tests::workload::{Workload, memory, verify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::cell::Cell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const DISK: u64 = 16 << 20;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What is killed, and what is done to it.
struct Run<'a> {
    dir: &'a Path,
    image: PathBuf,
    args: Vec<String>,
    queues: usize,
    kills: u64,
    /// Longest time between the start of the workload and the kill.
    patience: Duration,
    /// How the daemon is ended.
    signal: Signal,
    /// What must be there afterwards.
    promise: Promise,
    /// Called for each daemon before the workload.
    prepare: &'a dyn Fn(&Daemon),
    /// Called after each death.
    inspect: &'a dyn Fn(&Path),
}

impl Run<'_> {
    /// Kills and verifies, again and again. Returns the number of changes acknowledged.
    fn run(&self) -> u64 {
        let seed = number("EXD_SEED", fastrand::u64(..));
        println!("repeat with EXD_SEED={seed} EXD_KILLS={}", self.kills);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut history = History::of_daemon(DISK / SECTOR as u64, &self.args);
        for _ in 0..self.kills {
            let (mut daemon, mut client) = self.connect();
            verify(&mut client, &mut history, self.promise);
            if self.promise == Promise::Flushed {
                // What was found may not be durable yet, and the next death may take it away.
                let begun = history.now();
                client.flush().expect("flush");
                history.flushed(begun, u64::MAX);
            }
            (self.prepare)(&daemon);
            let delay = self.patience.mul_f64(random.f64());
            let (pid, signal) = (Pid::from_raw(daemon.pid()), self.signal);
            let killer = thread::spawn(move || {
                // The moment is what is random here.
                thread::sleep(delay);
                kill(pid, signal).expect("it runs");
            });
            let mut workload = Workload::new(random.u64(..), self.queues, u64::MAX);
            assert!(!workload.run(&mut client, &mut history, &mut daemon), "it was ended");
            killer.join().expect("no panic");
            assert_eq!(daemon.wait().success(), signal == Signal::SIGTERM, "{signal} ends it");
            (self.inspect)(&self.image);
        }
        let (daemon, mut client) = self.connect();
        verify(&mut client, &mut history, self.promise);
        drop(client);
        daemon.terminate();
        (self.inspect)(&self.image);
        println!("{} changes acknowledged, {} kills", history.acknowledged, self.kills);
        history.acknowledged
    }

    fn connect(&self) -> (Daemon, Client) {
        let daemon = Daemon::start(&self.dir.join("s"), &self.image, &self.args);
        let options =
            Options { queues: self.queues, memory: memory(self.queues), ..Options::default() };
        let client = Client::connect(daemon.socket(), options).expect("connected");
        (daemon, client)
    }
}

/// The test's own canary as much as the daemon's test: a raw file promises the same.
#[test]
fn p2_raw_image() {
    let dir = scratch();
    let image = dir.path().join("disk.raw");
    File::create(&image).and_then(|file| file.set_len(DISK)).expect("create");
    for cache in ["none", "writeback"] {
        let run = Run {
            dir: dir.path(),
            image: image.clone(),
            args: vec!["--format=raw".to_owned(), format!("--cache={cache}")],
            queues: 2,
            kills: number("EXD_KILLS", 40) / 4,
            patience: Duration::from_millis(30),
            signal: Signal::SIGKILL,
            promise: Promise::Completed,
            prepare: &|_| {},
            inspect: &|_| {},
        };
        File::create(&image).and_then(|file| file.set_len(DISK)).expect("create");
        assert!(run.run() > 0);
    }
}

#[test]
fn p2_exd_image() {
    kill_exd(&[], 2, number("EXD_KILLS", 40));
}

/// Through the host's page cache; more queues than threads.
#[test]
fn p2_exd_image_buffered() {
    kill_exd(&["--cache=writeback", "--threads=2"], 5, number("EXD_KILLS", 40) / 4);
}

/// Every write durable before it completes.
#[test]
fn p2_exd_image_without_a_cache() {
    kill_exd(&["--cache=directsync"], 1, number("EXD_KILLS", 40) / 4);
}

/// Half of the kills on each block size.
fn kill_exd(args: &[&str], queues: usize, kills: u64) {
    for block_size in image::BLOCK_SIZES {
        println!("blocks of {block_size}");
        let dir = scratch();
        let path = dir.path().join("disk.exd");
        image::create_in_blocks(&path, DISK, block_size);
        let run = Run {
            dir: dir.path(),
            image: path,
            args: args.iter().map(|arg| arg.to_string()).collect(),
            queues,
            kills: kills.div_ceil(2),
            patience: Duration::from_millis(30),
            signal: Signal::SIGKILL,
            promise: Promise::Completed,
            prepare: &|_| {},
            inspect: &|path| image::assert_clean(path),
        };
        assert!(run.run() > 0);
    }
}

/// The disk is so slow that the writes of the dead daemon land after its death: the lock must keep its
/// successor away until they have (P9), and `check` too.
#[test]
fn p2_p9_late_writes_on_a_slow_disk() {
    let disk = match PrivateDisk::new(256 << 20) {
        Ok(disk) => disk,
        Err(text) => return println!("not run, needs root: {text}"),
    };
    let throttle = match Throttle::new(&disk, 4 << 20, 200) {
        Ok(throttle) => throttle,
        Err(text) => return println!("not run, needs a control group for I/O: {text}"),
    };
    let path = disk.path().join("disk.exd");
    image::create(&path, DISK);
    let late = Cell::new(0);
    let run = Run {
        dir: disk.path(),
        image: path,
        args: Vec::new(),
        queues: 2,
        kills: number("EXD_KILLS", 40) / 4,
        patience: Duration::from_millis(100),
        signal: Signal::SIGKILL,
        promise: Promise::Completed,
        prepare: &|daemon| throttle.add(daemon.pid()).expect("throttled"),
        inspect: &|path| {
            // The daemon has been waited for; its writes may not have ended.
            let file = HostFile::open(path, OpenMode::default()).expect("open");
            if lock::conflict(&file, LockMode::Reader).expect("asked").is_some() {
                late.set(late.get() + 1);
            }
            image::assert_clean(path);
        },
    };
    run.run();
    println!("after {} of {} deaths writes were still to land", late.get(), run.kills);
}

/// Without its completion log an image is as after a power loss: consistent, and every flushed write is
/// there (P1, P3, P4).
#[test]
fn p1_without_the_completion_log() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create_in_blocks(&path, DISK, 512);
    // Where the harness makes the daemon put it.
    let logs = dir.path().join("run");
    let run = Run {
        dir: dir.path(),
        image: path,
        args: Vec::new(),
        queues: 2,
        kills: number("EXD_KILLS", 40) / 4,
        patience: Duration::from_millis(30),
        signal: Signal::SIGKILL,
        promise: Promise::Flushed,
        prepare: &|_| {},
        inspect: &|path| {
            for log in fs::read_dir(&logs).expect("the logs' directory") {
                fs::remove_file(log.expect("entry").path()).expect("removed");
            }
            image::assert_clean(path);
        },
    };
    assert!(run.run() > 0);
    assert_eq!(fs::read_dir(&logs).expect("the logs' directory").count(), 0, "none stays");
}

/// SIGTERM at any moment: what was taken is finished, the image is closed cleanly, no log stays, status 0.
#[test]
fn p2_sigterm_under_load() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, DISK);
    let logs = dir.path().join("run");
    let run = Run {
        dir: dir.path(),
        image: path,
        args: Vec::new(),
        queues: 2,
        kills: number("EXD_KILLS", 40) / 2,
        patience: Duration::from_millis(50),
        signal: Signal::SIGTERM,
        promise: Promise::Completed,
        prepare: &|_| {},
        inspect: &|path| {
            assert_eq!(fs::read_dir(&logs).expect("the logs' directory").count(), 0, "none stays");
            let report = image::check(path);
            assert!(report.is_clean() && !report.unclean, "{report:?}");
            assert_eq!((report.records, report.logged), (0, 0));
        },
    };
    assert!(run.run() > 0);
}
