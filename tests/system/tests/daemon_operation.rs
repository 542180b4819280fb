//! What operators do with the daemon: several disks, systemd, the control socket, backup, logs.

#![forbid(unsafe_code)]

use exd_system_tests::client::{Client, Options};
use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::frontend::{Machine, NEXT, WRITE, desc};
use exd_system_tests::image;
use exd_system_tests::programs::{program, scratch};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

const MIB: u64 = 1 << 20;

/// Writes a configuration of two disks, `root` (exd) and `data` (raw), and makes their images.
fn two_disks(dir: &Path) {
    image::create(&dir.join("root.exd"), 16 * MIB);
    fs::File::create(dir.join("data.raw")).expect("create").set_len(8 * MIB).expect("set length");
    let at = dir.display();
    let text = format!(
        "control-path = '{at}/control'\n\
         [[disk]]\nblk-file = '{at}/root.exd'\nsocket-path = '{at}/root.sock'\nnum-queues = 2\n\
         [[disk]]\nblk-file = '{at}/data.raw'\nsocket-path = '{at}/data.sock'\nformat = 'raw'\n"
    );
    fs::write(dir.join("vm.toml"), text).expect("write");
}

fn serve_two_disks(dir: &Path) -> Daemon {
    two_disks(dir);
    let mut command = Command::new(program("vhost-daemon"));
    command.arg(format!("--config={}", dir.join("vm.toml").display()));
    let mut daemon = Daemon::spawn(command, &dir.join("root.sock"));
    daemon.wait_for("serving");
    daemon.wait_for("serving");
    daemon
}

/// Serves a 16 MiB exd image with a control socket.
fn serve(dir: &Path, args: &[&str]) -> Daemon {
    let path = dir.join("disk.exd");
    image::create(&path, 16 * MIB);
    let control = format!("--control-path={}", dir.join("control").display());
    let args = args.iter().map(|arg| (*arg).to_owned()).chain([control]);
    Daemon::start(&dir.join("s"), &path, args)
}

fn ctl(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program("exd-ctl"));
    command.arg(dir.join("control")).args(args);
    command.output().expect("exd-ctl runs")
}

