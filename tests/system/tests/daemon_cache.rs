//! P1: a guest that believes what it wrote to be durable is right, whatever its front-end and its daemons
//! have been through: resets, a daemon that died, another daemon.

#![forbid(unsafe_code)]

use exd_system_tests::daemon::Daemon;
use exd_system_tests::frontend::{DATA, Machine, desc};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const OUT: u32 = 1;
const DISK: u64 = 16 << 20;
const WRITES: u64 = 16;

/// The images, with the format of each.
fn images() -> (TempDir, [(PathBuf, &'static str); 2]) {
    let dir = scratch();
    let (exd, raw) = (dir.path().join("disk.exd"), dir.path().join("disk.raw"));
    image::create(&exd, DISK);
    File::create(&raw).and_then(|file| file.set_len(DISK)).expect("create");
    (dir, [(exd, "--format=exd"), (raw, "--format=raw")])
}

/// A daemon, and where it writes its statistics.
struct Site {
    daemon: Daemon,
    statistics: PathBuf,
}

impl Site {
    fn start(name: &str, image: &Path, args: &[&str]) -> Site {
        let statistics = image.with_extension(format!("{name}.json"));
        let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        all.push(format!("--stats-file={}", statistics.display()));
        let daemon = Daemon::start(&image.with_extension(name), image, all);
        Site { daemon, statistics }
    }

    fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    /// Writes made durable one by one count like syncs.
    fn syncs(&self) -> u64 {
        fs::remove_file(&self.statistics).ok();
        self.daemon.signal(Signal::SIGUSR1);
        while !self.statistics.exists() {
            std::thread::yield_now();
        }
        let text = fs::read_to_string(&self.statistics).expect("statistics");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        value["syncs"].as_u64().expect("a number") + value["durable_writes"].as_u64().unwrap_or(0)
    }

    /// Each write is durable before it completes.
    fn is_durable(&self, machine: &mut Machine) -> bool {
        let before = self.syncs();
        for i in 0..WRITES {
            let data = desc(DATA, 4096, 0, 0);
            assert_eq!(machine.request(0, OUT, i * 8, Some(data)), 0);
        }
        let syncs = self.syncs() - before;
        assert!(!(WRITES / 2..WRITES).contains(&syncs), "{syncs} syncs for {WRITES} writes");
        syncs >= WRITES
    }
}

/// QEMU keeps what the driver has set, and tells the next one that.
#[test]
fn p1_a_reset_does_not_bring_the_cache_back() {
    let (_dir, images) = images();
    for (image, format) in images {
        let site = Site::start("a", &image, &[format]);
        let mut machine = Machine::start(site.socket(), 1, 16);
        assert!(!site.is_durable(&mut machine));
        for durable in [true, false, true] {
            machine.set_writeback(u8::from(!durable));
            assert_eq!(site.is_durable(&mut machine), durable);
            machine.restart_after_reset();
            assert_eq!(machine.writeback(), u8::from(!durable));
            assert_eq!(site.is_durable(&mut machine), durable, "after a reset");
        }
        drop(machine);
        // The next front-end asks.
        let mut machine = Machine::start(site.socket(), 1, 16);
        assert!(!site.is_durable(&mut machine));
        drop(machine);
        site.daemon.terminate();
    }
}

/// The driver's choice does not outlive it where more durability is configured.
#[test]
fn a_reset_brings_the_configured_durability_back() {
    let (_dir, [(image, format), _]) = images();
    let site = Site::start("a", &image, &[format, "--cache=directsync"]);
    let mut machine = Machine::start(site.socket(), 1, 16);
    assert!(site.is_durable(&mut machine));
    machine.set_writeback(1);
    assert!(!site.is_durable(&mut machine));
    machine.restart_after_reset();
    assert!(site.is_durable(&mut machine));
    drop(machine);
    site.daemon.terminate();
}

/// The front-end does not ask the daemon that comes next: it believes what it believed.
#[test]
fn p1_another_daemon_knows_what_the_guest_believes() {
    let (_dir, images) = images();
    for (image, format) in images {
        let mut site = Site::start("a", &image, &[format]);
        let mut machine = Machine::tracked(site.socket(), 1, 16);
        machine.start_ring(0, 0);
        for (round, durable) in [false, true, false].into_iter().enumerate() {
            if round > 0 {
                machine.set_writeback(u8::from(!durable));
            }
            assert_eq!(site.is_durable(&mut machine), durable);
            site.daemon.kill();
            site = Site::start("a", &image, &[format]);
            machine.reconnect(site.socket());
            assert_eq!(site.is_durable(&mut machine), durable, "after a restart");
        }
        drop(machine);
        site.daemon.terminate();
    }
}

/// Nobody has kept anything: the guest may believe anything.
#[test]
fn p1_what_is_unknown_is_durable() {
    let (_dir, [(image, format), _]) = images();
    let site = Site::start("a", &image, &[format]);
    let mut machine = Machine::start(site.socket(), 1, 16);
    assert!(!site.is_durable(&mut machine));
    site.daemon.kill();
    let mut site = Site::start("a", &image, &[format]);
    machine.reconnect(site.socket());
    assert!(site.is_durable(&mut machine));
    site.daemon.wait_for("each write is made durable before it completes");
    // It may ask because it was told of a new size, and keep the size alone.
    assert_eq!(machine.writeback(), 0);
    assert!(site.is_durable(&mut machine));
    machine.set_writeback(1);
    assert!(!site.is_durable(&mut machine), "now it is known");
    drop(machine);
    site.daemon.terminate();
}

/// A guest that moves believes what it was told where it comes from; its new front-end has asked the new
/// daemon.
#[test]
fn p1_a_migrated_guest_keeps_its_belief() {
    let (_dir, images) = images();
    for (image, format) in images {
        for (durable, incoming) in [(false, true), (true, true), (true, false)] {
            let source = Site::start("source", &image, &[format]);
            let mut a = Machine::start(source.socket(), 1, 16);
            a.set_writeback(u8::from(!durable));
            assert_eq!(source.is_durable(&mut a), durable);
            let base = a.stop_ring(0);
            let mut args = vec![format];
            args.extend(incoming.then_some("--incoming"));
            let target = Site::start("target", &image, &args);
            let mut b = a.moved(target.socket(), &[base]);
            assert_eq!(target.is_durable(&mut b), durable, "as at the source");
            // The driver that starts next reads the new front-end's copy.
            b.restart_after_reset();
            assert!(!target.is_durable(&mut b));
            drop((a, b));
            source.daemon.terminate();
            target.daemon.terminate();
        }
    }
}
