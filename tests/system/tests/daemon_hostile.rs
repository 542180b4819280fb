//! P8: what a front-end may do wrong, or right at an awkward moment.

#![forbid(unsafe_code)]

use exd_system_tests::daemon::Daemon;
use exd_system_tests::frontend::{
    DATA, Desc, FREE, INDIRECT, MEMORY, Machine, NEXT, WRITE, assert_unharmed, desc,
};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use std::fs;
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: u64 = FREE + 0x1000;
const STATUS: u64 = FREE + 0x1100;
const TABLE: u64 = FREE + 0x4000;

fn daemon(args: &[&str]) -> (TempDir, Daemon) {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    let statistics = format!("--stats-file={}", dir.path().join("statistics").display());
    let args: Vec<&str> = args.iter().copied().chain([statistics.as_str()]).collect();
    let daemon = Daemon::start(&dir.path().join("s"), &path, args);
    (dir, daemon)
}

#[test]
fn plain_requests() {
    let (_dir, daemon) = daemon(&["--serial=abc"]);
    let mut machine = Machine::start(daemon.socket(), 2, 16);
    for ring in 0..2 {
        assert_unharmed(&mut machine, ring);
        assert_eq!(machine.request(ring, FLUSH, 0, None), OK);
        assert_eq!(machine.request(ring, 77, 0, None), UNSUPP);
        assert_eq!(machine.request(ring, GET_ID, 0, Some(desc(DATA, 20, WRITE, 0))), OK);
        let mut id = [9; 20];
        machine.memory.read_slice(&mut id, GuestAddress(DATA)).expect("read");
        assert_eq!(&id, b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        let outside = Some(desc(DATA, 1024, WRITE, 0));
        assert_eq!(machine.request(ring, IN, 64 * MIB / 512 - 1, outside), IOERR);
    }
    drop(machine);
    daemon.terminate();
}

/// What a bad chain may come to.
enum Expected {
    Status(u8),
    /// A used entry of length 0.
    Nothing,
}
use Expected::{Nothing, Status};

#[test]
fn bad_chains() {
    let (_dir, daemon) = daemon(&[]);
    let mut machine = Machine::start(daemon.socket(), 2, 16);
    let header = desc(HEADER, 16, NEXT, 1);
    let status = desc(STATUS, 1, WRITE, 0);
    let read = desc(DATA, 512, WRITE | NEXT, 2);
    let far = 1 << 40;
    let cases: Vec<(&str, u16, Vec<Desc>, Expected)> = vec![
        ("good", 0, vec![header, read, status], Status(OK)),
        ("loop", 0, vec![header, desc(DATA, 512, WRITE | NEXT, 0), status], Nothing),
        ("to itself", 0, vec![desc(HEADER, 16, NEXT, 0)], Nothing),
        ("next outside", 0, vec![desc(HEADER, 16, NEXT, 16)], Nothing),
        ("next far outside", 0, vec![desc(HEADER, 16, NEXT, 65535)], Nothing),
        ("no status", 0, vec![desc(HEADER, 16, 0, 0)], Nothing),
        ("status outside", 0, vec![header, desc(far, 1, WRITE, 0)], Nothing),
        ("status just outside", 0, vec![header, desc(MEMORY, 1, WRITE, 0)], Nothing),
        ("status wraps", 0, vec![header, desc(u64::MAX, 2, WRITE, 0)], Nothing),
        ("header outside", 0, vec![desc(far, 16, NEXT, 1), status], Status(IOERR)),
        ("header short", 0, vec![desc(HEADER, 8, NEXT, 1), status], Status(IOERR)),
        ("no header", 0, vec![desc(STATUS, 1, WRITE, 0)], Status(IOERR)),
        (
            "readable after writable",
            0,
            vec![header, desc(STATUS, 1, WRITE | NEXT, 2), desc(DATA, 512, 0, 0)],
            Status(IOERR),
        ),
        ("data outside", 0, vec![header, desc(far, 512, WRITE | NEXT, 2), status], Status(IOERR)),
        (
            "data over the end",
            0,
            vec![header, desc(MEMORY - 256, 512, WRITE | NEXT, 2), status],
            Status(IOERR),
        ),
        ("odd length", 0, vec![header, desc(DATA, 511, WRITE | NEXT, 2), status], Status(IOERR)),
        ("empty data", 0, vec![header, desc(DATA, 0, WRITE | NEXT, 2), status], Status(OK)),
        (
            "4 GiB",
            0,
            vec![header, desc(DATA, u32::MAX, WRITE | NEXT, 2), status],
            // More than a chain may hold.
            Nothing,
        ),
        ("2 GiB", 0, vec![header, desc(DATA, 1 << 31, WRITE | NEXT, 2), status], Status(IOERR)),
        ("indirect, odd length", 0, vec![desc(TABLE, 17, INDIRECT, 0)], Nothing),
        ("indirect, empty", 0, vec![desc(TABLE, 0, INDIRECT, 0)], Nothing),
        ("indirect, outside", 0, vec![desc(far, 48, INDIRECT, 0)], Nothing),
        ("indirect, huge", 0, vec![desc(TABLE, 0xffff_fff0, INDIRECT, 0)], Nothing),
        ("indirect, good", 0, vec![desc(TABLE, 48, INDIRECT, 0)], Status(OK)),
        ("indirect in indirect", 0, vec![desc(TABLE + 0x100, 32, INDIRECT, 0)], Nothing),
        ("indirect and not ended", 0, vec![desc(TABLE, 16, INDIRECT, 0)], Nothing),
    ];
    machine.put_desc(TABLE, header);
    machine.put_desc(TABLE + 16, read);
    machine.put_desc(TABLE + 32, status);
    machine.put_desc(TABLE + 0x100, header);
    machine.put_desc(TABLE + 0x110, desc(TABLE, 48, INDIRECT, 0));
    for (name, head, chain, expected) in cases {
        println!("{name}");
        machine.put_header(HEADER, IN, 0);
        machine.memory.write_obj(0xffu8, GuestAddress(STATUS)).expect("write");
        for (slot, desc) in chain.iter().enumerate() {
            machine.describe(0, slot as u16, *desc);
        }
        machine.offer(0, head);
        machine.kick(0);
        let used = machine.wait_used(0, 1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, u32::from(head));
        assert_eq!(used[0].1 == 0, matches!(expected, Nothing), "{used:?}");
        let found: u8 = machine.memory.read_obj(GuestAddress(STATUS)).expect("read");
        let wanted = if let Status(status) = expected { status } else { 0xff };
        assert_eq!(found, wanted);
        assert_unharmed(&mut machine, 0);
    }
    assert_unharmed(&mut machine, 1);
    drop(machine);
    daemon.terminate();
}

#[test]
fn an_available_index_that_jumps_stops_that_ring_alone() {
    let (_dir, mut daemon) = daemon(&[]);
    let mut machine = Machine::start(daemon.socket(), 2, 16);
    machine.set_avail(0, 5000);
    machine.kick(0);
    daemon.wait_for("ring unusable");
    assert_eq!(machine.used(0), 0);
    for _ in 0..1000 {
        machine.kick(0);
    }
    assert_unharmed(&mut machine, 1);
    drop(machine);
    let mut machine = Machine::start(daemon.socket(), 1, 16);
    assert_unharmed(&mut machine, 0);
    drop(machine);
    daemon.terminate();
}

/// An entry that names no request leaves the ring where it is: what was taken is completed, what lies
/// behind is not taken. Started again behind the entry, the ring goes on.
#[test]
fn an_entry_that_is_no_request_stops_that_ring_alone() {
    let (_dir, mut daemon) = daemon(&[]);
    for (second, complaint) in [(0, "in flight already"), (16, "outside"), (65535, "outside")] {
        let mut machine = Machine::start(daemon.socket(), 2, 16);
        machine.put_header(HEADER, OUT, 0);
        machine.describe(0, 0, desc(HEADER, 16, NEXT, 1));
        machine.describe(0, 1, desc(DATA, 512, NEXT, 2));
        machine.describe(0, 2, desc(STATUS, 1, WRITE, 0));
        machine.offer(0, 0);
        machine.offer(0, second);
        machine.offer(0, 0);
        machine.kick(0);
        assert!(daemon.wait_for("ring unusable").contains(complaint));
        machine.wait_error(0);
        machine.wait_used(0, 1);
        machine.kick(0);
        assert_unharmed(&mut machine, 1);
        assert_eq!(machine.stop_ring(0), 1, "only the first was taken");
        assert_eq!(machine.used(0), 1);
        machine.start_ring(0, 2);
        machine.kick(0);
        machine.wait_used(0, 1);
        assert_unharmed(&mut machine, 0);
    }
    daemon.terminate();
}

/// Offers so many writes of 4 KiB.
fn offer_writes(machine: &mut Machine, count: u16) {
    for i in 0..count {
        let at = FREE + 0x10000 + u64::from(i) * 0x2000;
        machine.put_header(at, OUT, u64::from(i) * 128);
        machine.describe(0, i * 3, desc(at, 16, NEXT, i * 3 + 1));
        machine.describe(0, i * 3 + 1, desc(at + 0x1000, 4096, NEXT, i * 3 + 2));
        machine.describe(0, i * 3 + 2, desc(at + 32, 1, WRITE, 0));
        machine.offer(0, i * 3);
    }
}

/// GET_VRING_BASE is answered when everything that was taken has been completed, and what was not taken is
/// not lost.
#[test]
fn stopping_a_ring_drains_it() {
    let (_dir, daemon) = daemon(&[]);
    let mut machine = Machine::start(daemon.socket(), 1, 256);
    let mut base = 0;
    for _ in 0..200 {
        offer_writes(&mut machine, 60);
        machine.kick(0);
        base = machine.stop_ring(0);
        assert_eq!(machine.used(0), base, "taken and completed");
        machine.start_ring(0, base);
        machine.kick(0);
        while machine.used(0) != machine.rings[0].avail {
            machine.wait_used(0, 1);
        }
        machine.take_used(0);
    }
    assert!(base > 0);
    assert_unharmed(&mut machine, 0);
    drop(machine);
    daemon.terminate();
}

#[test]
fn resetting_the_device_drains_it() {
    let (_dir, daemon) = daemon(&[]);
    for _ in 0..20 {
        let mut machine = Machine::start(daemon.socket(), 1, 256);
        offer_writes(&mut machine, 60);
        machine.kick(0);
        machine.control.reset_device().expect("RESET_DEVICE");
        let used = machine.used(0);
        let base = machine.stop_ring(0);
        assert_eq!((used, machine.used(0)), (base, base), "nothing ran on");
    }
    daemon.terminate();
}

/// With wce=0 a write completes when it is durable, without FLUSH.
#[test]
fn without_a_cache_writes_are_durable() {
    let (dir, daemon) = daemon(&[]);
    let statistics = dir.path().join("statistics");
    let syncs = || {
        fs::remove_file(&statistics).ok();
        daemon.signal(nix::sys::signal::Signal::SIGUSR1);
        while !statistics.exists() {
            std::thread::yield_now();
        }
        let text = fs::read_to_string(&statistics).expect("statistics");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        value["syncs"].as_u64().expect("a number")
    };
    let mut machine = Machine::start(daemon.socket(), 1, 16);
    machine.set_writeback(0);
    let before = syncs();
    for i in 0..32 {
        assert_eq!(machine.request(0, OUT, i * 128, Some(desc(DATA, 4096, 0, 0))), OK);
    }
    let durable = syncs() - before;
    assert!(durable >= 32, "{durable} syncs for 32 writes");
    machine.set_writeback(1);
    let before = syncs();
    for i in 0..32 {
        assert_eq!(machine.request(0, OUT, i * 128, Some(desc(DATA, 4096, 0, 0))), OK);
    }
    let cached = syncs() - before;
    assert!(cached < 32, "{cached} syncs for 32 cached writes");
    drop(machine);
    daemon.terminate();
}

#[test]
fn memory_that_is_not_shared_is_named() {
    let (_dir, mut daemon) = daemon(&[]);
    let mut machine = Machine::negotiate(daemon.socket());
    assert_eq!(machine.start_without_memory(), Err("SET_VRING_ADDR"));
    drop(machine);
    let line = daemon.wait_for("shares no guest memory");
    assert!(line.contains("share=on"), "{line}");
    let mut machine = Machine::start(daemon.socket(), 1, 16);
    assert_unharmed(&mut machine, 0);
    drop(machine);
    daemon.terminate();
}