fn ctl_ok(dir: &Path, args: &[&str]) -> String {
    let output = ctl(dir, args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn ctl_json(dir: &Path, args: &[&str]) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--output=json"]).collect();
    serde_json::from_str(&ctl_ok(dir, &args)).expect("JSON")
}

fn ctl_error(dir: &Path, args: &[&str]) -> String {
    let output = ctl(dir, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn connect(socket: &Path, read_only: bool) -> Client {
    Client::connect(socket, Options { read_only, ..Options::default() }).expect("connected")
}

/// A client of the control socket that speaks the protocol itself.
struct Raw(BufReader<UnixStream>);

impl Raw {
    fn connect(dir: &Path) -> Raw {
        let stream = UnixStream::connect(dir.join("control")).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        Raw(BufReader::new(stream))
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("sent");
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line).expect("an answer") {
            0 => None,
            _ => Some(serde_json::from_str(&line).expect("JSON")),
        }
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.send(&format!("{request}\n"));
        self.line().expect("an answer")
    }
}

#[test]
fn several_disks_in_one_process() {
    let dir = scratch();
    let daemon = serve_two_disks(dir.path());
    let mut root = connect(&dir.path().join("root.sock"), false);
    let mut data = connect(&dir.path().join("data.sock"), false);
    assert_eq!((root.number("capacity"), data.number("capacity")), (16 * MIB, 8 * MIB));
    root.write(4096, &[1; 4096]).expect("write");
    data.write(4096, &[2; 4096]).expect("write");
    drop(root);
    // A front-end that makes no sense harms its own disk's connection only.
    let mut hostile = UnixStream::connect(dir.path().join("root.sock")).expect("connected");
    hostile.write_all(&[0xff; 64]).expect("written");
    let mut rest = Vec::new();
    // However the daemon ends it.
    let _ = hostile.read_to_end(&mut rest);
    data.write(8192, &[3; 4096]).expect("write");
    assert_eq!(data.read(4096, 4096), Ok(vec![2; 4096]));
    let mut root = connect(&dir.path().join("root.sock"), false);
    assert_eq!(root.read(4096, 4096), Ok(vec![1; 4096]));
    drop((root, data));
    daemon.terminate();
    assert!(!dir.path().join("data.sock").exists() && !dir.path().join("control").exists());
    let report = image::check(&dir.path().join("root.exd"));
    assert!(report.is_clean() && !report.unclean, "closed cleanly: {report:?}");
}

#[test]
fn a_start_that_fails_in_part_has_failed() {
    let dir = scratch();
    two_disks(dir.path());
    fs::remove_file(dir.path().join("data.raw")).expect("remove");
    let mut command = Command::new(program("vhost-daemon"));
    command.arg(format!("--config={}", dir.path().join("vm.toml").display()));
    command.env("EXD_RUNTIME_DIR", dir.path().join("run"));
    let output = command.output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("error: [data] ") && text.contains("data.raw"), "{text}");
    assert!(!dir.path().join("root.sock").exists(), "nothing is left behind");
}

/// systemd's side, played by the test: the socket is inherited, messages come to a datagram socket.
#[test]
fn as_a_service_of_systemd() {
    let dir = scratch();
    let (path, socket) = (dir.path().join("disk.exd"), dir.path().join("s"));
    image::create(&path, 16 * MIB);
    let listener = UnixListener::bind(&socket).expect("bind");
    let notify = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
    notify.set_read_timeout(Some(PATIENCE)).expect("set");
    let told = |part: &str| {
        let mut all = String::new();
        while !all.lines().any(|line| line.starts_with(part)) {
            let mut buffer = [0; 4096];
            let count = notify.recv(&mut buffer).expect("the daemon tells");
            all += &String::from_utf8_lossy(&buffer[..count]);
            all.push('\n');
        }
        all
    };
    let mut command = Command::new("sh");
    command.args(["-c", "exec 3<&0 0</dev/null; LISTEN_PID=$$ WATCHDOG_PID=$$ exec \"$@\"", "sh"]);
    command.arg(program("vhost-daemon")).arg("--blk-file").arg(&path);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "any");
    command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "200000");
    command.env("EXD_RUNTIME_DIR", dir.path().join("run"));
    command.stdin(Stdio::from(OwnedFd::from(listener)));
    let mut child = command.spawn().expect("it starts");
    let ready = told("READY=1");
    assert!(ready.contains("STATUS=serving disk"), "{ready}");
    told("WATCHDOG=1");
    let mut client = connect(&socket, false);
    client.write(0, &[7; 512]).expect("write");
    assert_eq!(client.read(0, 512), Ok(vec![7; 512]));
    drop(client);
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it runs");
    told("STOPPING=1");
    assert!(child.wait().expect("it ends").success());
    assert!(socket.exists(), "the socket is systemd's");
}

#[test]
fn sockets_of_systemd_must_fit() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let run = |names: &str, more: &[&str]| {
        let listener = UnixListener::bind(dir.path().join(names)).expect("bind");
        let mut command = Command::new("sh");
        command.args(["-c", "exec 3<&0 0</dev/null; LISTEN_PID=$$ exec \"$@\"", "sh"]);
        command.arg(program("vhost-daemon")).arg("--blk-file").arg(&path).args(more);
        command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", names);
        command.stdin(Stdio::from(OwnedFd::from(listener)));
        let output = command.output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let own = format!("--socket-path={}", dir.path().join("own").display());
    assert!(run("other", &[&own]).contains("no disk claims: [\"other\"]"));
    assert!(run("control", &[]).contains("disk 'disk' has no socket"));
}

