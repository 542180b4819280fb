//! `imgtool defrag` and the idle daemon: scattered data comes together, nothing is lost, the space is
//! given back.

mod imgtool_common;

use exd_system_tests::client::Client;
use exd_system_tests::daemon::Daemon;
use exd_system_tests::image;
use imgtool_common::{disk_usage, imgtool, scratch};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::Path;

const BLOCK: u64 = 4096;

/// An image with `blocks` blocks that lie in the file in random order.
fn scattered(path: &Path, blocks: u64) {
    image::create(path, 2 * blocks * BLOCK);
    let mut image = image::open(path, false);
    let mut order: Vec<u64> = (0..blocks).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut order);
    for block in order {
        image.write(block * BLOCK, &block.to_le_bytes().repeat(512)).expect("write");
    }
    image.close().expect("close");
}

fn assert_content(path: &Path, blocks: u64) {
    let mut image = image::open(path, true);
    for block in 0..blocks {
        let mut data = [0; BLOCK as usize];
        image.read(block * BLOCK, &mut data).expect("read");
        assert!(data == block.to_le_bytes().repeat(512)[..], "block {block}");
    }
}

#[test]
fn scattered_data_comes_together() {
    let dir = scratch();
    let path = dir.path().join("a.exd");
    let blocks = 8192;
    scattered(&path, blocks);
    let before = disk_usage(&path);
    let done = imgtool(dir.path(), "defrag --output=json a.exd").json();
    assert!(done["extents-before"].as_u64() > Some(blocks / 2), "{done}");
    assert!(done["extents-after"].as_u64() < Some(blocks / 128), "{done}");
    assert!(done["moved-bytes"].as_u64() >= Some(blocks * BLOCK / 2), "{done}");
    image::assert_clean(&path);
    assert_content(&path, blocks);
    let after = disk_usage(&path);
    assert!(after < before + before / 20 + (1 << 20), "{before} bytes before, {after} now");
    let again = imgtool(dir.path(), "defrag --output=json a.exd").json();
    assert_eq!(again["moved-bytes"], Value::from(0), "{again}");
    let text = imgtool(dir.path(), "defrag a.exd").ok();
    assert!(text.ends_with("now; 0 B moved\n"), "{text}");
}

#[test]
fn only_exd_images_are_defragmented() {
    let dir = scratch();
    std::fs::write(dir.path().join("a.raw"), vec![1; 1 << 20]).expect("written");
    imgtool(dir.path(), "defrag -f raw a.raw").fails(1, "only exd images");
}

/// Bytes that the daemon has moved so far.
fn moved(daemon: &Daemon, statistics: &Path) -> u64 {
    // Written anew on the signal, by renaming: gone first, it is complete when it is there again.
    std::fs::remove_file(statistics).ok();
    daemon.signal(Signal::SIGUSR1);
    while !statistics.exists() {
        std::thread::yield_now();
    }
    let text = std::fs::read_to_string(statistics).expect("statistics");
    let value: Value = serde_json::from_str(&text).expect("JSON");
    value["moved_bytes"].as_u64().expect("a number")
}

#[test]
fn an_idle_daemon_does_it_too() {
    let dir = scratch();
    let path = dir.path().join("a.exd");
    let blocks = 2048;
    scattered(&path, blocks);
    let statistics = dir.path().join("statistics");
    let args = ["--defrag-idle=1".to_owned(), format!("--stats-file={}", statistics.display())];
    let daemon = Daemon::start(&dir.path().join("s"), &path, args);
    let mut client = Client::new(daemon.socket());
    let mut data = vec![0; BLOCK as usize];
    while moved(&daemon, &statistics) < blocks * BLOCK / 2 {
        // The guest that is there meanwhile sees nothing of it.
        let block = fastrand::u64(..blocks);
        data.copy_from_slice(&client.read(block * BLOCK, BLOCK as usize).expect("read"));
        assert!(data == block.to_le_bytes().repeat(512)[..], "block {block}");
        // Each request makes the disk count as used for a second.
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
    assert_content(&path, blocks);
}
