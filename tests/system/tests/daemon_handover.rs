//! An image between two daemons, as in a live migration on one host: never two at once, nothing lost.

#![forbid(unsafe_code)]

use exd_file::lock::read_holder;
use exd_file::{HostFile, OpenMode};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::frontend::{FREE, Machine, NEXT, WRITE, desc};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use std::fs::File;
use std::path::Path;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 4096;
const READ: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
/// Where the tests keep their data.
const DATA: u64 = FREE + 0x1000;

/// The kinds of images, with the arguments they need.
fn images(dir: &Path) -> [(std::path::PathBuf, &'static str); 2] {
    let (exd, raw) = (dir.join("disk.exd"), dir.join("disk.raw"));
    image::create(&exd, 16 * MIB);
    File::create(&raw).and_then(|file| file.set_len(16 * MIB)).expect("create");
    [(exd, "--format=exd"), (raw, "--format=raw")]
}

fn put(machine: &mut Machine, sector: u64, stamp: u8) {
    machine.memory.write_slice(&[stamp; BLOCK as usize], GuestAddress(DATA)).expect("in memory");
    assert_eq!(machine.request(0, OUT, sector, Some(desc(DATA, BLOCK, 0, 0))), 0);
}

fn get(machine: &mut Machine, sector: u64) -> u8 {
    assert_eq!(machine.request(0, READ, sector, Some(desc(DATA, BLOCK, WRITE, 0))), 0);
    let mut data = [0; BLOCK as usize];
    machine.memory.read_slice(&mut data, GuestAddress(DATA)).expect("in memory");
    assert!(data.iter().all(|byte| *byte == data[0]), "one stamp");
    data[0]
}

/// Offers a read without waiting for it.
fn offer_read(machine: &mut Machine, sector: u64) {
    machine.put_header(FREE, READ, sector);
    machine.memory.write_obj(0xffu8, GuestAddress(FREE + 16)).expect("in memory");
    machine.describe(0, 0, desc(FREE, 16, NEXT, 1));
    machine.describe(0, 1, desc(DATA, BLOCK, WRITE | NEXT, 2));
    machine.describe(0, 2, desc(FREE + 16, 1, WRITE, 0));
    machine.offer(0, 0);
    machine.kick(0);
}

fn data_byte(machine: &Machine) -> u8 {
    machine.memory.read_obj(GuestAddress(DATA)).expect("in memory")
}

/// The process that the image names as its holder.
fn holder(path: &Path) -> u64 {
    let mode = OpenMode { write: false, direct: false };
    read_holder(&HostFile::open(path, mode).expect("open")).expect("a holder record").pid
}

/// P9: the target waits for the source, the source for the target when it goes on, and each sees what the
/// other wrote.
#[test]
fn p9_the_image_changes_hands_and_back() {
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let is_exd = format == "--format=exd";
        let source = Daemon::start(&dir.path().join("source"), &path, [format]);
        let mut a = Machine::start(source.socket(), 1, 16);
        put(&mut a, 0, 1);
        // Not flushed: what was completed is handed over all the same.
        put(&mut a, 8, 2);

        let mut refused =
            Daemon::launch(&dir.path().join("refused"), &path, [format, "--lock-wait=0"]);
        let text = refused.wait_for("Failed to get \"write\" lock");
        assert!(!refused.wait().success(), "{text}");

        let args = [format, "--incoming", "--log-level=debug"];
        let mut target = Daemon::start(&dir.path().join("target"), &path, args);
        let mut b = Machine::start(target.socket(), 1, 16);
        offer_read(&mut b, 8);
        target.wait_for("waiting up to");
        assert_eq!(b.used(0), 0, "nothing is served without the lock");
        if is_exd {
            assert_eq!(holder(&path), source.pid() as u64);
        }

        let base = a.stop_ring(0);
        b.wait_used(0, 1);
        assert_eq!(data_byte(&b), 2);
        if is_exd {
            assert_eq!(holder(&path), target.pid() as u64);
        }
        put(&mut b, 8, 3);

        // The migration has failed after all: the source goes on.
        a.start_ring(0, base);
        offer_read(&mut a, 8);
        let base = b.stop_ring(0);
        a.wait_used(0, 1);
        assert_eq!(data_byte(&a), 3);
        assert_eq!(get(&mut a, 0), 1);
        put(&mut a, 0, 4);
        a.stop_ring(0);
        b.start_ring(0, base);
        assert_eq!(get(&mut b, 0), 4);
        drop((a, b));
        source.terminate();
        target.terminate();
        if is_exd {
            image::assert_clean(&path);
        }
    }
}