#[test]
fn the_control_socket_answers() {
    let dir = scratch();
    let daemon = serve(dir.path(), &["--name=root"]);
    let mode = fs::metadata(dir.path().join("control")).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = connect(daemon.socket(), false);
    for i in 0..10 {
        client.write(i * 65536, &[1; 8192]).expect("write");
    }
    client.flush().expect("flush");
    client.read(0, 512).expect("read");
    let text = ctl_ok(dir.path(), &["status"]);
    assert!(text.contains("disk root: ") && text.contains("16 MiB, held"), "{text}");
    assert!(text.contains("main socket: connected, 1 connection so far"), "{text}");
    let stats = ctl_json(dir.path(), &["stats"]);
    let (disk, queue) = (&stats["disks"][0], &stats["disks"][0]["queues"][0]);
    assert_eq!(
        (&queue["write"]["requests"], &queue["write"]["bytes"]),
        (&json!(10), &json!(81920))
    );
    assert_eq!((&queue["flush"]["requests"], &queue["read"]["bytes"]), (&json!(1), &json!(512)));
    assert_eq!((&queue["in_flight"], &disk["writes"]), (&json!(0), &json!(10)));
    let buckets = queue["write"]["latency"]["log2_us"].as_array().expect("a list");
    let sum: u64 = buckets.iter().filter_map(Value::as_u64).sum();
    assert_eq!(sum, 10);
    let text = ctl_ok(dir.path(), &["stats", "--prometheus"]);
    let labels = "disk=\"root\",socket=\"main\",queue=\"0\",kind=\"write\"";
    let line = format!("exd_request_duration_seconds_count{{{labels}}} 10");
    assert!(text.lines().any(|known| known == line), "{text}");
    ctl_ok(dir.path(), &["checkpoint"]);
    ctl_ok(dir.path(), &["resize", "+16M"]);
    assert_eq!(ctl_json(dir.path(), &["status"])["disks"][0]["capacity"], 32 * MIB);
    assert_eq!(client.number("capacity"), 32 * MIB);
    client.write(31 * MIB, &[5; 4096]).expect("write in the new part");
    assert!(ctl_error(dir.path(), &["resize", "1"]).starts_with("exd-ctl: "));
    assert!(ctl_error(dir.path(), &["log-level", "loud"]).contains("'loud' is no level"));
    assert!(ctl_error(dir.path(), &["thaw", "--disk=other"]).contains("there is no disk 'other'"));
    assert_eq!(ctl(dir.path(), &["explode"]).status.code(), Some(2));
    ctl_ok(dir.path(), &["log-level", "debug"]);
    assert_eq!(ctl_json(dir.path(), &["status"])["log_level"], "debug");
    drop(client);
    daemon.terminate();
    assert!(ctl_error(dir.path(), &["status"]).contains("could not connect"));
    image::assert_clean(&dir.path().join("disk.exd"));
}

/// Writes under way while a checkpoint is made are counted apart, those past the engine too.
#[test]
fn writes_during_checkpoints_are_counted() {
    let dir = scratch();
    let daemon = serve(dir.path(), &["--name=root"]);
    let mut client = connect(daemon.socket(), false);
    let write = |client: &mut Client, i: u64| {
        client.write(i % 1000 * 4096, &[1; 4096]).expect("write");
    };
    write(&mut client, 0);
    let stats = |dir| ctl_json(dir, &["stats"])["disks"][0]["queues"][0]["write"].clone();
    assert_eq!(stats(dir.path())["latency_in_checkpoints"], Value::Null);
    thread::scope(|threads| {
        let checkpoints = threads.spawn(|| {
            for _ in 0..3 {
                ctl_ok(dir.path(), &["checkpoint"]);
            }
        });
        for i in 1.. {
            write(&mut client, i);
            if checkpoints.is_finished() {
                break;
            }
        }
    });
    let stats = stats(dir.path());
    let count = |name: &str| {
        let log2 = stats[name]["log2_us"].as_array().expect("it was counted");
        log2.iter().filter_map(Value::as_u64).sum::<u64>()
    };
    assert!(count("latency_in_checkpoints") > 0);
    let parts = count("latency_in_checkpoints") + count("latency_outside_checkpoints");
    assert_eq!(parts, count("latency"));
    let text = ctl_ok(dir.path(), &["stats", "--prometheus"]);
    assert!(text.contains("exd_checkpoint_write_duration_seconds_count{"), "{text}");
    drop(client);
    daemon.terminate();
    image::assert_clean(&dir.path().join("disk.exd"));
}

