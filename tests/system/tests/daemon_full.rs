//! The daemon on a host that is full.

#![forbid(unsafe_code)]

use exd_system_tests::client::Client;
use exd_system_tests::daemon::Daemon;
use exd_system_tests::image;
use exd_system_tests::private_disk::PrivateDisk;
use std::fs;

const MIB: u64 = 1 << 20;

/// The guest gets errors for what has no space and nothing else; what was written stays readable; once there
/// is space the same daemon goes on (P3, P4).
#[test]
fn p3_p4_a_full_host_file_system() {
    let disk = match PrivateDisk::new(96 * MIB) {
        Ok(disk) => disk,
        Err(text) => return println!("not run, needs root: {text}"),
    };
    let path = disk.path().join("disk.exd");
    image::create(&path, 512 * MIB);
    let ballast = disk.path().join("ballast");
    fs::write(&ballast, vec![1; 16 << 20]).expect("space so far");
    let daemon = Daemon::start(&disk.path().join("s"), &path, [""; 0]);
    let mut client = Client::new(daemon.socket());
    let data = |i: u64| vec![i as u8 | 1; 256 << 10];
    let offset = |i: u64| i * MIB;
    let mut written = 0;
    while written < 512 && client.write(offset(written), &data(written)).is_ok() {
        written += 1;
    }
    println!("{written} writes of 256 KiB before the host was full");
    assert!(written > 10 && written < 512);
    let check_content = |client: &mut Client| {
        for i in 0..written {
            assert!(client.read(offset(i), 256 << 10).expect("read") == data(i), "write {i}");
        }
    };
    check_content(&mut client);
    // Overwriting needs no space.
    client.write(offset(3), &data(3)).expect("overwrite");
    for i in 0..20 {
        // Neither success nor failure is promised here, only an answer.
        let _ = client.write(300 * MIB + i * 65536, &[1; 4096]);
    }
    let _ = client.flush();
    fs::remove_file(&ballast).expect("removed");
    client.write(offset(400), &data(400)).expect("there is space again");
    client.flush().expect("flush");
    check_content(&mut client);
    assert!(client.read(offset(400), 256 << 10).expect("read") == data(400));
    daemon.kill();
    drop(client);
    image::assert_clean(&path);
    let daemon = Daemon::start(&disk.path().join("s"), &path, [""; 0]);
    let mut client = Client::new(daemon.socket());
    check_content(&mut client);
    client.discard(0, 512 * MIB).expect("discard");
    client.flush().expect("flush");
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
}
