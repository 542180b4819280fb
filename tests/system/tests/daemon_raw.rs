//! The daemon on raw images, by a client without a virtual machine.

#![forbid(unsafe_code)]

use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::programs::{program, scratch};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

fn raw_image(dir: &Path, len: u64) -> PathBuf {
    let path = dir.join("disk.raw");
    File::create(&path).and_then(|file| file.set_len(len)).expect("create");
    path
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.u8(..)).collect()
}

#[test]
fn every_request_in_every_cache_mode() {
    for cache in ["none", "writeback", "writethrough", "directsync"] {
        let dir = scratch();
        let image = raw_image(dir.path(), 16 * MIB);
        let args = ["--format=raw".to_owned(), format!("--cache={cache}")];
        let daemon = Daemon::start(&dir.path().join("s"), &image, args);
        let mut client = Client::new(daemon.socket());
        assert_eq!(client.number("capacity"), 16 * MIB);
        let data = pattern(1 << 20, 1);
        client.write(4096, &data).expect("write");
        client.write(512, &data[..512]).expect("write");
        client.flush().expect("flush");
        assert_eq!(client.read(4096, 1 << 20).expect("read"), data);
        let file = fs::read(&image).expect("read");
        assert!(file[4096..][..1 << 20] == data && file[512..1024] == data[..512]);
        client.discard(8192, 65536).expect("discard");
        client.write_zeroes(512, 512, false).expect("zeroes");
        client.write_zeroes(MIB / 2, 4096, true).expect("zeroes");
        let back = client.read(0, 1 << 20).expect("read");
        assert!(back[8192..][..65536].iter().all(|byte| *byte == 0));
        assert!(back[..4096].iter().all(|byte| *byte == 0));
        assert!(back[(MIB / 2) as usize..][..4096].iter().all(|byte| *byte == 0));
        assert_eq!(back[4096..8192], data[..4096]);
        // Past the end.
        assert!(client.read(16 * MIB, 512).is_err());
        assert!(client.write(16 * MIB - 512, &[0; 1024]).is_err());
        assert!(client.discard(16 * MIB, 512).is_err());
        client.write(16 * MIB - 512, &data[..512]).expect("the last sector");
        drop(client);
        daemon.terminate();
    }
}

#[test]
fn unaligned_memory_and_many_in_flight_on_several_queues() {
    let dir = scratch();
    let image = raw_image(dir.path(), 64 * MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &image, ["--format=raw"]);
    let options = Options { queues: 4, memory: 16 << 20, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), options).expect("connected");
    const LEN: usize = 4096;
    let data = pattern(LEN, 2);
    for queue in 0..4 {
        for i in 0..32 {
            // Every other buffer is unaligned in memory.
            let at = (queue * 32 + i) * 2 * LEN + i % 2 * 3;
            client.memory(at, LEN).copy_from_slice(&data);
            let offset = ((queue * 32 + i) * LEN * 3 + 512) as u64;
            client.start_write(queue, offset, at, LEN, i);
        }
    }
    for queue in 0..4 {
        while client.in_flight(queue) > 0 {
            for (_, ret) in client.ends(queue, Some(exd_system_tests::daemon::PATIENCE)) {
                assert_eq!(ret, 0);
            }
        }
    }
    for i in 0..128 {
        assert_eq!(client.read((i * LEN * 3 + 512) as u64, LEN).expect("read"), data);
    }
    drop(client);
    daemon.terminate();
}

#[test]
fn front_ends_come_and_go_without_a_restart() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &image, ["--format=raw", "--num-queues=2"]);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("proc").count();
    let mut before = 0;
    for round in 0u8..20 {
        // Somebody who says nothing.
        drop(UnixStream::connect(daemon.socket()).expect("connect"));
        let mut client = Client::new(daemon.socket());
        assert_eq!(client.read(0, 512).expect("read")[0], round);
        client.write(0, &[round + 1; 512]).expect("write");
        match round {
            // The first rounds may open what stays.
            5 => before = descriptors(),
            19 => assert!(descriptors() <= before, "descriptors leak"),
            _ => {}
        }
        // Leaves with requests in flight.
        for i in 0..20 {
            client.start_write(0, 4096 * (1 + i), 0, 4096, 0);
        }
        client.ends(0, None);
    }
    daemon.terminate();
}

#[test]
fn sigterm_ends_a_connection_under_load() {
    let dir = scratch();
    let image = raw_image(dir.path(), 16 * MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &image, ["--format=raw"]);
    let mut client = Client::new(daemon.socket());
    for i in 0..32 {
        client.start_write(0, i * 65536, 0, 65536, 0);
    }
    client.ends(0, None);
    daemon.terminate();
    drop(client);
}

#[test]
fn a_killed_daemon_leaves_a_socket_that_the_next_one_replaces() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let socket = dir.path().join("s");
    for round in 0u8..3 {
        let daemon = Daemon::start(&socket, &image, ["--format=raw"]);
        let mut client = Client::new(&socket);
        assert_eq!(client.read(0, 512).expect("read")[0], round);
        client.write(0, &[round + 1; 512]).expect("write");
        daemon.kill();
        assert!(socket.exists());
    }
}