/// P8, for whoever may connect to the control socket.
#[test]
fn clients_of_the_control_socket_are_bounded() {
    let dir = scratch();
    let daemon = serve(dir.path(), &[]);
    let mut long = Raw::connect(dir.path());
    long.send(&"x".repeat(4096));
    let answer = long.line().expect("an answer");
    assert_eq!(
        (&answer["ok"], &answer["error"]),
        (&json!(false), &json!("the request is too long"))
    );
    assert!(long.line().is_none(), "and no more");
    let mut wrong = Raw::connect(dir.path());
    assert_eq!(wrong.ask(&json!(["status"]))["ok"], false);
    wrong.send("\n\n{\"command\":\"status\"}\n{\"command\":\"status\"}\n");
    assert_eq!(wrong.line().expect("an answer")["ok"], true);
    assert_eq!(wrong.line().expect("an answer")["ok"], true);
    drop((long, wrong));
    // Those that say nothing take places, but hold nobody up.
    let mut silent = Vec::new();
    let refused = loop {
        let mut raw = Raw::connect(dir.path());
        raw.0.get_mut().write_all(b"{\"command\":\"status\"}\n").ok();
        match raw.line() {
            Some(answer) if answer["ok"] == true => silent.push(raw),
            answer => break answer,
        }
    };
    assert_eq!(refused.expect("an answer")["error"], "too many clients at a time");
    assert!((10..=16).contains(&silent.len()), "{}", silent.len());
    let mut client = connect(daemon.socket(), false);
    client.write(0, &[1; 512]).expect("the disk is served");
    drop(client);
    drop(silent);
    // Their places come free when the daemon sees that they are gone.
    while !ctl(dir.path(), &["status"]).status.success() {
        thread::yield_now();
    }
    let _silent: Vec<Raw> = (0..8).map(|_| Raw::connect(dir.path())).collect();
    daemon.terminate();
}

#[test]
fn events_and_a_consistent_copy() {
    let dir = scratch();
    let daemon = serve(dir.path(), &[]);
    let mut events = Raw::connect(dir.path());
    assert_eq!(events.ask(&json!({ "command": "subscribe" }))["ok"], true);
    let mut expect = |name: &str| {
        let event = events.line().expect("an event");
        assert_eq!((&event["event"], &event["disk"]), (&json!(name), &json!("disk")));
    };
    let mut client = connect(daemon.socket(), false);
    expect("connection");
    client.write(0, &[1; 65536]).expect("write");
    ctl_ok(dir.path(), &["freeze", "--timeout=600"]);
    expect("frozen");
    // A write waits, a read does not.
    client.memory(0, 4096).fill(2);
    client.start_write(0, 0, 0, 4096, 1);
    assert_eq!(client.ends(0, None), []);
    let copy = dir.path().join("copy.exd");
    fs::copy(dir.path().join("disk.exd"), &copy).expect("copied");
    assert_eq!(client.ends(0, None), [], "it still waits");
    ctl_ok(dir.path(), &["thaw"]);
    expect("thawed");
    assert_eq!(client.ends(0, Some(PATIENCE)), [(1, 0)]);
    assert!(ctl_error(dir.path(), &["thaw"]).contains("not frozen"));
    assert_eq!(client.read(0, 512), Ok(vec![2; 512]));
    drop(client);
    expect("disconnect");
    daemon.terminate();
    image::assert_clean(&copy);
    let mut block = [0; 4096];
    image::open(&copy, true).read(0, &mut block).expect("read");
    assert_eq!(block, [1; 4096], "as it was when it was frozen");
}

#[test]
fn a_second_front_end_reads_beside_the_guest() {
    let dir = scratch();
    let second = dir.path().join("read-only");
    for format in ["exd", "raw"] {
        let path = dir.path().join(format);
        match format {
            "exd" => image::create(&path, 16 * MIB),
            _ => fs::File::create(&path).expect("create").set_len(16 * MIB).expect("set length"),
        }
        let args =
            [format!("--format={format}"), format!("--read-only-socket={}", second.display())];
        let daemon = Daemon::start(&dir.path().join("s"), &path, args);
        let mut guest = connect(daemon.socket(), false);
        guest.write(4096, &[7; 4096]).expect("write");
        let mut reader = connect(&second, true);
        assert_eq!(reader.number("capacity"), 16 * MIB);
        assert_eq!(reader.read(4096, 4096), Ok(vec![7; 4096]));
        assert!(reader.write(0, &[1; 512]).is_err());
        assert!(reader.flush().is_ok());
        // The same heads on the same queues at the same time.
        for round in 0..200u64 {
            let value = (round % 251) as u8 + 1;
            guest.memory(0, 65536).fill(value);
            guest.start_write(0, MIB, 0, 65536, 1);
            reader.start_read(0, MIB, 0, 65536, 2);
            assert_eq!(guest.ends(0, Some(PATIENCE)), [(1, 0)]);
            assert_eq!(reader.ends(0, Some(PATIENCE)), [(2, 0)]);
            assert_eq!(reader.read(MIB, 65536), Ok(vec![value; 65536]));
        }
        drop(reader);
        guest.write(0, &[3; 512]).expect("the guest has not noticed");
        let mut reader = connect(&second, true);
        drop(guest);
        assert_eq!(reader.read(0, 512), Ok(vec![3; 512]));
        let mut guest = connect(daemon.socket(), false);
        guest.write(0, &[4; 512]).expect("write");
        assert_eq!(reader.read(0, 512), Ok(vec![4; 512]));
        drop((reader, guest));
        daemon.terminate();
        assert!(!second.exists());
    }
    image::assert_clean(&dir.path().join("exd"));
}

