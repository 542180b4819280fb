//! What the daemon costs: host syncs per flush, time to start.

#![forbid(unsafe_code)]

use exd_image::CreateOptions;
use exd_system_tests::client::Client;
use exd_system_tests::daemon::Daemon;
use exd_system_tests::image;
use exd_system_tests::private_disk::PrivateDisk;
use exd_system_tests::programs::{program, scratch};
use fastrand::Rng;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn syncs(daemon: &Daemon, statistics: &Path) -> u64 {
    // Written anew on the signal, by renaming: gone first, it is complete when it is there again.
    fs::remove_file(statistics).ok();
    daemon.signal(nix::sys::signal::Signal::SIGUSR1);
    while !statistics.exists() {
        std::thread::yield_now();
    }
    let text = fs::read_to_string(statistics).expect("statistics");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    value["syncs"].as_u64().expect("a number")
}

/// 256 writes of 4 KiB, each in another 64 KiB, a flush after each: how many flushes the device saw.
fn write_and_flush(client: &mut Client, disk: Option<&PrivateDisk>) -> u64 {
    let flushes = || disk.map_or(0, PrivateDisk::flushes);
    let before = flushes();
    for i in 0..256 {
        client.write(i * 65536, &[i as u8 | 1; 4096]).expect("write");
        client.flush().expect("flush");
    }
    flushes() - before
}

/// What a raw file costs on the disk: when it is sparse, where each sync makes the file system commit its
/// journal too, and when it is overwritten.
fn raw_flushes(disk: &PrivateDisk) -> (u64, u64) {
    let dir = scratch();
    let path = disk.path().join("disk.raw");
    fs::File::create(&path).and_then(|file| file.set_len(64 * MIB)).expect("create");
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--format=raw"]);
    let mut client = Client::new(daemon.socket());
    let sparse = write_and_flush(&mut client, Some(disk));
    let overwritten = write_and_flush(&mut client, Some(disk));
    drop(client);
    daemon.terminate();
    (sparse, overwritten)
}

/// Allocating writes, each flushed: the record travels with the data in one sync. Returns the device's
/// flushes.
fn exd_flushes(path: &Path, disk: Option<&PrivateDisk>) -> u64 {
    let dir = scratch();
    image::create(path, 64 * MIB);
    let statistics = dir.path().join("statistics");
    let args = [format!("--stats-file={}", statistics.display())];
    let daemon = Daemon::start(&dir.path().join("s"), path, args);
    let mut client = Client::new(daemon.socket());
    client.flush().expect("flush");
    let before = syncs(&daemon, &statistics);
    let flushes = write_and_flush(&mut client, disk);
    let count = syncs(&daemon, &statistics) - before;
    println!("{}: {count} syncs by the engine for 256 flushes", path.display());
    assert!(count <= 260, "{count} syncs");
    // Nothing new, nothing to sync.
    let before = syncs(&daemon, &statistics);
    for _ in 0..100 {
        client.flush().expect("flush");
    }
    let idle = syncs(&daemon, &statistics) - before;
    assert!(idle <= 2, "{idle} syncs for 100 flushes of nothing");
    drop(client);
    daemon.terminate();
    image::assert_clean(path);
    flushes
}

#[test]
fn one_sync_per_flush() {
    let dir = scratch();
    exd_flushes(&dir.path().join("disk.exd"), None);
}

/// The same by what a device of our own counts. The file system on it has no journal, which would add its
/// own flushes to those of a raw file and of an image alike; those are printed for comparison.
#[test]
fn one_device_flush_per_flush() {
    let disk = match PrivateDisk::without_journal(256 * MIB) {
        Ok(disk) => disk,
        Err(text) => return println!("not run, needs root: {text}"),
    };
    let (sparse, overwritten) = raw_flushes(&disk);
    let count = exd_flushes(&disk.path().join("disk.exd"), Some(&disk));
    println!(
        "device flushes for 256 flushes: {count}; raw file: {sparse}, {overwritten} overwritten"
    );
    assert!(count <= 260, "{count} flushes");
    drop(disk);
    let disk = PrivateDisk::new(256 * MIB).expect("it worked just now");
    let (sparse, overwritten) = raw_flushes(&disk);
    let count = exd_flushes(&disk.path().join("disk.exd"), Some(&disk));
    println!("with a journal: {count}; raw file: {sparse}, {overwritten} overwritten");
    assert!(count <= sparse + 16, "{count} flushes, a sparse raw file {sparse}");
}

/// Starts the daemon and returns how long it took until it served.
fn start(dir: &Path, path: &Path) -> (Daemon, Duration) {
    let begun = Instant::now();
    let daemon = Daemon::start(&dir.join("s"), path, ["--log-level=debug"]);
    (daemon, begun.elapsed())
}

/// A start reads what it needs, not the image: 16 TiB and a million extents make no difference. The bounds
/// are generous, for slow and busy machines; the figures are printed.
#[test]
fn starting_does_not_depend_on_the_size() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    const EXTENTS: u64 = 1_000_000;
    let virtual_size = 16 << 40;
    let begun = Instant::now();
    image::create_with(&path, &CreateOptions { virtual_size, ..CreateOptions::default() });
    println!("create: {:?}", begun.elapsed());
    let stride = virtual_size / EXTENTS / 4096 * 4096;
    let begun = Instant::now();
    let mut image = image::open(&path, false);
    for i in 0..EXTENTS {
        image.write(i * stride, &[i as u8 | 1; 4096]).expect("write");
    }
    let extents = {
        image.checkpoint().expect("checkpoint");
        image.info().extents
    };
    image.close().expect("close");
    println!("{extents} extents made in {:?}", begun.elapsed());
    assert!(extents >= EXTENTS);

    // Built before the clock starts.
    program("vhost-daemon");
    let (daemon, clean) = start(dir.path(), &path);
    let mut client = Client::new(daemon.socket());
    let mut random = Rng::with_seed(1);
    for i in 0..20_000u64 {
        let block = random.u64(0..virtual_size / 4096);
        client.write(block * 4096, &[i as u8; 4096]).expect("write");
        if i % 100 == 0 {
            client.flush().expect("flush");
        }
    }
    daemon.kill();
    drop(client);
    let (daemon, recovered) = start(dir.path(), &path);
    daemon.terminate();
    println!("start: {clean:?} after a clean end, {recovered:?} after SIGKILL");
    assert!(clean < Duration::from_secs(2), "{clean:?}");
    assert!(recovered < Duration::from_secs(10), "{recovered:?}");
}
