//! P2: a write that completed survives the death of the daemon, at any moment.
//!
//! `EXD_KILLS` sets how often each test kills (default 40; 200 and more for a full run), `EXD_SEED` the
//! seed.

use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::history::{History, Promise, SECTOR};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use exd_system_tests::workload::{Workload, memory, verify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
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
        let mut history = History::new(DISK / SECTOR as u64);
        for _ in 0..self.kills {
            let (mut daemon, mut client) = self.connect();
            verify(&mut client, &mut history, Promise::Completed);
            (self.prepare)(&daemon);
            let delay = self.patience.mul_f64(random.f64());
            let pid = Pid::from_raw(daemon.pid());
            let killer = thread::spawn(move || {
                // The moment is what is random here.
                thread::sleep(delay);
                kill(pid, Signal::SIGKILL).expect("it runs");
            });
            let mut workload = Workload::new(random.u64(..), self.queues, u64::MAX);
            assert!(!workload.run(&mut client, &mut history, &mut daemon), "it was killed");
            killer.join().expect("no panic");
            (self.inspect)(&self.image);
        }
        let (daemon, mut client) = self.connect();
        verify(&mut client, &mut history, Promise::Completed);
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
            prepare: &|_| {},
            inspect: &|_| {},
        };
        File::create(&image).and_then(|file| file.set_len(DISK)).expect("create");
        assert!(run.run() > 0);
    }
}

#[test]
fn p2_exd_image() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, DISK);
    let run = Run {
        dir: dir.path(),
        image: path,
        args: Vec::new(),
        queues: 2,
        kills: number("EXD_KILLS", 40),
        patience: Duration::from_millis(30),
        prepare: &|_| {},
        inspect: &|path| image::assert_clean(path),
    };
    assert!(run.run() > 0);
}