/// P9: the reader never keeps or takes the image from those it was left to.
#[test]
fn a_reader_does_not_stand_in_the_way_of_a_hand_over() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 16 * MIB);
    let second = dir.path().join("read-only");
    let option = format!("--read-only-socket={}", second.display());
    let daemon = Daemon::start(&dir.path().join("s"), &path, [option]);
    let mut guest = Machine::start(daemon.socket(), 1, 16);
    let mut reader = connect(&second, true);
    assert_eq!(reader.read(0, 512), Ok(vec![0; 512]));
    let base = guest.stop_ring(0);
    reader.start_read(0, 0, 0, 512, 1);
    assert_eq!(reader.ends(0, None), []);
    // Anybody can have the image now.
    assert!(!image::check(&path).unclean);
    assert_eq!(reader.ends(0, None), [], "it waits");
    guest.start_ring(0, base);
    assert_eq!(reader.ends(0, Some(PATIENCE)), [(1, 0)]);
    drop(reader);
    guest.stop_ring(0);
    // One that waits has it when the guest's front-end is gone.
    let mut reader = connect(&second, true);
    reader.start_read(0, 0, 0, 512, 2);
    assert_eq!(reader.ends(0, None), []);
    drop(guest);
    assert_eq!(reader.ends(0, Some(PATIENCE)), [(2, 0)]);
    drop(reader);
    assert!(!image::check(&path).unclean);
    // Without a guest the reader has the image for itself, and gives it back.
    let mut reader = connect(&second, true);
    assert_eq!(reader.read(0, 512), Ok(vec![0; 512]));
    drop(reader);
    assert!(!image::check(&path).unclean);
    daemon.terminate();
    image::assert_clean(&path);
}

