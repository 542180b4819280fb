//! What an operator asks for beyond the disk: a full host, discards, zeroes, limits.

#![forbid(unsafe_code)]

use exd_system_tests::client::Client;
use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::image;
use exd_system_tests::private_disk::PrivateDisk;
use exd_system_tests::programs::scratch;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const MIB: u64 = 1 << 20;
const PIECE: usize = 256 << 10;

fn space(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("metadata").blocks() * 512
}

/// The answer of the control socket to a command, which succeeds.
fn ask(control: &Path, command: &str) -> Value {
    let mut stream = UnixStream::connect(control).expect("connected");
    writeln!(stream, "{}", json!({ "command": command })).expect("sent");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("an answer");
    let answer: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(answer["ok"], true, "{line}");
    answer
}

/// Writes into holes until one of the writes is held; its number.
fn fill(client: &mut Client, daemon: &mut Daemon) -> u64 {
    for i in 0..2000 {
        client.memory(0, PIECE).fill(i as u8 | 1);
        client.start_write(0, i * PIECE as u64, 0, PIECE, 1);
        loop {
            match client.ends(0, Some(std::time::Duration::from_millis(200))).as_slice() {
                [(1, 0)] => break,
                [] if daemon.has_said("no space") => return i,
                [] => {}
                other => panic!("{other:?}"),
            }
        }
    }
    panic!("the host has more space than it should");
}

/// A full host with --on-enospc=stop: the request that has no space waits, others go on, and once there is
/// space it is done as if nothing had happened (P3).
#[test]
fn p3_requests_wait_for_space() {
    for format in ["exd", "raw"] {
        let disk = match PrivateDisk::new(96 * MIB) {
            Ok(disk) => disk,
            Err(text) => return println!("not run, needs root: {text}"),
        };
        let path = disk.path().join("disk");
        match format {
            "exd" => image::create(&path, 512 * MIB),
            _ => fs::File::create(&path).and_then(|file| file.set_len(512 * MIB)).expect("made"),
        }
        let ballast = disk.path().join("ballast");
        fs::write(&ballast, vec![1; 16 << 20]).expect("space so far");
        let control = disk.path().join("control");
        let args = [
            "--on-enospc=stop".to_owned(),
            format!("--format={format}"),
            format!("--control-path={}", control.display()),
        ];
        let mut daemon = Daemon::start(&disk.path().join("s"), &path, args);
        let mut client = Client::new(daemon.socket());
        let held = fill(&mut client, &mut daemon);
        assert!(held > 10);
        // Others go on: overwrites and reads, while the first is still in flight.
        client.memory(PIECE, 4096).fill(0xaa);
        client.start_write(0, 4096, PIECE, 4096, 2);
        assert_eq!(client.ends(0, Some(PATIENCE)), [(2, 0)]);
        client.start_read(0, 4096, 2 * PIECE, 4096, 3);
        assert_eq!(client.ends(0, Some(PATIENCE)), [(3, 0)]);
        assert_eq!(client.memory(2 * PIECE, 4096)[17], 0xaa);
        assert_eq!(client.in_flight(0), 1);
        // As long as there is no space, no attempt helps.
        ask(&control, "retry");
        assert_eq!(ask(&control, "status")["disks"][0]["held_for_space"], 1);
        fs::remove_file(&ballast).expect("removed");
        ask(&control, "retry");
        assert_eq!(client.ends(0, Some(PATIENCE)), [(1, 0)]);
        daemon.wait_for("no request is held");
        client.flush().expect("flush");
        let back = client.read(held * PIECE as u64, PIECE).expect("read");
        assert!(back.iter().all(|byte| *byte == held as u8 | 1));
        drop(client);
        daemon.terminate();
        if format == "exd" {
            image::assert_clean(&path);
        }
    }
}

/// What is held does not hold up the end of the daemon.
#[test]
fn a_daemon_ends_although_the_host_is_full() {
    let disk = match PrivateDisk::new(96 * MIB) {
        Ok(disk) => disk,
        Err(text) => return println!("not run, needs root: {text}"),
    };
    let path = disk.path().join("disk.exd");
    image::create(&path, 512 * MIB);
    let ballast = disk.path().join("ballast");
    fs::write(&ballast, vec![1; 48 << 20]).expect("space so far");
    let mut daemon = Daemon::start(&disk.path().join("s"), &path, ["--on-enospc=stop"]);
    let mut client = Client::new(daemon.socket());
    fill(&mut client, &mut daemon);
    daemon.signal(Signal::SIGTERM);
    let ends = client.ends(0, Some(PATIENCE));
    assert!(matches!(ends.as_slice(), [(1, ret)] if *ret < 0), "{ends:?}");
    drop(client);
    // Closing an image on a full host may fail, but it ends.
    daemon.wait();
}

#[test]
fn discards_that_are_ignored_and_zeroes_that_are_found() {
    let dir = scratch();
    let raw = dir.path().join("raw");
    fs::write(&raw, vec![1; 8 << 20]).expect("written");
    let args = ["--format=raw", "--discard=ignore", "--detect-zeroes=on"];
    let daemon = Daemon::start(&dir.path().join("s"), &raw, args);
    let mut client = Client::new(daemon.socket());
    let before = space(&raw);
    client.discard(0, 4 * MIB).expect("discard");
    assert_eq!(client.read(0, 512).expect("read"), [1; 512], "not even forgotten");
    client.write_zeroes(0, MIB, true).expect("write zeroes");
    client.write(MIB, &vec![0; 1 << 20]).expect("write");
    assert!(client.read(0, 2 << 20).expect("read").iter().all(|byte| *byte == 0));
    assert!(space(&raw) >= before - 65536, "the space is kept");
    drop(client);
    daemon.terminate();
    let daemon =
        Daemon::start(&dir.path().join("s"), &raw, ["--format=raw", "--detect-zeroes=unmap"]);
    let mut client = Client::new(daemon.socket());
    for i in 0..8 {
        client.write(i * MIB, &vec![0; 1 << 20]).expect("write");
    }
    assert!(space(&raw) <= before - 7 * MIB, "the space is given back");
    drop(client);
    daemon.terminate();
}

/// A limit delays what is over it, lets flushes pass and does not delay the daemon's end.
#[test]
fn limits_delay_and_a_drain_does_not_wait() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    let args = ["--throttling=bps-write=1,iops-read=1000000"];
    let daemon = Daemon::start(&dir.path().join("s"), &path, args);
    let mut client = Client::new(daemon.socket());
    client.write(0, &[1; 4096]).expect("the first one passes");
    // The next one may start in more than an hour.
    client.memory(0, 4096).fill(2);
    client.start_write(0, 4096, 0, 4096, 1);
    client.start_flush(0, 2);
    client.start_read(0, 0, 8192, 4096, 3);
    let mut tags = Vec::new();
    while tags.len() < 2 {
        let ends = client.ends(0, Some(PATIENCE));
        assert!(!ends.is_empty(), "only {tags:?} have ended");
        tags.extend(ends);
    }
    tags.sort_unstable();
    assert_eq!(tags, [(2, 0), (3, 0)]);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.ends(0, Some(PATIENCE)), [(1, 0)]);
    drop(client);
    daemon.terminate();
    let daemon = Daemon::start(&dir.path().join("s"), &path, [""; 0]);
    let mut client = Client::new(daemon.socket());
    assert_eq!(client.read(4096, 4096).expect("read"), [2; 4096]);
    drop(client);
    daemon.terminate();
}
