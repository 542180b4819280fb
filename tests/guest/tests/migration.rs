//! A guest that moves and a disk that changes under it: live migration between two daemons on one image,
//! `stop` and `cont`, another size, another caching. Its data is verified afterwards.

use exd_guest_tests::steps::Acknowledged;
use exd_guest_tests::{Disk, Format, Guest, Qmp, Result, World, process};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(300);
/// Where the guest writes, and how often it has been told of an end before something happens.
const PLACE: u64 = 64 * MIB;
const LENGTH: u64 = 4 * MIB;
const STEP: u64 = 300;

#[test]
#[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
fn exd_live_migration() -> Result<()> {
    migration(World::new("exd-migration", Format::Exd)?)
}

#[test]
#[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
fn raw_live_migration() -> Result<()> {
    migration(World::new("raw-migration", Format::Raw)?)
}

#[test]
#[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
fn exd_size_and_cache() -> Result<()> {
    size_and_cache(World::new("exd-size-and-cache", Format::Exd)?)
}

/// P1, P2, P9: under write load, called off while it copies, failed after the source had stopped, and done.
fn migration(world: World) -> Result<()> {
    let source = world.disk("a")?;
    let mut target = source.twin("b", &["--incoming"]);
    target.serve()?;
    let mut guest = world.boot(&[&source], 2)?;
    let mut monitor = guest.monitor()?;
    let mut known = Acknowledged::default();
    let request = json!({ "op": "acked", "path": "/dev/vda", "start": PLACE, "length": LENGTH,
                          "writes": 10_000_000, "depth": 16, "max_sectors": 40, "seed": 1 });
    guest.call_with_events(request, |event| {
        known.record(event);
        known.writes < STEP
    })?;

    // `stop` and `cont`.
    for _ in 0..3 {
        monitor.execute("stop", json!({}))?;
        monitor.execute("cont", json!({}))?;
        work(&mut guest, &mut known)?;
    }

    // Called off while memory is being copied.
    let moving = Moving::begin(&world, &target, &mut monitor, "first", false)?;
    monitor.execute("migrate_cancel", json!({}))?;
    wait_for_status(&mut monitor, &["cancelled"])?;
    drop(moving);
    work(&mut guest, &mut known)?;

    // Failed when the source had stopped and the image was free already.
    let moving = Moving::begin(&world, &target, &mut monitor, "second", true)?;
    wait_for_status(&mut monitor, &["pre-switchover"])?;
    if world.format.is_exd() {
        target.check()?;
    }
    monitor.execute("migrate_cancel", json!({}))?;
    wait_for_status(&mut monitor, &["cancelled"])?;
    drop(moving);
    work(&mut guest, &mut known)?;

    // Done.
    let moving = Moving::begin(&world, &target, &mut monitor, "third", false)?;
    wait_for_status(&mut monitor, &["completed"])?;
    let mut moved = moving.0;
    // What the source has still printed happened before.
    moved.monitor()?.execute("query-status", json!({}))?;
    work(&mut moved, &mut known)?;
    drop(guest);
    moved.see_no_errors()?;
    moved.monitor()?.execute("quit", json!({}))?;
    moved.wait_for_end()?;

    let mut guest = world.boot(&[&target], 2)?;
    known.verify(&mut guest, "/dev/vda", PLACE, LENGTH)?;
    guest.see_no_errors()?;
    guest.power_off()?;
    println!("{} writes were acknowledged", known.writes);
    world.finish(vec![source, target])
}

/// A machine that a guest is on its way to.
struct Moving(Guest);

impl Moving {
    fn begin(
        world: &World,
        target: &Disk,
        source: &mut Qmp,
        name: &str,
        pause: bool,
    ) -> Result<Moving> {
        let guest = Guest::await_migration(&world.kit, &world.dir, name, &[target], 2)?;
        let uri = format!("unix:{}", socket(&world.dir, name));
        guest.monitor()?.execute("migrate-incoming", json!({ "uri": uri }))?;
        let capability = json!({ "capability": "pause-before-switchover", "state": pause });
        source.execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
        source.execute("migrate", json!({ "uri": uri }))?;
        Ok(Moving(guest))
    }
}

fn socket(dir: &Path, name: &str) -> String {
    dir.join(format!("{name}.migration")).display().to_string()
}

/// The guest goes on writing.
fn work(guest: &mut Guest, known: &mut Acknowledged) -> Result<()> {
    let enough = known.writes + STEP;
    guest.go_on(|event| {
        known.record(event);
        known.writes < enough
    })
}

fn wait_for_status(monitor: &mut Qmp, wanted: &[&str]) -> Result<()> {
    process::wait_until(&format!("the migration is {wanted:?}"), LIMIT, || {
        let status = monitor.execute("query-migrate", json!({}))?;
        let status = status["status"].as_str().unwrap_or_default().to_owned();
        if status == "failed" && !wanted.contains(&"failed") {
            return Err("the migration has failed".into());
        }
        Ok(wanted.contains(&status.as_str()))
    })
}

