//! Machines that change while they write: memory and disks that come and go, `stop` and `cont`, a reset, the
//! death of one of two machines whose disks are in one daemon. Whatever a disk has acknowledged is there
//! afterwards (P2), and nobody sees an error that is not his.

use exd_guest_tests::guest::{Machine, RECONNECT_MS};
use exd_guest_tests::steps::{self, Acknowledged, FileSystem};
use exd_guest_tests::{Disk, Format, Guest, Qmp, Result, World, process};
use serde_json::{Value, json};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);
/// Each piece of work writes to a place of its own, of this length.
const LENGTH: u64 = 4 * MIB;
/// How many more writes must end before the next thing happens.
const STEP: u64 = 300;
const THREADS: &str = "--io-engine=threads";
/// Memory that is plugged in.
const MORE_MEMORY: u64 = 256 * MIB;
/// How much of it the daemon must have touched: far more than a few buffers.
const TOUCHED: u64 = 2 * MIB;

#[test]
#[ignore = "boots virtual machines; `cargo xtask test` runs it"]
fn exd_devices() -> Result<()> {
    devices(World::new("exd-devices", Format::Exd)?, &[])
}

#[test]
#[ignore = "boots virtual machines; `cargo xtask test` runs it"]
fn exd_devices_threads() -> Result<()> {
    devices(World::new("exd-devices-threads", Format::Exd)?, &[THREADS])
}

/// A disk of 4096-byte sectors, and the same one again, by the second socket, to read only.
#[test]
#[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
fn exd_large_sectors_and_a_reader() -> Result<()> {
    let world = World::new("exd-large-sectors", Format::Exd)?;
    let second = world.dir.join("reader.sock");
    let option = format!("--read-only-socket={}", second.display());
    let mut disk = world.idle_disk("a")?.with(&["--logical-block-size=4096", &option]);
    disk.serve()?;
    let reader = Disk::served_elsewhere(&world.programs, disk.image(), &second);
    let mut guest = world.boot(&[&disk, &reader], 1)?;
    for (name, value) in
        [("vda/queue/logical_block_size", "4096"), ("vda/ro", "0"), ("vdb/ro", "1")]
    {
        let path = format!("/sys/block/{name}");
        let shown = guest.call(json!({ "op": "read", "path": path }))?;
        assert_eq!(shown, json!(value), "{name}");
    }

    // Whichever sectors they are: what is written by the one is read by the other.
    let fio = ["fio", "--name=v", "--ioengine=libaio", "--direct=1", "--bs=16k", "--size=16M"];
    let fio = [&fio[..], &["--iodepth=16", "--offset=1M", "--verify=crc32c"]].concat();
    let write = ["--filename=/dev/vda", "--rw=randwrite", "--do_verify=0", "--end_fsync=1"];
    guest.run(&[&fio[..], &write].concat())?;
    guest.run(&[&fio[..], &["--filename=/dev/vdb", "--rw=read"]].concat())?;
    FileSystem::Ext4.make(&mut guest, "/dev/vda")?;
    FileSystem::Ext4.check(&mut guest, "/dev/vdb")?;
    let write = ["--filename=/dev/vdb", "--rw=write"];
    guest.run(&[&fio[..], &write].concat()).expect_err("a disk to read only");
    guest.see_no_errors()?;
    guest.power_off()?;
    world.finish(vec![disk])
}

