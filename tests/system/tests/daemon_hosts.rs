//! Images on file systems with ways of their own: btrfs, whose direct I/O takes whole blocks only and puts
//! anything else through the page cache without a word, and one that has neither direct I/O nor holes. Needs
//! root; where that is missing the tests say so and do without.

#![forbid(unsafe_code)]

use exd_file::{HostFile, OpenMode};
use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::history::{History, Promise, SECTOR};
use exd_system_tests::image;
use exd_system_tests::private_disk::PrivateDisk;
use exd_system_tests::programs::{program, scratch};
use exd_system_tests::workload::{Workload, memory, verify};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;
const COPIES: &str = "btrfs copies each block";

/// A btrfs with a directory whose files are not copied when they are overwritten.
fn btrfs() -> Option<(PrivateDisk, PathBuf)> {
    let disk = match PrivateDisk::with_btrfs(512 * MIB) {
        Ok(disk) => disk,
        Err(text) => {
            println!("not run, needs root and btrfs: {text}");
            return None;
        }
    };
    let in_place = disk.path().join("nocow");
    fs::create_dir(&in_place).expect("create");
    let status = Command::new("chattr").arg("+C").arg(&in_place).status().expect("chattr runs");
    assert!(status.success());
    Some((disk, in_place))
}

/// P2, P4: requests of any alignment on several queues, then a kill.
#[test]
fn p2_requests_of_any_alignment() {
    let Some((disk, in_place)) = btrfs() else { return };
    for dir in [disk.path(), &in_place] {
        let path = dir.join("disk.exd");
        image::create(&path, DISK);
        let mode = OpenMode { write: false, direct: true };
        let file = HostFile::open(&path, mode).expect("open");
        assert!(file.geometry().alignment >= 4096, "half a block would go through the page cache");
        let mut daemon = Daemon::start(&dir.join("s"), &path, ["--num-queues=2"]);
        assert_eq!(daemon.has_said(COPIES), dir == disk.path(), "{}", dir.display());
        let options = Options { queues: 2, memory: memory(2), ..Options::default() };
        let mut client = Client::connect(daemon.socket(), options).expect("connected");
        let mut history = History::through_page_cache(DISK / SECTOR as u64);
        verify(&mut client, &mut history, Promise::Completed);
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        assert!(Workload::new(seed, 2, 3000).run(&mut client, &mut history, &mut daemon));
        daemon.kill();
        drop(client);
        image::assert_clean(&path);
        let daemon = Daemon::start(&dir.join("s"), &path, [""; 0]);
        let options = Options { memory: memory(1), ..Options::default() };
        let mut client = Client::connect(daemon.socket(), options).expect("connected");
        verify(&mut client, &mut history, Promise::Completed);
        drop(client);
        daemon.terminate();
    }
}