#[test]
fn read_only_disks() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let args = ["--format=raw", "--read-only"];
    let daemon = Daemon::start(&dir.path().join("s"), &image, args);
    assert!(Client::connect(daemon.socket(), Options::default()).is_err(), "blkio sees RO");
    let options = Options { read_only: true, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), options).expect("connected");
    client.read(0, 4096).expect("read");
    assert!(client.write(0, &[1; 512]).is_err());
    drop(client);
    daemon.terminate();
}

/// P9: the second writer is refused.
#[test]
fn p9_one_writer_per_image() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let first = Daemon::start(&dir.path().join("a"), &image, ["--format=raw"]);
    let args = ["--format=raw", "--lock-wait=0"];
    let mut second = Daemon::launch(&dir.path().join("b"), &image, args);
    second.wait_for("another process using the image");
    assert!(!second.wait().success());
    first.terminate();
    Daemon::start(&dir.path().join("b"), &image, ["--format=raw"]).terminate();
}

#[test]
fn statistics_on_request_and_at_the_end() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let statistics = dir.path().join("stats");
    let args = ["--format=raw".to_owned(), format!("--stats-file={}", statistics.display())];
    let mut daemon = Daemon::start(
        &dir.path().join("s"),
        &image,
        args.into_iter().chain(["--log-level=debug".to_owned()]),
    );
    let syncs = |path: &Path| -> u64 {
        let text = fs::read_to_string(path).expect("written");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        value["syncs"].as_u64().expect("a number")
    };
    let mut client = Client::new(daemon.socket());
    for _ in 0..5 {
        client.flush().expect("flush");
    }
    daemon.signal(Signal::SIGUSR1);
    daemon.wait_for("statistics:");
    // The file follows the message.
    while !statistics.exists() {
        std::thread::yield_now();
    }
    assert_eq!(syncs(&statistics), 5);
    drop(client);
    daemon.terminate();
    assert_eq!(syncs(&statistics), 6, "one more when it closes");
}

#[test]
fn capabilities_and_refusals() {
    let output = Command::new(program("vhost-daemon"))
        .args(["--print-capabilities", "--whatever"])
        .output()
        .expect("runs");
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["type"], "block");
    let dir = scratch();
    let missing = dir.path().join("missing");
    for args in [
        vec!["--socket-path=/nonexistent/s", "--format=raw"],
        vec!["--fd=1", "--format=raw"],
        vec!["--num-queues=0"],
    ] {
        let status = Command::new(program("vhost-daemon"))
            .args(&args)
            .arg("--blk-file")
            .arg(&missing)
            .status()
            .expect("runs");
        assert!(!status.success(), "{args:?}");
    }
}

/// `--fd`: a listening socket from whoever starts the daemon, who keeps its name.
#[test]
fn an_inherited_socket() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB);
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inheritable");
    let mut command = Command::new(program("vhost-daemon"));
    command.arg(format!("--fd={}", listener.as_raw_fd())).arg("--format=raw");
    command.arg("--blk-file").arg(&image);
    let mut daemon = Daemon::spawn(command, &socket);
    daemon.wait_for("serving");
    drop(listener);
    let mut client = Client::new(&socket);
    client.write(0, &[1; 512]).expect("write");
    drop(client);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(socket.exists(), "it is not the daemon's to remove");
}

#[test]
fn space_comes_back_after_a_discard() {
    let dir = scratch();
    let image = raw_image(dir.path(), 8 * MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &image, ["--format=raw"]);
    let mut client = Client::new(daemon.socket());
    for i in 0..8 {
        client.write(i * MIB, &vec![1; MIB as usize]).expect("write");
    }
    let used = || fs::metadata(&image).expect("metadata").blocks() * 512;
    assert!(used() >= 8 * MIB);
    client.discard(0, 8 * MIB).expect("discard");
    assert!(used() < MIB);
    drop(client);
    daemon.terminate();
}

/// A disk of 4096-byte blocks: the guest is told, what is finer is refused, and a part of a block at the end
/// is not there.
#[test]
fn blocks_of_4096_bytes() {
    let dir = scratch();
    let image = raw_image(dir.path(), MIB + 512);
    let args = ["--format=raw", "--logical-block-size=4096"];
    let daemon = Daemon::start(&dir.path().join("s"), &image, args);
    let mut client = Client::new(daemon.socket());
    assert_eq!(client.number("capacity"), MIB);
    assert_eq!(client.number("request-alignment"), 4096);
    client.write(4096, &[3; 8192]).expect("whole blocks");
    assert_eq!(client.read(8192, 4096).expect("read"), [3; 4096]);
    client.discard(4096, 4096).expect("discard");
    assert!(client.write(512, &[1; 4096]).is_err(), "not aligned");
    assert!(client.read(0, 512).is_err(), "half a block");
    assert!(client.write(MIB, &[1; 4096]).is_err(), "past the last whole block");
    drop(client);
    daemon.terminate();
}

/// P1 to P3 hold on a file system in memory too, with direct I/O or without.
#[test]
fn a_file_system_in_memory() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return println!("not run: no /dev/shm");
    };
    let image = raw_image(dir.path(), MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &image, ["--format=raw"]);
    let mut client = Client::new(daemon.socket());
    client.write(512, &[3; 1024]).expect("write");
    client.flush().expect("flush");
    assert_eq!(client.read(1024, 512).expect("read"), [3; 512]);
    drop(client);
    daemon.terminate();
}