/// Whoever is refused learns by whom.
#[test]
fn imgtool_names_who_has_the_image() {
    let dir = scratch();
    let daemon = serve(dir.path(), &[]);
    let other = dir.path().join("other.raw");
    fs::File::create(&other).expect("create").set_len(16 * MIB).expect("set length");
    let disk = dir.path().join("disk.exd").display().to_string();
    let other = other.display().to_string();
    let (disk, other) = (disk.as_str(), other.as_str());
    for args in [
        &["info", disk][..],
        &["check", disk],
        &["check", "-r", "leaks", disk],
        &["resize", disk, "+1M"],
        &["map", disk],
        &["dump", disk],
        &["convert", "-O", "raw", disk, other],
        &["convert", "-O", "exd", other, disk],
        &["compare", disk, other],
        &["measure", "-O", "raw", disk],
        &["defrag", disk],
        &["create", disk, "1M"],
    ] {
        let output = Command::new(program("imgtool")).args(args).output().expect("it runs");
        assert!(!output.status.success(), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let holder = format!("It is held by vhost-daemon, process {} on host", daemon.pid());
        assert!(text.contains(&holder), "{args:?}: {text}");
    }
    daemon.terminate();
    image::assert_clean(&dir.path().join("disk.exd"));
}

/// The same for raw images, and for whoever stands in the way of a writer by reading.
#[test]
fn imgtool_names_who_has_a_raw_image_and_who_reads() {
    let dir = scratch();
    let (raw, exd) = (dir.path().join("disk.raw"), dir.path().join("disk.exd"));
    fs::File::create(&raw).expect("create").set_len(16 * MIB).expect("set length");
    image::create(&exd, 16 * MIB);
    for (image, args) in [
        (&raw, &["--format=raw"][..]),
        (&raw, &["--format=raw", "--read-only"]),
        (&exd, &["--read-only"]),
    ] {
        let daemon = Daemon::start(&dir.path().join("s"), image, args);
        let name = image.display().to_string();
        let format = image.extension().and_then(|text| text.to_str()).expect("one");
        let output = Command::new(program("imgtool"))
            .args(["resize", "-f", format, &name, "+1M"])
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let holder = format!("It is held by vhost-daemon, process {}", daemon.pid());
        assert!(!output.status.success() && text.contains(&holder), "{args:?}: {text}");
        daemon.terminate();
    }
}

/// Limits are changed while a request waits for them.
#[test]
fn limits_change_at_run_time() {
    let dir = scratch();
    let daemon = serve(dir.path(), &["--throttling=bps-write=1"]);
    let mut client = connect(daemon.socket(), false);
    client.write(0, &[1; 4096]).expect("the first one passes");
    client.memory(0, 4096).fill(2);
    client.start_write(0, 4096, 0, 4096, 1);
    assert_eq!(ctl_ok(dir.path(), &["limits"]), "bps-write=1\n");
    let text = ctl_error(dir.path(), &["limits", "bps-total=1,bps-read=1"]);
    assert!(text.contains("exclude each other"), "{text}");
    assert_eq!(client.in_flight(0), 1, "it waits for more than an hour");
    assert_eq!(ctl_ok(dir.path(), &["limits", "none"]), "no limits\n");
    assert_eq!(client.ends(0, Some(PATIENCE)), [(1, 0)]);
    let limits = "iops-read=1000,iops-read-max=5000,iops-size=8192";
    let answer = ctl_json(dir.path(), &["limits", limits]);
    assert_eq!(answer["throttling"], limits);
    assert_eq!(ctl_json(dir.path(), &["status"])["disks"][0]["throttling"], limits);
    assert_eq!(client.read(4096, 4096), Ok(vec![2; 4096]));
    let text = ctl_error(dir.path(), &["retry"]);
    assert!(text.contains("--on-enospc=stop"), "{text}");
    drop(client);
    daemon.terminate();
}

#[test]
fn who_may_connect() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let socket = dir.path().join("s");
    let mode = || fs::metadata(&socket).expect("it is there").permissions().mode() & 0o777;
    let group = nix::unistd::getgid().to_string();
    let args = ["--socket-mode=0660".to_owned(), format!("--socket-group={group}")];
    let daemon = Daemon::start(&socket, &path, args);
    assert_eq!(mode(), 0o660);
    // Another daemon for the same socket is refused, whatever its image.
    let other = dir.path().join("other.exd");
    image::create(&other, MIB);
    let run = |args: &[&str]| {
        let mut command = Command::new(program("vhost-daemon"));
        command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&other).args(args);
        command.env("EXD_RUNTIME_DIR", dir.path().join("run"));
        let output = command.output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = run(&[]);
    assert!(text.contains("another process listens there"), "{text}");
    assert!(run(&["--socket-group=no-such-group"]).contains("no group 'no-such-group'"));
    connect(&socket, false);
    // What a killed daemon leaves is replaced.
    daemon.kill();
    assert!(socket.exists());
    let daemon = Daemon::start(&socket, &path, [] as [&str; 0]);
    assert_eq!(mode(), 0o600);
    connect(&socket, false);
    daemon.terminate();
}