/// Issue: a running guest sees another size, up and down; the cache type it shows is the true one; each fsync
/// is one host sync, and with the cache off no write is without one.
fn size_and_cache(world: World) -> Result<()> {
    let disk = world.disk("a")?;
    let mut guest = world.boot(&[&disk], 2)?;
    let sectors = |guest: &mut Guest| -> Result<u64> {
        let text = guest.call(json!({ "op": "read", "path": "/sys/block/vda/size" }))?;
        Ok(text.as_str().unwrap_or_default().parse()?)
    };
    for size in [1280 * MIB, 768 * MIB, 2048 * MIB] {
        let work = guest.run(&fio(size.min(1024 * MIB) - 512 * MIB))?;
        assert!(!work.is_empty());
        disk.control(&json!({ "command": "resize", "size": size }))?;
        process::wait_until("the guest sees the size", LIMIT, || {
            Ok(sectors(&mut guest)? == size / 512)
        })?;
    }
    // Where there was nothing before the last one.
    guest.run(&fio(1900 * MIB))?;

    let cache = |guest: &mut Guest| {
        guest.call(json!({ "op": "read", "path": "/sys/block/vda/cache_type" }))
    };
    let counts = || -> Result<(u64, u64)> {
        let stats = disk.control(&json!({ "command": "stats" }))?;
        let disk = &stats["disks"][0];
        let syncs = find(disk, "syncs").ok_or_else(|| format!("no syncs in {stats}"))?;
        let queues = disk["queues"].as_array().into_iter().flatten();
        Ok((queues.filter_map(|queue| queue["flush"]["requests"].as_u64()).sum(), syncs))
    };
    let syncs = || Ok(counts()?.1);
    assert_eq!(cache(&mut guest)?, "write back");
    // Background work has syncs of its own; none is left when it is quiet.
    settle(&syncs)?;
    let before = counts()?;
    write_blocks(&mut guest, 600 * MIB, &["--fsync=1", "--end_fsync=1"])?;
    let after = counts()?;
    let (flushes, synced) = (after.0 - before.0, after.1 - before.1);
    println!("write back: {flushes} flushes and {synced} syncs for {FSYNCS} fsyncs");
    assert_eq!((flushes, synced), (FSYNCS, FSYNCS), "flushes and syncs");

    let path = "/sys/block/vda/cache_type";
    guest.call(json!({ "op": "write", "path": path, "text": "write through" }))?;
    assert_eq!(cache(&mut guest)?, "write through");
    settle(&syncs)?;
    let before = syncs()?;
    write_blocks(&mut guest, 700 * MIB, &[])?;
    let writes = syncs()? - before;
    println!("write through: {writes} syncs for {FSYNCS} writes");
    assert!(writes >= FSYNCS, "{writes} syncs: a write was completed before it was durable");

    // After a reset QEMU shows the guest what it was told before. Whatever that is, the daemon is not less
    // strict: what the guest has synced is durable.
    guest.reboot()?;
    let shown = cache(&mut guest)?;
    settle(&syncs)?;
    let before = syncs()?;
    write_blocks(&mut guest, 720 * MIB, &["--fsync=1", "--end_fsync=1"])?;
    let synced = syncs()? - before;
    println!("after a reset, {shown}: {synced} syncs for {FSYNCS} fsyncs");
    assert!(synced >= FSYNCS, "{shown}, {synced} syncs: an fsync has reached nobody");
    guest.see_no_errors()?;
    guest.power_off()?;
    world.finish(vec![disk])
}

const FSYNCS: u64 = 20;

/// Writes so many blocks one after another, past the guest's page cache.
fn write_blocks(guest: &mut Guest, offset: u64, more: &[&str]) -> Result<()> {
    let (offset, size) = (format!("--offset={offset}"), format!("--size={}", FSYNCS * 4096));
    let mut argv = vec!["fio", "--name=blocks", "--filename=/dev/vda", "--ioengine=sync"];
    argv.extend(["--direct=1", "--rw=write", "--bs=4k", &offset, &size]);
    argv.extend(more);
    guest.run(&argv).map(|_| ())
}

/// Waits until there are no more syncs for three seconds.
fn settle(syncs: &impl Fn() -> Result<u64>) -> Result<()> {
    let (mut last, mut since) = (syncs()?, std::time::Instant::now());
    process::wait_until("background work ends", LIMIT, || {
        let now = syncs()?;
        if now != last {
            (last, since) = (now, std::time::Instant::now());
        }
        Ok(since.elapsed() > Duration::from_secs(3))
    })
}

/// The first number of this name, anywhere in a value.
fn find(value: &Value, name: &str) -> Option<u64> {
    match value {
        Value::Object(map) => map
            .get(name)
            .and_then(Value::as_u64)
            .or_else(|| map.values().find_map(|value| find(value, name))),
        Value::Array(values) => values.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

/// Random writes at this offset, read back and verified.
fn fio(offset: u64) -> [&'static str; 11] {
    let offset: &'static str = format!("--offset={offset}").leak();
    [
        "fio",
        "--name=verify",
        "--filename=/dev/vda",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--rw=randwrite",
        "--verify=crc32c",
        "--bs=4k",
        "--size=8m",
        offset,
    ]
}