/// How often the machine is reset under load; at most 100 times.
fn resets() -> u64 {
    std::env::var("EXD_RESETS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Work of a guest on a part of its disk.
struct Work {
    start: u64,
    known: Acknowledged,
}

impl Work {
    /// Writes that go on for ever, from the place of this number on.
    fn begin(guest: &mut Guest, place: u64, depth: u64) -> Result<Work> {
        let start = (64 + 8 * place) * MIB;
        let mut known = Acknowledged::default();
        let request = json!({ "op": "acked", "path": "/dev/vda", "start": start, "length": LENGTH,
                              "writes": 10_000_000, "depth": depth, "max_sectors": 40, "seed": place });
        guest.call_with_events(request, |event| {
            known.record(event);
            known.writes < STEP
        })?;
        Ok(Work { start, known })
    }

    /// It goes on as before.
    fn go_on(&mut self, guest: &mut Guest) -> Result<()> {
        let enough = self.known.writes + STEP;
        guest.go_on(|event| {
            self.known.record(event);
            self.known.writes < enough
        })
    }

    fn verify(&self, guest: &mut Guest, path: &str) -> Result<()> {
        let sectors = self.known.verify(guest, path, self.start, LENGTH)?;
        println!("{path} at {}: {} writes, {sectors} sectors", self.start, self.known.writes);
        Ok(())
    }
}

fn devices(world: World, options: &[&str]) -> Result<()> {
    let mut disk = world.idle_disk("a")?.with(options);
    let other = world.idle_disk("b")?.with(options);
    disk.serve_with(&[&other])?;
    let mut guest = world.power_on("a-", &[&disk], Machine::HotPlug)?;
    let mut neighbour = world.power_on("b-", &[&other], Machine::Fixed)?;
    guest.wait_for_start()?;
    neighbour.wait_for_start()?;
    see_confined(&disk)?;
    if options.contains(&THREADS) {
        assert!(!disk.has_io_uring()?, "the daemon does its I/O by io_uring");
    }
    let mut beside = Work::begin(&mut neighbour, 0, 2)?;
    let mut works = Vec::new();
    let mut monitor = guest.monitor()?;

    let mut work = Work::begin(&mut guest, 0, 16)?;
    for _ in 0..2 {
        monitor.execute("stop", json!({}))?;
        monitor.execute("cont", json!({}))?;
        work.go_on(&mut guest)?;
    }
    plug_memory(&mut monitor)?;
    work.go_on(&mut guest)?;

    // The disk is taken away: the work ends by an error, what was acknowledged before is there.
    monitor.execute("device_del", json!({ "id": "disk0" }))?;
    let error = guest.see_end(|event| work.known.record(event))?;
    println!("the disk went away: {error:?}");
    error.ok_or("the work goes on without a disk")?;
    monitor.wait_for("DEVICE_DELETED", "device", "disk0")?;
    works.push(work);
    plug_disk(&mut monitor, &disk)?;
    wait_for_disk(&mut guest)?;
    verify_all(&works, &mut guest)?;
    beside.go_on(&mut neighbour)?;

    // New buffers are taken from the new memory.
    see_memory(&mut guest, &disk)?;

    // A reset in the midst of it, which no driver expects. The neighbour stands still meanwhile: one emulated
    // machine at a time is slow enough.
    let mut other_monitor = neighbour.monitor()?;
    other_monitor.execute("stop", json!({}))?;
    for reset in 0..resets() {
        works.push(Work::begin(&mut guest, 2 + reset, 16)?);
        monitor.execute("system_reset", json!({}))?;
        guest.wait_for_start()?;
        works.last().into_iter().try_for_each(|work| work.verify(&mut guest, "/dev/vda"))?;
    }
    verify_all(&works, &mut guest)?;
    other_monitor.execute("cont", json!({}))?;

    // The machine dies; its neighbour does not care, and the next machine finds everything.
    works.push(Work::begin(&mut guest, 1, 16)?);
    drop(guest);
    let completed = disk.completed(1);
    process::wait_until("the other disk is at work", LIMIT, || {
        Ok(disk.completed(1) >= completed + STEP)
    })?;
    other_monitor.execute("stop", json!({}))?;
    neighbour.see_rest(|event| beside.known.record(event));
    neighbour.see_no_errors()?;
    drop(neighbour);
    let mut guest = world.boot(&[&disk, &other], 2)?;
    verify_all(&works, &mut guest)?;
    beside.verify(&mut guest, "/dev/vdb")?;
    guest.see_no_errors()?;
    guest.power_off()?;
    world.finish(vec![disk, other])
}

/// The daemon has given up its rights: it runs under a filter of system calls and can get no rights back.
fn see_confined(disk: &Disk) -> Result<()> {
    let status = disk.daemon_proc("status")?;
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1"] {
        if !status.lines().any(|found| found == line) {
            return Err(format!("the daemon is not confined, {line:?} is not in:\n{status}").into());
        }
    }
    Ok(())
}

fn plug_memory(monitor: &mut Qmp) -> Result<()> {
    let memory = json!({ "qom-type": "memory-backend-memfd", "id": "more", "size": MORE_MEMORY,
                         "share": true });
    monitor.execute("object-add", memory)?;
    let module = json!({ "driver": "pc-dimm", "id": "module", "memdev": "more" });
    monitor.execute("device_add", module).map(|_| ())
}

/// The guest uses the memory that was plugged in, and the daemon reads and writes it.
fn see_memory(guest: &mut Guest, disk: &Disk) -> Result<()> {
    let total = guest.call(json!({ "op": "read", "path": "/proc/meminfo" }))?;
    println!("{}", total.as_str().and_then(|text| text.lines().next()).unwrap_or_default());
    steps::fio(guest, "/dev/vda", "64k", "16m")?;
    let touched = memory_of(disk)?;
    let more: Vec<&(u64, u64)> =
        touched.iter().filter(|(bytes, _)| *bytes == MORE_MEMORY).collect();
    match more[..] {
        [(_, touched)] if *touched >= TOUCHED => {
            println!("the daemon has touched {} KiB of the new memory", touched >> 10);
            Ok(())
        }
        _ => Err(format!("no I/O in the new memory: {touched:?}").into()),
    }
}

/// The guest memory that the daemon has mapped: bytes of each region, and how many of them it has touched.
fn memory_of(disk: &Disk) -> Result<Vec<(u64, u64)>> {
    let maps = disk.daemon_proc("smaps")?;
    let mut found = Vec::new();
    let mut is_memory = false;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let kib = second.parse::<u64>().unwrap_or_default();
        match first {
            "Size:" if is_memory => found.push((kib << 10, 0)),
            "Rss:" if is_memory => {
                found.iter_mut().last().into_iter().for_each(|of| of.1 = kib << 10)
            }
            _ if !first.ends_with(':') => is_memory = line.contains("memfd:memory-backend-memfd"),
            _ => {}
        }
    }
    Ok(found)
}

