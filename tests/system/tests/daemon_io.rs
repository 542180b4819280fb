//! The daemon's ways to the host.

#![forbid(unsafe_code)]

use exd_system_tests::client::{Client, Options};
use exd_system_tests::confine::forbid_io_uring;
use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::image;
use exd_system_tests::programs::{program, scratch};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A daemon on the image that may not use io_uring.
fn without_io_uring(dir: &Path, image: &Path, args: &[&str]) -> Daemon {
    let socket = dir.join("s");
    let mut command = Command::new(program("vhost-daemon"));
    command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image).args(args);
    forbid_io_uring(&mut command);
    Daemon::spawn_as_it_is(command, &socket)
}

/// P1 to P3 where io_uring is forbidden: the daemon says so once and does its work.
#[test]
fn a_host_without_io_uring() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    let mut daemon = without_io_uring(dir.path(), &path, &[]);
    daemon.wait_for("io_uring cannot be used here");
    daemon.wait_for("serving");
    let options = Options { queues: 2, memory: 8 << 20, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), options).expect("connected");
    // Into holes, unaligned, more at once than there are threads.
    let data: Vec<u8> = (0..8192u32).map(|i| (i / 5) as u8).collect();
    client.memory(0, 8192).copy_from_slice(&data);
    for queue in 0..2 {
        for i in 0..40 {
            let offset = (queue as u64 * 40 + i) * 8192 + 512;
            client.start_write(queue, offset, 0, 8192, 0);
        }
        client.start_flush(queue, 0);
    }
    for queue in 0..2 {
        while client.in_flight(queue) > 0 {
            assert!(client.ends(queue, Some(PATIENCE)).iter().all(|(_, ret)| *ret == 0));
        }
    }
    for i in 0..80 {
        assert_eq!(client.read(i * 8192 + 512, 8192).expect("read"), data);
    }
    client.discard(0, MIB).expect("discard");
    client.flush().expect("flush");
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("proc").count();
    assert!(threads < 80, "{threads} threads");
    drop(client);
    daemon.kill();
    image::assert_clean(&path);
}

#[test]
fn io_uring_or_nothing() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    let mut daemon = without_io_uring(dir.path(), &path, &["--io-engine=io-uring"]);
    daemon.wait_for("no io_uring");
    assert!(!daemon.wait().success());
}