/// An image in sectors cannot be written by btrfs's direct I/O: it is served through the page cache, and the
/// log says what to do. imgtool makes images that can.
#[test]
fn images_in_sectors_are_served_through_the_page_cache() {
    let Some((_disk, in_place)) = btrfs() else { return };
    let path = in_place.join("disk.exd");
    for block_size in image::BLOCK_SIZES {
        image::create_in_blocks(&path, DISK, block_size);
        let cached = block_size == 512;
        let mut daemon = Daemon::start(&in_place.join("s"), &path, [""; 0]);
        assert_eq!(daemon.has_said("-o block_size=4096"), cached, "{block_size}");
        assert_eq!(is_direct(&daemon, &path), !cached, "{block_size}");
        let mut client = Client::new(daemon.socket());
        client.write(63 * 512, &[7; 4096]).expect("write");
        client.flush().expect("flush");
        assert_eq!(client.read(63 * 512, 4096).expect("read"), [7; 4096]);
        drop(client);
        daemon.terminate();
        image::assert_clean(&path);
        fs::remove_file(&path).expect("removed");
    }
    let mut create = Command::new(program("imgtool"));
    let output = create.arg("create").arg(&path).arg("16M").output().expect("imgtool runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success() && text.contains("block_size=4096"), "{text}");
    let mut daemon = Daemon::start(&in_place.join("s"), &path, [""; 0]);
    assert!(is_direct(&daemon, &path));
    assert!(!daemon.has_said("page cache"));
    daemon.terminate();
}

/// A guest that was installed on sectors of 512 bytes keeps them; direct I/O is for those who know larger ones.
#[test]
fn raw_images_keep_their_sectors() {
    let Some((_disk, in_place)) = btrfs() else { return };
    let path = in_place.join("disk.raw");
    File::create_new(&path).and_then(|file| file.set_len(DISK)).expect("create");
    for (args, block, cached) in [
        (vec!["--format=raw"], 512, true),
        (vec!["--format=raw", "--logical-block-size=4096"], 4096, false),
    ] {
        let mut daemon = Daemon::start(&in_place.join("s"), &path, args);
        assert_eq!(daemon.has_said("no direct I/O in sectors"), cached, "{block}");
        let mut client = Client::new(daemon.socket());
        assert_eq!(client.number("request-alignment"), block);
        client.write(block, &vec![7; block as usize]).expect("write");
        client.flush().expect("flush");
        assert_eq!(client.read(block, block as usize).expect("read"), vec![7; block as usize]);
        assert_eq!(is_direct(&daemon, &path), !cached);
        drop(client);
        daemon.terminate();
    }
}

/// Neither direct I/O nor holes: the log says the one, and the guest does not notice the other.
#[test]
fn p2_neither_direct_io_nor_holes() {
    let Some(disk) = RamDisk::new() else { return };
    for format in ["exd", "raw"] {
        let path = disk.dir.path().join("disk");
        if format == "exd" {
            image::create(&path, DISK);
        } else {
            File::create(&path).and_then(|file| file.set_len(DISK)).expect("create");
        }
        let args = [format!("--format={format}")];
        let mut daemon = Daemon::start(&disk.dir.path().join("s"), &path, &args);
        assert!(daemon.has_said("the file system has no direct I/O"));
        let mut client = Client::new(daemon.socket());
        client.write(0, &vec![7; MIB as usize]).expect("write");
        client.discard(65536, 65536).expect("discard");
        client.write_zeroes(2 * 65536, 65536, true).expect("write of zeroes");
        client.write_zeroes(3 * 65536, 512, false).expect("write of zeroes");
        client.flush().expect("flush");
        daemon.kill();
        drop(client);
        let daemon = Daemon::start(&disk.dir.path().join("s"), &path, &args);
        let mut client = Client::new(daemon.socket());
        let back = client.read(0, MIB as usize).expect("read");
        assert!(back[..65536].iter().all(|byte| *byte == 7));
        assert!(back[2 * 65536..][..65536 + 512].iter().all(|byte| *byte == 0));
        assert!(back[3 * 65536 + 512..].iter().all(|byte| *byte == 7));
        drop(client);
        daemon.terminate();
        if format == "exd" {
            // What was freed cannot be given back.
            let report = image::check(&path);
            assert!(report.corruptions.is_empty(), "{report:?}");
        }
    }
}

/// A ramfs, unmounted when dropped.
struct RamDisk {
    dir: tempfile::TempDir,
}

impl RamDisk {
    fn new() -> Option<RamDisk> {
        let dir = scratch();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "ramfs", "ramfs"]).arg(dir.path()).status();
        if !mount.is_ok_and(|status| status.success()) {
            println!("not run, needs root");
            return None;
        }
        Some(RamDisk { dir })
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.dir.path()).status();
    }
}

/// The daemon has the file open with O_DIRECT (octal, in its fdinfo).
fn is_direct(daemon: &Daemon, path: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let fds = fs::read_dir(process.join("fd")).expect("ours to see").flatten();
    let fd = fds
        .map(|entry| entry.path())
        .find(|fd| fs::read_link(fd).is_ok_and(|target| target == path))
        .expect("open");
    let info = process.join("fdinfo").join(fd.file_name().expect("a number"));
    let info = fs::read_to_string(info).expect("readable");
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("told");
    u32::from_str_radix(flags.trim(), 8).expect("octal") & 0o40000 != 0
}