/// P9: when the lock cannot be had in time, requests wait; a later kick tries again.
#[test]
fn p9_without_the_lock_nothing_is_served_and_later_attempts_work() {
    let dir = scratch();
    let (path, format) = images(dir.path())[0].clone();
    let source = Daemon::start(&dir.path().join("source"), &path, [format]);
    let mut a = Machine::start(source.socket(), 1, 16);
    put(&mut a, 8, 7);
    let args = [format, "--incoming", "--lock-wait=0"];
    let mut target = Daemon::start(&dir.path().join("target"), &path, args);
    let mut b = Machine::start(target.socket(), 1, 16);
    offer_read(&mut b, 8);
    target.wait_for("could not get the image");
    let text = target.wait_for("It is held by vhost-daemon");
    assert!(text.contains(&format!("process {}", source.pid())), "{text}");
    target.wait_for("the guest's requests wait");
    assert_eq!(b.used(0), 0);
    a.stop_ring(0);
    // Its turn comes with the next kick, at the latest.
    while b.used(0) == 0 {
        b.kick(0);
        std::thread::yield_now();
    }
    assert_eq!(data_byte(&b), 7);
    // A ring that waits can be stopped.
    let base = b.stop_ring(0);
    a.start_ring(0, 1);
    assert_eq!(get(&mut a, 8), 7);
    b.start_ring(0, base);
    offer_read(&mut b, 8);
    target.wait_for("could not get the image");
    assert_eq!(b.stop_ring(0), base, "the request was not taken");
    drop(b);
    target.terminate();
    drop(a);
    source.terminate();
    image::assert_clean(&path);
}

/// Stops and starts, as firmware, `stop` and `cont` cause them: nothing is lost, and the image is closed
/// cleanly in between. How long they take is printed.
#[test]
fn stops_and_starts() {
    const ROUNDS: u32 = 20;
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let daemon = Daemon::start(&dir.path().join("s"), &path, [format]);
        let mut machine = Machine::start(daemon.socket(), 1, 16);
        let (mut stopping, mut starting) = (0.0, 0.0);
        for round in 0..ROUNDS {
            put(&mut machine, 8 * u64::from(round), round as u8 + 1);
            if round % 3 == 0 {
                assert_eq!(machine.request(0, FLUSH, 0, None), 0);
            }
            let begun = Instant::now();
            let base = machine.stop_ring(0);
            stopping += begun.elapsed().as_secs_f64();
            if format == "--format=exd" && round % 5 == 0 {
                let report = image::check(&path);
                assert!(report.is_clean() && !report.unclean, "{report:?}");
            }
            let begun = Instant::now();
            machine.start_ring(0, base);
            assert_eq!(get(&mut machine, 8 * u64::from(round)), round as u8 + 1);
            starting += begun.elapsed().as_secs_f64();
        }
        println!(
            "{format}: {:.1} ms to stop, {:.1} ms to start",
            stopping * 1e3 / f64::from(ROUNDS),
            starting * 1e3 / f64::from(ROUNDS)
        );
        for round in 0..ROUNDS {
            assert_eq!(get(&mut machine, 8 * u64::from(round)), round as u8 + 1);
        }
        drop(machine);
        daemon.terminate();
    }
}
