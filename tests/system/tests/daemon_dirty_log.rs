//! The dirty log of a live migration: what the daemon writes to guest memory is marked, all of it and nothing
//! else. Memory is copied by the log while requests run, as QEMU does it, and compared.

#![forbid(unsafe_code)]

use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::frontend::{Desc, FEATURES, FREE, MEMORY, Machine, NEXT, WRITE, desc};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use fastrand::Rng;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;
use vhost::VhostBackend;
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::{Bytes, FileOffset, GuestAddress, VolatileMemory};

const LOG_ALL: u64 = 1 << 26;
const EVENT_IDX: u64 = 1 << 29;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const READ: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const DEPTH: u16 = 16;
/// The daemon writes the ring at 0xc000; the rest of these pages is the guest's own.
const USED_PAGE: u64 = 0xc;

/// A log in a file.
struct Log(File);

impl Log {
    /// Sets a new log of so many bytes.
    fn set(machine: &Machine, bytes: u64) -> Log {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(bytes).expect("grow");
        let region = VhostUserDirtyLogRegion {
            mmap_size: bytes,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        machine.control.set_log_base(0, Some(region)).expect("SET_LOG_BASE");
        Log(file)
    }

    /// Takes the marks, as QEMU does: byte by byte, what is marked meanwhile stays.
    fn take(&self) -> BTreeSet<u64> {
        let len = self.0.metadata().expect("length").len();
        let map = vm_memory::MmapRegion::<()>::from_file(
            FileOffset::new(self.0.try_clone().expect("duplicate"), 0),
            len as usize,
        )
        .expect("mapped");
        let mut pages = BTreeSet::new();
        for byte in 0..len {
            let cell = map.get_atomic_ref::<AtomicU8>(byte as usize).expect("inside");
            let bits = cell.swap(0, Ordering::SeqCst);
            pages.extend((0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| byte * 8 + bit));
        }
        pages
    }
}

fn log_all(machine: &Machine, features: u64) {
    machine.control.set_features(features).expect("SET_FEATURES");
}

/// A machine, logging or not, on a disk whose every sector differs.
fn start(daemon: &Daemon) -> Machine {
    let mut machine = Machine::start(daemon.socket(), 1, DEPTH * 4);
    for at in 0..16 {
        let data: Vec<u8> = (0..MIB).map(|i| (i / 512 + at * 7) as u8 | 1).collect();
        machine.memory.write_slice(&data, GuestAddress(8 * MIB)).expect("in memory");
        let data = desc(8 * MIB, MIB as u32, 0, 0);
        assert_eq!(machine.request(0, OUT, at * MIB / 512, Some(data)), 0);
    }
    machine
}

/// One request of several under way: header and status in places of their own, by the number.
fn place(number: u16) -> (u64, u64) {
    (FREE + u64::from(number) * 16, FREE + 0x10000 + u64::from(number) * 0x1100)
}

/// Offers a request without a kick; the pages that the daemon writes for it.
fn offer(machine: &mut Machine, number: u16, kind: u32, sector: u64, data: Desc) -> BTreeSet<u64> {
    let (header, status) = place(number);
    machine.put_header(header, kind, sector);
    let slot = number * 3;
    machine.describe(0, slot, desc(header, 16, NEXT, slot + 1));
    let flags = if kind == OUT { NEXT } else { NEXT | WRITE };
    machine.describe(0, slot + 1, Desc { flags, next: slot + 2, ..data });
    machine.describe(0, slot + 2, desc(status, 1, WRITE, 0));
    machine.offer(0, slot);
    let mut pages = BTreeSet::from([status / PAGE]);
    let written = match kind {
        READ if (sector * 512) + u64::from(data.len) <= 16 * MIB => u64::from(data.len),
        GET_ID => 20,
        _ => 0,
    };
    if written > 0 {
        pages.extend(data.addr / PAGE..=(data.addr + written - 1) / PAGE);
    }
    pages
}

fn random_request(machine: &mut Machine, random: &mut Rng, number: u16) -> BTreeSet<u64> {
    // Each has a megabyte of its own behind the headers; the one before is the guest's.
    let at = 2 * MIB + u64::from(number) * 512 * 1024 + random.u64(0..64 * 1024);
    let sectors = random.u64(1..200);
    let len = (sectors * 512) as u32;
    let sector = random.u64(0..16 * MIB / 512 - 200);
    match random.u8(0..10) {
        0 => offer(machine, number, GET_ID, 0, desc(at, 20, 0, 0)),
        1 => offer(machine, number, READ, 16 * MIB / 512 - 1, desc(at, 1024, 0, 0)),
        2..4 => offer(machine, number, OUT, sector, desc(at, len, 0, 0)),
        _ => offer(machine, number, READ, sector, desc(at, len, 0, 0)),
    }
}

/// Waits for so many used entries, without interrupts: with EVENT_IDX they would have to be asked for.
fn wait_used(machine: &mut Machine, count: usize) {
    let begun = Instant::now();
    let mut seen = 0;
    while seen < count {
        seen += machine.take_used(0).len();
        assert!(begun.elapsed() < PATIENCE, "the daemon answers");
        std::thread::yield_now();
    }
}

struct Copy(Vec<u8>);

impl Copy {
    fn pages(&mut self, machine: &Machine, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            let target = &mut self.0[range];
            machine.memory.read_slice(target, GuestAddress(page * PAGE)).expect("in memory");
        }
    }
}

