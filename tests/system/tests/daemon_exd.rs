//! The daemon on EXD images, by a client without a virtual machine.

#![forbid(unsafe_code)]

use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::Daemon;
use exd_system_tests::history::{History, Promise, SECTOR};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use exd_system_tests::workload::{Workload, memory, verify};
use std::fs;
use std::os::unix::fs::MetadataExt;

const MIB: u64 = 1 << 20;

#[test]
fn every_request_in_every_cache_mode() {
    let modes = ["none", "writeback", "writethrough", "directsync"];
    for (cache, block_size) in modes.into_iter().zip(image::BLOCK_SIZES.into_iter().cycle()) {
        let dir = scratch();
        let path = dir.path().join("disk.exd");
        image::create_in_blocks(&path, 16 * MIB, block_size);
        let daemon = Daemon::start(&dir.path().join("s"), &path, [format!("--cache={cache}")]);
        let mut client = Client::new(daemon.socket());
        assert_eq!(client.number("capacity"), 16 * MIB);
        let data: Vec<u8> = (0..MIB).map(|i| (i / 3) as u8 | 1).collect();
        assert!(client.read(0, 1 << 20).expect("read").iter().all(|byte| *byte == 0));
        client.write(4096, &data).expect("write");
        client.write(512, &data[..512]).expect("write");
        client.write(2 * MIB + 3 * 512, &data[..512 * 9]).expect("write");
        client.flush().expect("flush");
        assert!(client.read(4096, 1 << 20).expect("read") == data);
        assert!(client.read(2 * MIB + 3 * 512, 512 * 9).expect("read") == data[..512 * 9]);
        client.discard(8192, 65536).expect("discard");
        client.write_zeroes(512, 512, false).expect("zeroes");
        client.write_zeroes(MIB / 2, 4096, true).expect("zeroes");
        client.write_zeroes(MIB / 2 + 8192 + 512, 4096, false).expect("zeroes");
        let mut expected = vec![0; 4096];
        expected.extend_from_slice(&data[..MIB as usize - 4096]);
        for (at, len) in [(8192, 65536), (MIB / 2, 4096), (MIB / 2 + 8192 + 512, 4096)] {
            expected[at as usize..][..len].fill(0);
        }
        assert!(client.read(0, 1 << 20).expect("read") == expected);
        assert!(client.read(16 * MIB, 512).is_err());
        assert!(client.write(16 * MIB - 512, &[0; 1024]).is_err());
        drop(client);
        daemon.terminate();
        image::assert_clean(&path);
        let report = image::check(&path);
        assert!(!report.unclean && report.records == 0, "closed cleanly: {report:?}");
        let mut image = image::open(&path, true);
        let mut back = vec![0; 1 << 20];
        image.read(0, &mut back).expect("read");
        assert!(back == expected);
    }
}

/// Random requests on several queues; what is read is checked against all that was written.
#[test]
fn random_requests_on_several_queues_and_connections() {
    let blocks = image::BLOCK_SIZES.into_iter().cycle();
    for ((queues, threads), block_size) in [(1, 1), (2, 2), (8, 2), (4, 4)].into_iter().zip(blocks)
    {
        let dir = scratch();
        let path = dir.path().join("disk.exd");
        let size = 16 * MIB;
        image::create_in_blocks(&path, size, block_size);
        let args = [format!("--num-queues={queues}"), format!("--threads={threads}")];
        let mut daemon = Daemon::start(&dir.path().join("s"), &path, args);
        let seed = fastrand::u64(..);
        println!("seed {seed}, blocks of {block_size}");
        let mut history = History::new(size / SECTOR as u64);
        for round in 0..3 {
            let options = Options { queues, memory: memory(queues), ..Options::default() };
            let mut client = Client::connect(daemon.socket(), options).expect("connected");
            verify(&mut client, &mut history, Promise::Completed);
            let mut workload = Workload::new(seed + round, queues, 5000);
            assert!(workload.run(&mut client, &mut history, &mut daemon), "it lives");
        }
        daemon.terminate();
        image::assert_clean(&path);
        let daemon = Daemon::start(&dir.path().join("s"), &path, [""; 0]);
        let options = Options { memory: memory(1), ..Options::default() };
        let mut client = Client::connect(daemon.socket(), options).expect("connected");
        verify(&mut client, &mut history, Promise::Completed);
        drop(client);
        daemon.terminate();
    }
}

#[test]
fn space_comes_back_after_a_discard_of_everything() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create_in_blocks(&path, 64 * MIB, 512);
    let daemon = Daemon::start(&dir.path().join("s"), &path, [""; 0]);
    let mut client = Client::new(daemon.socket());
    for i in 0..64 {
        client.write(i * MIB, &vec![1; MIB as usize]).expect("write");
    }
    let used = || fs::metadata(&path).expect("metadata").blocks() * 512;
    assert!(used() >= 64 * MIB);
    client.discard(0, 64 * MIB).expect("discard");
    client.flush().expect("flush");
    drop(client);
    daemon.terminate();
    assert!(used() < 4 * MIB, "{} bytes stay in use", used());
    image::assert_clean(&path);
}

/// P9: the second writer is refused at once and told who holds the image.
#[test]
fn p9_one_writer_per_image() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let first = Daemon::start(&dir.path().join("a"), &path, [""; 0]);
    let mut second = Daemon::launch(&dir.path().join("b"), &path, ["--lock-wait=1000000"]);
    let line = second.wait_for("It is held by");
    assert!(line.contains(&first.pid().to_string()), "{line}");
    assert!(!second.wait().success());
    first.terminate();
    Daemon::start(&dir.path().join("b"), &path, [""; 0]).terminate();
}

#[test]
fn read_only_opening_writes_nothing() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &path, [""; 0]);
    let mut client = Client::new(daemon.socket());
    client.write(512, &[7; 8192]).expect("write");
    daemon.kill();
    drop(client);
    let before = fs::read(&path).expect("read");
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--read-only"]);
    let options = Options { read_only: true, ..Options::default() };
    let mut client = Client::connect(daemon.socket(), options).expect("connected");
    let back = client.read(0, 16384).expect("read");
    assert!(back[..512].iter().all(|byte| *byte == 0));
    assert!(back[512..512 + 8192].iter().all(|byte| *byte == 7));
    assert!(client.write(0, &[1; 512]).is_err());
    drop(client);
    daemon.terminate();
    assert!(fs::read(&path).expect("read") == before);
}
