//! The demonstration: a Linux guest on an EXD disk, the daemon killed while the guest writes, nothing lost.
//!
//! `cargo xtask demo` installs what this needs and runs it.

#![forbid(unsafe_code)]

mod screen;

use exd_guest_tests::steps::{self, Acknowledged, FileSystem};
use exd_guest_tests::{Disk, Format, Guest, Kit, Programs, Result, process, programs};
use screen::{Screen, size};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 4096 * MIB;
/// The classic first partition, 512 bytes short of the next 4 KiB boundary.
const PARTITION_START: u64 = 63;
const PARTITION_SECTORS: u64 = 1024 * 2048;
const PARTITION: &str = "/dev/vda1";
const DIR: &str = "/mnt/work";
/// Files that are durable before each death.
const FILES: u64 = 60;
/// Writes without a flush that are acknowledged before each death.
const WRITES: u64 = 3000;
/// Where on the raw disk these writes go, and how far.
const RAW_START: u64 = 2048 * MIB;
const RAW_LENGTH: u64 = 64 * MIB;
const RECLAIM_LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let format = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        // In blocks of 4 KiB, so that unaligned writes share blocks.
        [] | ["--format=exd"] => Format::ExdBlocks,
        ["--format=raw"] => Format::Raw,
        ["--format=reference"] => Format::Reference,
        _ => {
            eprintln!("usage: exd-demo [--format=exd|raw|reference]");
            return ExitCode::from(2);
        }
    };
    match Demo::new(format).and_then(Demo::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nexd-demo: {error}");
            eprintln!("The image and the logs are in {}", dir().display());
            ExitCode::FAILURE
        }
    }
}

fn dir() -> PathBuf {
    programs::guest_dir().join("demo")
}

/// What the summary reports.
#[derive(Default)]
struct Record {
    requests: u64,
    bytes: u64,
    pairs: u64,
    fio_kib: u64,
    files: u64,
    file_bytes: u64,
    acknowledged: u64,
    sectors: u64,
    deaths: u64,
    reopened: Vec<Duration>,
}

struct Demo {
    programs: Programs,
    kit: Kit,
    disk: Disk,
    screen: Screen,
    record: Record,
}

impl Demo {
    fn new(format: Format) -> Result<Demo> {
        let mut screen = Screen::new();
        screen.title("EXD: a Linux guest on an EXD disk, and the daemon killed while it writes");
        screen.step("Prepare");
        let dir = dir();
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let programs = Programs::build()?;
        let kit = Kit::prepare(&programs)?;
        let qemu = Command::new(programs::find("qemu-system-x86_64")?).arg("--version").output()?;
        let qemu = String::from_utf8_lossy(&qemu.stdout).lines().next().unwrap_or("").to_owned();
        screen.done(&format!("{qemu}, processors emulated; programs built in release mode"));
        screen.step("Create a disk image");
        screen.command("imgtool create -f exd -o block_size=4096 demo.exd 4G");
        let disk = Disk::create(&programs, &dir, "demo", format, DISK_BYTES)?;
        let (virtual_size, host) = (size(DISK_BYTES), size(disk.host_bytes()?));
        screen.done(&format!("{virtual_size} for the guest, {host} on the host"));
        Ok(Demo { programs, kit, disk, screen, record: Record::default() })
    }

    fn run(mut self) -> Result<()> {
        self.start_daemon()?;
        let mut guest = self.boot()?;
        self.look_at_disk(&mut guest)?;
        self.make_file_system(&mut guest)?;
        self.misaligned_neighbours(&mut guest)?;
        self.random_writes(&mut guest)?;
        self.count_requests(&mut guest)?;
        guest = self.death_with_files(guest)?;
        guest = self.death_without_flush(guest)?;
        self.screen.step("Power the guest off, end the daemon with SIGTERM");
        guest.power_off()?;
        self.disk.stop()?;
        self.screen.done("the daemon closed the image and exited with 0");
        self.show_image()?;
        let used = self.disk.host_bytes()?;
        let left = self.discard_everything()?;
        self.summary(used, left);
        Ok(())
    }

    fn start_daemon(&mut self) -> Result<()> {
        self.screen.step("Start the daemon");
        self.screen.command("vhost-daemon --socket-path=demo.sock --blk-file=demo.exd");
        let start = Instant::now();
        self.disk.serve()?;
        self.screen.done(&format!("listening after {} ms", start.elapsed().as_millis()));
        Ok(())
    }

    fn boot(&mut self) -> Result<Guest> {
        self.screen.step("Boot the guest");
        self.screen.command(
            "qemu-system-x86_64 .. -chardev socket,id=disk0,path=demo.sock,reconnect-ms=200 \
             -device vhost-user-blk-pci,chardev=disk0,num-queues=2",
        );
        let guest = Guest::boot(&self.kit, &dir(), &[&self.disk], 2)?;
        self.screen.done(&format!("Linux {} is up", guest.kernel()));
        Ok(guest)
    }