/// A disk as management software adds it: the socket first, then the device.
fn plug_disk(monitor: &mut Qmp, disk: &Disk) -> Result<()> {
    monitor.execute("chardev-remove", json!({ "id": "socket0" }))?;
    let address = json!({ "type": "unix", "data": { "path": disk.socket() } });
    let backend = json!({ "addr": address, "server": false, "reconnect-ms": RECONNECT_MS });
    let backend = json!({ "type": "socket", "data": backend });
    monitor.execute("chardev-add", json!({ "id": "socket0", "backend": backend }))?;
    let device = json!({ "driver": "vhost-user-blk-pci", "id": "disk0", "chardev": "socket0",
                         "num-queues": 2, "bus": "port0" });
    monitor.execute("device_add", device).map(|_| ())
}

fn wait_for_disk(guest: &mut Guest) -> Result<()> {
    process::wait_until("the guest sees the disk", LIMIT, || {
        let disks = guest.call(json!({ "op": "list", "path": "/sys/block" }))?;
        let is_there = |name: &Value| name == "vda";
        Ok(disks.as_array().is_some_and(|names| names.iter().any(is_there)))
    })
}

fn verify_all(works: &[Work], guest: &mut Guest) -> Result<()> {
    works.iter().try_for_each(|work| work.verify(guest, "/dev/vda"))
}
