//! Reads and overwrites of written blocks do not take the engine's lock: it does not see them at all.

#![forbid(unsafe_code)]

use exd_system_tests::client::Client;
use exd_system_tests::daemon::Daemon;
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use std::fs;
use std::path::Path;

const BLOCKS: u64 = 64;
const ROUNDS: u64 = 20;

fn statistics(daemon: &Daemon, path: &Path) -> impl Fn(&str) -> u64 + use<> {
    // Written anew on the signal, by renaming: gone first, it is complete when it is there again.
    fs::remove_file(path).ok();
    daemon.signal(nix::sys::signal::Signal::SIGUSR1);
    while !path.exists() {
        std::thread::yield_now();
    }
    let text = fs::read_to_string(path).expect("statistics");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    move |name| value[name].as_u64().unwrap_or_else(|| panic!("no {name} in {value}"))
}

#[test]
fn reads_and_overwrites_take_no_lock() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 << 20);
    let file = dir.path().join("statistics");
    let args = [format!("--stats-file={}", file.display())];
    let daemon = Daemon::start(&dir.path().join("s"), &path, args);
    let mut client = Client::new(daemon.socket());
    for block in 0..BLOCKS {
        client.write(block * 8192, &[1; 4096]).expect("write");
    }
    client.flush().expect("flush");
    let before = statistics(&daemon, &file);
    for round in 0..ROUNDS {
        for block in 0..BLOCKS {
            let data = [round as u8 ^ block as u8; 1024];
            client.write(block * 8192 + 512, &data).expect("write");
            assert_eq!(client.read(block * 8192 + 512, 1024).expect("read"), data);
        }
    }
    let after = statistics(&daemon, &file);
    let grown = |name| after(name) - before(name);
    assert_eq!(grown("fast_reads"), ROUNDS * BLOCKS);
    assert_eq!(grown("fast_overwrites"), ROUNDS * BLOCKS);
    assert_eq!(grown("fast_misses"), 0);
    assert_eq!(grown("first_writes"), 0);
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
}