    fn look_at_disk(&mut self, guest: &mut Guest) -> Result<()> {
        let mut read = |path: &str| -> Result<String> {
            let path = format!("/sys/block/vda/{path}");
            let value = guest.call(json!({ "op": "read", "path": path }))?;
            Ok(value.as_str().unwrap_or_default().to_owned())
        };
        let sectors: u64 = read("size")?.parse()?;
        let sector = read("queue/logical_block_size")?;
        let cache = read("queue/write_cache")?;
        let queues = guest.call(json!({ "op": "list", "path": "/sys/block/vda/mq" }))?;
        let queues = queues.as_array().map_or(0, Vec::len);
        let bytes = size(sectors * 512);
        self.screen.done(&format!(
            "it sees /dev/vda: {bytes}, {sector}-byte sectors, cache {cache}, {queues} queues"
        ));
        Ok(())
    }

    fn make_file_system(&mut self, guest: &mut Guest) -> Result<()> {
        self.screen.step("A partition at sector 63 and ext4 on it");
        steps::partition(guest, "/dev/vda", PARTITION_START, PARTITION_SECTORS)?;
        FileSystem::Ext4.make(guest, PARTITION)?;
        FileSystem::Ext4.mount(guest, PARTITION, DIR)?;
        self.screen
            .done("mounted; each 4 KiB block of ext4 lies across two 4 KiB blocks of the image");
        Ok(())
    }

    /// The hazard that gave rise to the project: see the pattern in the guest's agent.
    fn misaligned_neighbours(&mut self, guest: &mut Guest) -> Result<()> {
        self.screen.step("Concurrent unaligned writes that share a block (raw disk)");
        let mut start = PARTITION_START * 512 + PARTITION_SECTORS * 512;
        start = start.next_multiple_of(MIB);
        for (what, before) in
            [("holes", Value::Null), ("zeroed", json!("zeroes")), ("discarded", json!("discard"))]
        {
            let request = json!({
                "op": "neighbours", "path": "/dev/vda", "start": start, "length": 32 * MIB,
                "block": 4096, "writers": 8, "before": before
            });
            start += 32 * MIB;
            let answer = guest.call(request)?;
            let number = |key: &str| answer[key].as_u64().unwrap_or_default();
            self.record.pairs += number("writes") - number("rounds");
            self.screen.progress(&format!("{what}: {} writes", number("writes")));
        }
        let pairs = self.record.pairs;
        self.screen.done(&format!(
            "{pairs} pairs of neighbours, each pair in one block, into holes, zeroed and discarded \
             blocks; every sector verified"
        ));
        Ok(())
    }

    fn random_writes(&mut self, guest: &mut Guest) -> Result<()> {
        self.screen.step("fio: libaio, O_DIRECT, random writes at depth 32, crc32c verified");
        for (block, bytes) in [("512", "4m"), ("4k", "32m"), ("64k", "64m")] {
            self.screen.progress(&format!("blocks of {block}"));
            let fio = steps::fio(guest, &format!("{DIR}/fio-{block}"), block, bytes)?;
            self.record.fio_kib += fio.kib;
            self.screen.done(&format!("blocks of {block}: {} KiB written and verified", fio.kib));
        }
        Ok(())
    }

    fn death_with_files(&mut self, mut guest: Guest) -> Result<Guest> {
        self.screen.step("SIGKILL the daemon while the guest writes and fsyncs files");
        let screen = &mut self.screen;
        let durable = steps::write_files_until(&mut guest, DIR, 0, FILES, |files| {
            screen.progress(&format!("{files} files fsynced"));
        })?;
        let mut guest =
            self.die(guest, &format!("{durable} files fsynced, the next half written"))?;
        self.screen.step("Look for the files");
        FileSystem::Ext4.mount(&mut guest, PARTITION, DIR)?;
        self.record.file_bytes = steps::verify_files(&mut guest, DIR, durable)?;
        self.record.files = durable;
        self.record.bytes += self.record.file_bytes;
        self.screen.done(&format!("all {durable} fsynced files are there, every byte compared"));
        steps::unmount(&mut guest, DIR)?;
        FileSystem::Ext4.check(&mut guest, PARTITION)?;
        self.screen.done("e2fsck -fn in the guest: clean");
        Ok(guest)
    }

