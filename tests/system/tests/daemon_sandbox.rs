//! What the running daemon has given up. That every other system test passes in the sandbox is the other
//! half of the proof.

#![forbid(unsafe_code)]

use exd_system_tests::client::Client;
use exd_system_tests::daemon::Daemon;
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use nix::unistd::{Uid, User, chown};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

const MIB: u64 = 1 << 20;

/// The values of this field over all threads of the process.
fn of_all_threads(pid: i32, field: &str) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
    let status = tasks.filter_map(|task| {
        let task = task.expect("listed").path();
        // A thread may end meanwhile.
        fs::read_to_string(task.join("status")).ok()
    });
    let values = status.map(|status| {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.expect("the kernel tells").trim().to_owned()
    });
    values.collect()
}

fn only(value: &str) -> BTreeSet<String> {
    BTreeSet::from([value.to_owned()])
}

/// P8: all threads are confined, those that started early and those that a connection brings.
#[test]
fn p8_every_thread_is_confined() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    for engine in ["io-uring", "threads"] {
        let args = ["--io-engine".to_owned(), engine.to_owned()];
        let daemon = Daemon::start_as_it_is(&dir.path().join("s"), &path, args);
        let mut client = Client::new(daemon.socket());
        client.write(512, &[7; 4096]).expect("write");
        client.flush().expect("flush");
        let pid = daemon.pid();
        assert_eq!(of_all_threads(pid, "Seccomp"), only("2"));
        assert_eq!(of_all_threads(pid, "NoNewPrivs"), only("1"));
        assert_eq!(of_all_threads(pid, "CapInh"), only("0000000000000000"));
        assert_eq!(of_all_threads(pid, "CapAmb"), only("0000000000000000"));
        for set in ["CapPrm", "CapEff"] {
            for capabilities in of_all_threads(pid, set) {
                let bits = u64::from_str_radix(&capabilities, 16).expect("hexadecimal");
                // CHOWN, DAC_OVERRIDE, FOWNER.
                assert_eq!(bits & !0b1011, 0, "{set} {capabilities}");
            }
        }
        if Uid::effective().is_root() {
            assert_eq!(of_all_threads(pid, "CapBnd"), only("0000000000000000"));
        }
        drop(client);
        daemon.kill();
    }
    // What a killed daemon left was found by the next one, and by this one.
    let daemon = Daemon::start_as_it_is(&dir.path().join("s"), &path, ["--no-sandbox"]);
    assert_eq!(of_all_threads(daemon.pid(), "Seccomp"), only("0"));
    let mut client = Client::new(daemon.socket());
    assert_eq!(client.read(512, 4096).expect("read"), [7; 4096]);
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
}

/// A daemon that has become another user serves, and removes what it made.
#[test]
fn another_user() {
    if !Uid::effective().is_root() {
        return println!("not run, needs root");
    }
    let Some(user) = User::from_name("nobody").expect("a user database") else {
        return println!("not run: no user 'nobody'");
    };
    let dir = tempfile::tempdir().expect("temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("open to all");
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 * MIB);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed");
    let mut refused = Daemon::launch(&dir.path().join("s"), &path, ["--user=nobody"]);
    refused.wait_for("ermission denied");
    assert!(!refused.wait().success());
    chown(&path, Some(user.uid), Some(user.gid)).expect("given away");
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--user=nobody"]);
    let uid = user.uid;
    assert_eq!(of_all_threads(daemon.pid(), "Uid"), only(&format!("{uid}\t{uid}\t{uid}\t{uid}")));
    assert_eq!(of_all_threads(daemon.pid(), "CapEff"), only("0000000000000000"));
    let mut client = Client::new(daemon.socket());
    client.write(512, &[7; 4096]).expect("write");
    client.flush().expect("flush");
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
}