/// P8: a guest can provoke messages without end, but they do not fill the host's disk.
#[test]
fn a_hostile_guest_cannot_fill_the_log() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let socket = dir.path().join("s");
    let log = dir.path().join("log");
    let mut command = Command::new(program("vhost-daemon"));
    command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&path);
    command.arg("--log-format=json").env("EXD_RUNTIME_DIR", dir.path().join("run"));
    command.stderr(fs::File::create(&log).expect("create"));
    let mut child = command.spawn().expect("it starts");
    while !fs::read_to_string(&log).expect("read").contains("serving") {
        thread::yield_now();
    }
    for _ in 0..50 {
        let mut machine = Machine::start(&socket, 1, 256);
        for round in 0..20 {
            for head in 0..100 {
                // No status byte anywhere.
                machine.describe(0, head, desc(0x50000, 16, 0, 0));
                machine.offer(0, head);
            }
            machine.kick(0);
            assert_eq!(machine.wait_used(0, 100).len(), 100, "round {round}");
        }
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it runs");
    assert!(child.wait().expect("it ends").success());
    let text = fs::read_to_string(&log).expect("read");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(lines.len() < 300, "{} lines for 100,000 broken requests", lines.len());
    let suppressed = |line: &&Value| {
        line["message"].as_str().is_some_and(|text| text.contains("similar messages suppressed"))
    };
    assert!(lines.iter().any(|line| suppressed(&line)), "and it is told");
    let first = &lines[0];
    assert_eq!((&first["level"], &first["disk"]), (&json!("info"), &json!("disk")));
}

/// A thread that polls finds requests without a kick, goes on when polling has ended, and ends in time.
#[test]
fn polling_needs_no_kicks() {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, MIB);
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--poll-us=20000000"]);
    let mut machine = Machine::start(daemon.socket(), 2, 16);
    assert_eq!(machine.request(0, 1, 0, Some(desc(0x50000, 512, 0, 0))), 0);
    machine.put_header(0x60000, 4, 0);
    machine.describe(0, 0, desc(0x60000, 16, NEXT, 1));
    machine.describe(0, 1, desc(0x60010, 1, WRITE, 0));
    for _ in 0..100 {
        machine.offer(0, 0);
        assert_eq!(machine.wait_used(0, 1), [(0, 1)]);
    }
    machine.stop_ring(0);
    drop(machine);
    daemon.terminate();
    // A short time of polling is over between any two requests: kicks are asked for again.
    let daemon = Daemon::start(&dir.path().join("s"), &path, ["--poll-us=1"]);
    let mut client = connect(daemon.socket(), false);
    for round in 0..1000u64 {
        client.write(round % 64 * 4096, &[round as u8; 512]).expect("write");
    }
    drop(client);
    daemon.terminate();
    image::assert_clean(&path);
}

#[test]
fn what_it_says_of_itself() {
    let dir = scratch();
    let daemon = program("vhost-daemon");
    let run = |args: &[&str]| {
        let output = Command::new(&daemon).args(args).output().expect("it runs");
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    // By convention other options are ignored then.
    let capabilities: Value =
        serde_json::from_str(&run(&["--print-capabilities", "--nonsense"])).expect("JSON");
    assert_eq!(capabilities["type"], "block");
    let discovery: Value = serde_json::from_str(&run(&["--print-discovery"])).expect("JSON");
    assert_eq!(discovery["type"], "block");
    let binary = Path::new(discovery["binary"].as_str().expect("a name"));
    assert!(binary.is_absolute() && binary.exists(), "{binary:?}");
    assert!(discovery["tags"].is_array() && discovery["description"].is_string());
    let help = run(&["--help"]);
    for part in ["Disk:", "Sockets:", "Queues and threads:", "Process:", "Examples:", "--config"] {
        assert!(help.contains(part), "{part}");
    }
    let directory = dir.path().join("generated");
    run(&["--generate", directory.to_str().expect("a UTF-8 name")]);
    for name in [
        "man/vhost-daemon.1",
        "man/exd-ctl.1",
        "completions/vhost-daemon.bash",
        "completions/_exd-ctl",
        "completions/exd-ctl.fish",
    ] {
        assert!(directory.join(name).exists(), "{name}");
    }
}

/// The files that are delivered beside the programs.
#[test]
fn the_example_configuration_is_valid() {
    let dir = scratch();
    let contrib = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../vhost-daemon/contrib"));
    let text = fs::read_to_string(contrib.join("example.toml")).expect("read");
    // The images are not there: that is all that may be wrong.
    let text = text.replace("/run/exd/vm1", dir.path().to_str().expect("a UTF-8 name"));
    fs::write(dir.path().join("vm1.toml"), text).expect("write");
    let config = format!("--config={}", dir.path().join("vm1.toml").display());
    let output = Command::new(program("vhost-daemon")).arg(config).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("error")).collect();
    let missing = |line: &&&str| line.contains("No such file") || line.contains("CPU affinity");
    assert_eq!(errors.iter().filter(missing).count(), 2, "{text}");
}