fn migrate(features: u64) {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 16 * MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--num-queues=1"]);
    let mut machine = start(&daemon);
    machine.control.set_features(features).expect("SET_FEATURES");
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = Rng::with_seed(seed);
    let log = Log::set(&machine, MEMORY / PAGE / 8);
    // Without LOG_ALL nothing is marked.
    for number in 0..DEPTH {
        random_request(&mut machine, &mut random, number);
    }
    machine.kick(0);
    wait_used(&mut machine, DEPTH.into());
    assert_eq!(log.take(), BTreeSet::new(), "LOG_ALL is off");
    // What is under way when logging begins counts too.
    let mut expected = BTreeSet::from([USED_PAGE]);
    for number in 0..DEPTH {
        expected.extend(random_request(&mut machine, &mut random, number));
    }
    machine.kick(0);
    log_all(&machine, features | LOG_ALL);
    let mut copy = Copy(vec![0; MEMORY as usize]);
    copy.pages(&machine, 0..MEMORY / PAGE);
    let mut seen = BTreeSet::new();
    let mut pass = |machine: &Machine, copy: &mut Copy| {
        let marked = log.take();
        copy.pages(machine, marked.iter().copied());
        seen.extend(marked);
    };
    for _ in 0..40 {
        pass(&machine, &mut copy);
        wait_used(&mut machine, DEPTH.into());
        for number in 0..DEPTH {
            expected.extend(random_request(&mut machine, &mut random, number));
        }
        machine.kick(0);
    }
    // Some may still be under way: the answer comes after the last mark.
    machine.stop_ring(0);
    pass(&machine, &mut copy);
    // What the guest itself has written, its hypervisor knows: rings and headers.
    let own = [0, 8].into_iter().chain(FREE / PAGE..FREE / PAGE + 1);
    copy.pages(&machine, own);
    let mut now = vec![0; MEMORY as usize];
    machine.memory.read_slice(&mut now, GuestAddress(0)).expect("in memory");
    for page in 0..MEMORY / PAGE {
        let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        assert!(copy.0[range.clone()] == now[range], "page {page:#x} was written unmarked");
    }
    let surplus: Vec<_> = seen.difference(&expected).collect();
    assert!(surplus.is_empty(), "marked, but not written: {surplus:x?}");
    drop(machine);
    daemon.terminate();
    image::assert_clean(&path);
}

#[test]
fn memory_copied_by_the_log_is_the_memory() {
    migrate(FEATURES);
    migrate(FEATURES | EVENT_IDX);
}

/// A migration that is called off, another one with a longer log, memory that comes in between, logs that are
/// too short or none.
#[test]
fn the_log_can_change_and_memory_can_grow() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 16 * MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--num-queues=1"]);
    let mut machine = start(&daemon);
    let read = |machine: &mut Machine, at: u64| {
        let pages = offer(machine, 0, READ, 0, desc(at, 4096, 0, 0));
        machine.kick(0);
        wait_used(machine, 1);
        let status: u8 = machine.memory.read_obj(GuestAddress(place(0).1)).expect("in memory");
        assert_eq!(status, 0);
        &pages | &BTreeSet::from([USED_PAGE])
    };
    // Before there is a log, marks go nowhere.
    log_all(&machine, FEATURES | LOG_ALL);
    read(&mut machine, 4 * MIB);
    let first = Log::set(&machine, 512);
    assert_eq!(read(&mut machine, 4 * MIB), first.take());
    log_all(&machine, FEATURES);
    read(&mut machine, 5 * MIB);
    assert_eq!(first.take(), BTreeSet::new(), "called off");
    log_all(&machine, FEATURES | LOG_ALL);
    let second = Log::set(&machine, 2 << 30 >> 15);
    assert_eq!(read(&mut machine, 6 * MIB), second.take());
    // Plugged in after SET_LOG_BASE.
    let more = tempfile::tempfile().expect("temporary file");
    more.set_len(MIB).expect("grow");
    machine.plug_memory(&more, 1 << 30, MIB);
    let pages = read(&mut machine, (1 << 30) + 4096);
    assert!(pages.contains(&((1 << 30) / PAGE + 1)));
    assert_eq!(pages, second.take());
    let mut bytes = [0; 1];
    more.read_exact_at(&mut bytes, 4096).expect("read");
    assert_eq!(bytes, [1]);
    assert_eq!(first.take(), BTreeSet::new(), "nobody marks in the old one");
    // A log that ends before the page: no harm.
    let short = Log::set(&machine, 2);
    read(&mut machine, 7 * MIB);
    assert_eq!(short.take(), BTreeSet::from([USED_PAGE]));
    // After a reset nothing is logged.
    machine.control.reset_device().ok();
    let refused = VhostUserDirtyLogRegion { mmap_size: 0, mmap_offset: 0, mmap_handle: 0 };
    assert!(machine.control.set_log_base(0, Some(refused)).is_err(), "no bytes");
    drop(machine);
    // The next connection is unharmed.
    let mut machine = Machine::start(daemon.socket(), 1, 16);
    assert_eq!(machine.request(0, READ, 0, Some(desc(8 * MIB, 512, WRITE, 0))), 0);
    drop(machine);
    daemon.terminate();
}