    fn death_without_flush(&mut self, mut guest: Guest) -> Result<Guest> {
        self.screen.step("SIGKILL the daemon while 16 unaligned writes are in flight, no flush");
        let mut known = Acknowledged::default();
        let request = json!({
            "op": "acked", "path": "/dev/vda", "start": RAW_START, "length": RAW_LENGTH,
            "writes": 1_000_000, "depth": 16, "max_sectors": 64, "seed": 1
        });
        guest.call_with_events(request, |event| {
            known.record(event);
            self.screen.progress(&format!("{} writes acknowledged", known.writes));
            known.writes < WRITES
        })?;
        let writes = known.writes;
        let mut guest = self.die(guest, &format!("{writes} writes acknowledged, none flushed"))?;
        self.screen.step("Look for the acknowledged writes");
        let sectors = known.verify(&mut guest, "/dev/vda", RAW_START, RAW_LENGTH)?;
        self.record.acknowledged = writes;
        self.record.requests += writes;
        self.record.bytes += known.bytes;
        self.record.sectors = sectors;
        self.screen.done(&format!("all {writes} are there: {sectors} sectors, none older or torn"));
        Ok(guest)
    }

    /// SIGKILL of the daemon and of the machine; a check; a new daemon and a new machine.
    fn die(&mut self, guest: Guest, state: &str) -> Result<Guest> {
        self.disk.kill();
        drop(guest);
        self.record.deaths += 1;
        self.screen.done(&format!("killed: {state}"));
        self.screen.step("Check the image as it was left, and open it without any repair");
        self.screen.command("imgtool check demo.exd");
        let report = self.disk.check_after_death()?;
        self.screen.text(&report, 1);
        let start = Instant::now();
        self.disk.serve()?;
        let time = start.elapsed();
        self.record.reopened.push(time);
        self.screen.done(&format!("a new daemon listens after {} ms", time.as_millis()));
        let guest = Guest::boot(&self.kit, &dir(), &[&self.disk], 2)?;
        self.screen.done("a new machine has booted on it");
        Ok(guest)
    }

    fn count_requests(&mut self, guest: &mut Guest) -> Result<()> {
        let request = json!({ "op": "read", "path": "/sys/block/vda/stat" });
        let stat = guest.call(request)?;
        let fields: Vec<u64> = stat
            .as_str()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        // Documentation/block/stat.rst: writes completed are field 4, sectors written field 6.
        self.record.requests += fields.get(4).copied().unwrap_or_default();
        self.record.bytes += fields.get(6).copied().unwrap_or_default() * 512;
        Ok(())
    }

    fn show_image(&mut self) -> Result<()> {
        self.screen.step("Look at the image");
        for (arguments, lines) in [("check", 5), ("info", 20), ("map", 10)] {
            self.screen.command(&format!("imgtool {arguments} demo.exd"));
            let mut command = Command::new(&self.programs.imgtool);
            let output = process::output(command.arg(arguments).arg(self.disk.image()))?;
            self.screen.text(&output, lines);
        }
        Ok(())
    }

    fn discard_everything(&mut self) -> Result<u64> {
        self.screen.step("Discard everything in a guest: the host gets its space back");
        self.disk.serve()?;
        let mut guest = Guest::boot(&self.kit, &dir(), &[&self.disk], 2)?;
        guest.run(&["blkdiscard", "/dev/vda"])?;
        guest.power_off()?;
        self.disk.stop()?;
        let left = || self.disk.host_bytes();
        process::wait_until("the space returns", RECLAIM_LIMIT, || Ok(left()? < 32 * MIB))?;
        self.disk.check()?;
        let left = left()?;
        self.screen.done(&format!("{} left on the host, check is clean", size(left)));
        Ok(left)
    }

    fn summary(mut self, used: u64, left: u64) {
        let record = &self.record;
        let slowest = record.reopened.iter().max().copied().unwrap_or_default();
        let lines = [
            (
                "written",
                format!(
                    "{} in {} requests, most of them off the image's 4 KiB grid",
                    size(record.bytes),
                    record.requests
                ),
            ),
            (
                "verified",
                format!(
                    "{} pairs of writes sharing a never written block; {} MiB by fio's checksums",
                    record.pairs,
                    record.fio_kib / 1024
                ),
            ),
            (
                "killed",
                format!(
                    "SIGKILL {} times while writing; reopened in {} ms at most, no repair step",
                    record.deaths,
                    slowest.as_millis()
                ),
            ),
            (
                "lost",
                format!(
                    "0 of {} fsynced files ({}), 0 of {} acknowledged unflushed writes ({})",
                    record.files,
                    size(record.file_bytes),
                    record.acknowledged,
                    size(record.sectors * 512)
                ),
            ),
            ("checked", "e2fsck in the guest and imgtool on the host: clean".to_owned()),
            (
                "host space",
                format!(
                    "{} for a {} disk, {} after a discard of everything",
                    size(used),
                    size(DISK_BYTES),
                    size(left)
                ),
            ),
        ];
        self.screen.summary(&lines);
        println!("The image, the guest's console and the daemon's log: {}", dir().display());
    }
}
