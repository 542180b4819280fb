//! A Linux guest on our disks: the file systems, writing patterns and deaths that issue a disk must survive.
//!
//! Every test runs on an EXD image (in blocks of 4 KiB where neighbours are to share blocks, in the default's
//! sectors elsewhere), on a raw file served by the same daemon, and on a raw file served by
//! qemu-storage-daemon: what fails on all three is the test's or the guest's fault, what fails on the
//! first two the daemon's, and what fails on EXD alone the engine's.

use exd_guest_tests::steps::{self, Acknowledged, FileSystem};
use exd_guest_tests::world::DISK_BYTES;
use exd_guest_tests::{Disk, Format, Guest, Result, World, process};
use serde_json::{Value, json};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Where the tools of a partitioned world once put the first partition, and where today's do.
const PARTITION_STARTS: [u64; 2] = [63, 2048];
/// Sectors of a partition: mkfs.xfs wants 300 MiB at least.
const PARTITION_SECTORS: u64 = 400 * 2048;
/// Freed space goes back to the host in the background; this long may it take.
const RECLAIM_LIMIT: Duration = Duration::from_secs(60);

macro_rules! on_each_format {
    ($($(#[doc = $doc:literal])* $name:ident [$exd:ident] => $call:expr;)*) => {
        mod exd {
            use super::*;
            $(on_each_format!(@test exd $exd $(#[doc = $doc])* $name $call);)*
            // The patterns once more, where no blocks are shared.
            on_each_format!(@test exd Exd patterns_in_sectors |world| patterns(world, 2));
        }
        mod raw {
            use super::*;
            $(on_each_format!(@test raw Raw $(#[doc = $doc])* $name $call);)*
        }
        mod reference {
            use super::*;
            $(on_each_format!(@test reference Reference $(#[doc = $doc])* $name $call);)*
        }
    };
    (@test $module:ident $format:ident $(#[doc = $doc:literal])* $name:ident $call:expr) => {
        $(#[doc = $doc])*
        #[test]
        #[ignore = "boots a virtual machine; `cargo xtask test` runs it"]
        fn $name() -> Result<()> {
            $call(World::new(concat!(stringify!($module), "-", stringify!($name)), Format::$format)?)
        }
    };
}

on_each_format! {
    /// P7, P1: file systems on partitions at sector 63 and 2048, one queue.
    file_systems_one_queue [ExdBlocks] => |world| file_systems(world, 1);
    /// P7, P1: the same with two queues.
    file_systems_two_queues [Exd] => |world| file_systems(world, 2);
    /// P7: unaligned neighbours in every state of the blocks they share, one queue.
    patterns_one_queue [ExdBlocks] => |world| patterns(world, 1);
    /// P7: the same with the neighbours on two queues.
    patterns_two_queues [ExdBlocks] => |world| patterns(world, 2);
    /// P1, P2, P4: SIGKILL of the daemon while the guest writes, then a new daemon and a new guest.
    daemon_killed [Exd] => super::daemon_killed;
    /// P4: a daemon ended by SIGTERM and a new one, under one guest that goes on.
    daemon_restarted [ExdBlocks] => super::daemon_restarted;
}

fn file_systems(world: World, queues: u32) -> Result<()> {
    let disks = vec![world.disk("a")?, world.disk("b")?];
    let mut guest = world.boot(&[&disks[0], &disks[1]], queues)?;
    see_disk(&mut guest, world.format, queues)?;
    let places = [("vda", PARTITION_STARTS[0], &disks[0]), ("vdb", PARTITION_STARTS[1], &disks[1])];
    for (name, start, _) in places {
        steps::partition(&mut guest, &format!("/dev/{name}"), start, PARTITION_SECTORS)?;
    }
    let kinds = [FileSystem::Ext4, FileSystem::Xfs];
    for turn in 0..2 {
        for (index, (name, _, disk)) in places.into_iter().enumerate() {
            let (kind, partition) = (kinds[(index + turn) % 2], format!("/dev/{name}1"));
            let before = disk.host_bytes()?;
            kind.make(&mut guest, &partition)?;
            if turn == 1 {
                wait_for_space(disk, before - 64 * MIB, "mkfs discards")?;
            }
            work_on_file_system(&mut guest, disk, kind, &partition)?;
        }
        guest.reboot()?;
        for (index, (name, start, _)) in places.into_iter().enumerate() {
            let found = read_number(&mut guest, &format!("/sys/block/{name}/{name}1/start"))?;
            assert_eq!(found, start, "the partition is where it was put");
            let (kind, partition) = (kinds[(index + turn) % 2], format!("/dev/{name}1"));
            kind.check(&mut guest, &partition)?;
            kind.mount(&mut guest, &partition, "/mnt/again")?;
            steps::verify_files(&mut guest, "/mnt/again", FILES)?;
            steps::unmount(&mut guest, "/mnt/again")?;
        }
    }
    guest.power_off()?;
    // The same daemons take the next machine.
    let mut guest = world.boot(&[&disks[0], &disks[1]], queues)?;
    kinds[1].check(&mut guest, "/dev/vda1")?;
    kinds[0].check(&mut guest, "/dev/vdb1")?;
    guest.power_off()?;
    world.finish(disks)
}

/// Files that each file system gets.
const FILES: u64 = 30;

/// fio in three sizes, fsynced files, a deletion with fstrim; a check at the end. 128 MiB stay.
fn work_on_file_system(
    guest: &mut Guest,
    disk: &Disk,
    kind: FileSystem,
    partition: &str,
) -> Result<()> {
    let dir = "/mnt/work";
    kind.mount(guest, partition, dir)?;
    for (block, size) in [("512", "4m"), ("4k", "16m"), ("64k", "64m")] {
        steps::fio(guest, &format!("{dir}/fio-{block}"), block, size)?;
    }
    steps::write_files(guest, dir, 0, FILES)?;
    steps::unmount(guest, dir)?;
    kind.mount(guest, partition, dir)?;
    let before = disk.host_bytes()?;
    guest.call(json!({ "op": "remove", "path": format!("{dir}/fio-64k") }))?;
    trim(guest, disk, dir, before - 48 * MIB)?;
    steps::fio(guest, &format!("{dir}/fio-again"), "64k", "128m")?;
    steps::verify_files(guest, dir, FILES)?;
    steps::unmount(guest, dir)?;
    kind.check(guest, partition)
}

fn patterns(world: World, queues: u32) -> Result<()> {
    let disk = world.disk("a")?;
    let mut guest = world.boot(&[&disk], queues)?;
    see_disk(&mut guest, world.format, queues)?;
    let mut next = 0;
    let mut place = |mib: u64| {
        next += mib;
        json!({ "path": "/dev/vda", "start": (next - mib) * MIB, "length": mib * MIB })
    };
    // Each pattern gets a place of its own, never written before.
    let mut requests = Vec::new();
    for before in [Value::Null, json!("zeroes"), json!("discard")] {
        for (block, writers, mib) in [(4096, 2, 16), (4096, 16, 16), (65536, 4, 32)] {
            let own = json!({ "op": "neighbours", "block": block, "writers": writers });
            requests.push((own, place(mib), before.clone()));
        }
    }
    for (block, shift) in [(4096, 0), (4096, 512), (512, 512), (65536, 63 * 512)] {
        let own = json!({ "op": "fresh", "block": block, "shift": shift });
        requests.push((own, place(4), Value::Null));
    }
    for (seed, max_sectors) in [(1, 9), (2, 200)] {
        let own = json!({ "op": "storm", "rounds": 40, "depth": 32, "max_sectors": max_sectors,
                          "seed": seed });
        requests.push((own, place(1), Value::Null));
    }
    for (mut request, place, before) in requests {
        for key in ["path", "start", "length"] {
            request[key] = place[key].clone();
        }
        request["before"] = before;
        guest.call(request)?;
    }
    // A partition at sector 63, never written: every block of it is off the image's grid.
    guest.run(&["blkdiscard", "/dev/vda"])?;
    wait_for_space(&disk, 8 * MIB, "a discard of everything")?;
    steps::partition(&mut guest, "/dev/vda", 63, PARTITION_SECTORS)?;
    for (block, size) in [("512", "4m"), ("4k", "16m"), ("64k", "64m")] {
        steps::fio(&mut guest, "/dev/vda1", block, size)?;
    }
    guest.power_off()?;
    world.finish(vec![disk])
}

fn daemon_killed(world: World) -> Result<()> {
    let mut disk = world.disk("a")?;
    let mut guest = world.boot(&[&disk], 2)?;
    let (kind, partition, dir) = (FileSystem::Ext4, "/dev/vda1", "/mnt/work");
    steps::partition(&mut guest, "/dev/vda", 63, PARTITION_SECTORS)?;
    kind.make(&mut guest, partition)?;
    let mut durable = 0;
    for count in [23, 41] {
        kind.mount(&mut guest, partition, dir)?;
        durable = steps::write_files_until(&mut guest, dir, durable, count, |_| {})?;
        guest = die_and_return(&world, &mut disk, guest)?;
        kind.mount(&mut guest, partition, dir)?;
        steps::verify_files(&mut guest, dir, durable)?;
        steps::unmount(&mut guest, dir)?;
        kind.check(&mut guest, partition)?;
    }
    // On the raw disk, without any flush: what was completed is there (P2).
    let (start, length) = (512 * MIB, 64 * MIB);
    for (seed, writes) in [(1, 700), (2, 2500)] {
        let mut known = Acknowledged::default();
        let start = start + seed * length;
        let request = json!({ "op": "acked", "path": "/dev/vda", "start": start, "length": length,
                              "writes": 1_000_000, "depth": 16, "max_sectors": 40, "seed": seed });
        guest.call_with_events(request, |event| {
            known.record(event);
            known.writes < writes
        })?;
        guest = die_and_return(&world, &mut disk, guest)?;
        known.verify(&mut guest, "/dev/vda", start, length)?;
    }
    guest.power_off()?;
    world.finish(vec![disk])
}

/// SIGKILL of the daemon, then of the machine; the image as it was left is without fault (P4); a new daemon
/// opens it, a new machine uses it.
fn die_and_return(world: &World, disk: &mut Disk, guest: Guest) -> Result<Guest> {
    disk.kill();
    disk.check_after_death()?;
    drop(guest);
    disk.serve()?;
    world.boot(&[disk], 2)
}

fn daemon_restarted(world: World) -> Result<()> {
    let mut disk = world.disk("a")?;
    let mut guest = world.boot(&[&disk], 2)?;
    let (kind, partition, dir) = (FileSystem::Xfs, "/dev/vda1", "/mnt/work");
    steps::partition(&mut guest, "/dev/vda", 63, PARTITION_SECTORS)?;
    kind.make(&mut guest, partition)?;
    kind.mount(&mut guest, partition, dir)?;
    for turn in 0..3 {
        steps::write_files(&mut guest, dir, turn * FILES, FILES)?;
        disk.stop()?;
        disk.check()?;
        disk.serve()?;
    }
    steps::verify_files(&mut guest, dir, 3 * FILES)?;
    steps::unmount(&mut guest, dir)?;
    kind.check(&mut guest, partition)?;
    guest.power_off()?;
    world.finish(vec![disk])
}

/// The disk is what the guest should see: 512-byte sectors, a volatile cache, discard, its queues.
fn see_disk(guest: &mut Guest, format: Format, queues: u32) -> Result<()> {
    let queue = "/sys/block/vda/queue";
    assert_eq!(read_number(guest, &format!("{queue}/logical_block_size"))?, 512);
    assert_eq!(read_number(guest, "/sys/block/vda/size")?, DISK_BYTES / 512);
    assert_ne!(read_number(guest, &format!("{queue}/discard_max_bytes"))?, 0);
    let contexts = guest.call(json!({ "op": "list", "path": "/sys/block/vda/mq" }))?;
    assert_eq!(contexts.as_array().map_or(0, Vec::len), queues as usize, "{contexts}");
    if format != Format::Reference {
        let cache = guest.call(json!({ "op": "read", "path": format!("{queue}/write_cache") }))?;
        assert_eq!(cache, "write back", "without this the guest never sends a flush");
    }
    Ok(())
}

fn read_number(guest: &mut Guest, path: &str) -> Result<u64> {
    let text = guest.call(json!({ "op": "read", "path": path }))?;
    Ok(text.as_str().unwrap_or_default().parse()?)
}

/// Trims the mounted file system until the image takes at most `bytes` of host space. XFS frees a removed
/// file's blocks in the background, and a trim passes over what is not free yet.
fn trim(guest: &mut Guest, disk: &Disk, dir: &str, bytes: u64) -> Result<()> {
    let mut left = TRIMS_MAX;
    loop {
        guest.run(&["fstrim", dir])?;
        left -= 1;
        match wait_for_space_within(disk, bytes, "fstrim", RECLAIM_LIMIT / TRIMS_MAX) {
            Err(_) if left > 0 => {}
            ended => return ended,
        }
    }
}

/// How often a file system is trimmed before the space counts as lost.
const TRIMS_MAX: u32 = 10;

/// Waits until the image takes at most `bytes` of host space.
fn wait_for_space(disk: &Disk, bytes: u64, what: &str) -> Result<()> {
    wait_for_space_within(disk, bytes, what, RECLAIM_LIMIT)
}

fn wait_for_space_within(disk: &Disk, bytes: u64, what: &str, limit: Duration) -> Result<()> {
    let name = disk.image().display();
    process::wait_until(&format!("{what} returns space of {name}"), limit, || {
        Ok(disk.host_bytes()? <= bytes)
    })
    .map_err(|error| {
        let now = disk.host_bytes().unwrap_or_default();
        format!("{error}: {} MiB in use, at most {} expected", now / MIB, bytes / MIB).into()
    })
}
