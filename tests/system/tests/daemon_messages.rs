//! P8: messages that no honest front-end sends, one case a row. After each of them the daemon lives, other
//! queues of the connection go on where it is not closed, and the next connection is served.

#![forbid(unsafe_code)]

use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::frontend::{
    AVAIL, FEATURES, MEMORY, Machine, RINGS, USED, USER, assert_unharmed,
};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use exd_system_tests::wire::request::*;
use exd_system_tests::wire::{NEED_REPLY, PLAIN, Verdict, Wire, message, numbers32, numbers64};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How far the connection is when the case begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has been said.
    Connected,
    /// Features are agreed on.
    Negotiated,
    /// Memory is shared, two rings run.
    Running,
}
use Stage::{Connected, Negotiated, Running};

/// What the case must come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// The connection goes on and its second ring works.
    Serves,
    /// The connection goes on.
    Answers,
    /// The daemon closes the connection.
    Closed,
    /// The front-end goes away in the middle.
    Left,
}
use End::{Answers, Closed, Left, Serves};

type Act = fn(&mut Machine, &Wire);
type Case = (&'static str, Stage, Act, End);

/// Index and number, as SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ENABLE have them.
fn state(index: u32, number: u32) -> Vec<u8> {
    numbers32(&[index, number])
}

/// SET_VRING_ADDR: index, flags, descriptors, used, available, log.
fn addresses(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut bytes = numbers32(&[index, 0]);
    bytes.extend(numbers64(&[desc, used, avail, 0]));
    bytes
}

/// The addresses of ring 0 as they should be.
fn good_addresses() -> Vec<u8> {
    addresses(0, USER, USER + USED, USER + AVAIL)
}

/// Guest address, size, user address, offset in the file.
type Region = [u64; 4];
const ALL: Region = [0, MEMORY, USER, 0];

/// SET_MEM_TABLE says `count` regions and has these.
fn table(count: u32, regions: &[Region]) -> Vec<u8> {
    let mut bytes = numbers32(&[count, 0]);
    regions.iter().for_each(|region| bytes.extend(numbers64(region)));
    bytes
}

/// ADD_MEM_REG and REM_MEM_REG.
fn single(region: Region) -> Vec<u8> {
    let mut bytes = numbers64(&[0]);
    bytes.extend(numbers64(&region));
    bytes
}

/// GET_CONFIG and SET_CONFIG.
fn config(offset: u32, size: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let mut payload = numbers32(&[offset, size, flags]);
    payload.extend_from_slice(bytes);
    payload
}

fn memory_fd(machine: &Machine) -> RawFd {
    machine.file().as_raw_fd()
}

fn set_table(machine: &Machine, wire: &Wire, regions: &[Region], fds: usize) {
    let fds = vec![memory_fd(machine); fds];
    wire.send_with(SET_MEM_TABLE, PLAIN, &table(regions.len() as u32, regions), &fds);
}

/// Half a message and what is no message.
fn framing() -> Vec<Case> {
    vec![
        ("half a header", Connected, |_, w| w.bytes(&[1, 0, 0, 0, 1]), Left),
        ("a header without its body", Connected, |_, w| w.bytes(&numbers32(&[2, 1, 8])), Left),
        (
            "half a body, a ring running",
            Running,
            |_, w| w.bytes(&message(SET_VRING_ADDR, PLAIN, &good_addresses())[..30]),
            Left,
        ),
        (
            "one byte at a time",
            Running,
            |_, w| {
                for byte in message(GET_PROTOCOL_FEATURES, PLAIN, &[]) {
                    w.bytes(&[byte]);
                }
            },
            Serves,
        ),
        (
            "three messages at once",
            Running,
            |_, w| w.bytes(&message(GET_FEATURES, PLAIN, &[]).repeat(3)),
            Serves,
        ),
        ("a body that is too short", Negotiated, |_, w| w.send(SET_FEATURES, &[0; 4]), Closed),
        ("a body that is too long", Negotiated, |_, w| w.send(SET_FEATURES, &[0; 16]), Closed),
        ("a body where none belongs", Negotiated, |_, w| w.send(GET_FEATURES, &[0; 8]), Closed),
        ("no body", Running, |_, w| w.send(SET_VRING_ADDR, &[]), Closed),
        (
            "more bytes than the header says",
            Negotiated,
            |_, w| {
                let mut bytes = numbers32(&[SET_FEATURES, PLAIN, 8]);
                bytes.extend([0xff; 64]);
                w.bytes(&bytes);
            },
            Closed,
        ),
        (
            "size 4 GiB",
            Connected,
            |_, w| w.bytes(&numbers32(&[SET_FEATURES, PLAIN, u32::MAX])),
            Closed,
        ),
        ("size above the largest", Negotiated, |_, w| w.send(SET_CONFIG, &[0; 5000]), Closed),
        ("request 0", Connected, |_, w| w.send(0, &[]), Closed),
        ("request 9999", Negotiated, |_, w| w.send(9999, &[0; 8]), Closed),
        ("request of the highest number", Running, |_, w| w.send(u32::MAX, &[]), Closed),
        ("version 0", Connected, |_, w| w.bytes(&numbers32(&[GET_FEATURES, 0, 0])), Closed),
        ("version 2", Connected, |_, w| w.bytes(&numbers32(&[GET_FEATURES, 2, 0])), Closed),
        (
            "a reply as a request",
            Connected,
            |_, w| w.bytes(&numbers32(&[GET_FEATURES, 5, 0])),
            Closed,
        ),
        ("unknown flags", Connected, |_, w| w.bytes(&numbers32(&[1, 0xffff_fff1, 0])), Closed),
        ("a megabyte of noise", Connected, |_, w| w.bytes(&vec![0xa5; 1 << 20]), Closed),
    ]
}

/// The right messages in the wrong order, or too often.
fn order() -> Vec<Case> {
    vec![
        ("an owner twice", Negotiated, |_, w| w.send(SET_OWNER, &[]), Closed),
        ("an owner resigns while rings run", Running, |_, w| w.send(RESET_OWNER, &[]), Answers),
        (
            "a kick before everything",
            Connected,
            |m, w| {
                m.add_ring(16);
                let fd = m.rings[0].kick.as_raw_fd();
                m.kick(0);
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &[fd]);
            },
            Answers,
        ),
        (
            "a kick before the addresses",
            Negotiated,
            |m, w| {
                m.share_memory();
                m.add_ring(16);
                let (kick, call) = (m.rings[0].kick.as_raw_fd(), m.rings[0].call.as_raw_fd());
                w.send_with(SET_VRING_CALL, PLAIN, &numbers64(&[0]), &[call]);
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &[kick]);
                w.send(SET_VRING_ENABLE, &state(0, 1));
                m.kick(0);
            },
            Answers,
        ),
        (
            "enabled before memory",
            Negotiated,
            |_, w| w.send(SET_VRING_ENABLE, &state(0, 1)),
            Answers,
        ),
        (
            "enabled before protocol features",
            Connected,
            |_, w| w.send(SET_VRING_ENABLE, &state(0, 1)),
            Closed,
        ),
        ("enabled by 2", Running, |_, w| w.send(SET_VRING_ENABLE, &state(0, 2)), Closed),
        (
            "addresses before memory",
            Negotiated,
            |_, w| w.send(SET_VRING_ADDR, &good_addresses()),
            Closed,
        ),
        (
            "stopped and never started",
            Negotiated,
            |_, w| w.send(GET_VRING_BASE, &state(3, 0)),
            Answers,
        ),
        (
            "stopped twice",
            Running,
            |m, _| {
                m.stop_ring(0);
                m.stop_ring(0);
            },
            Serves,
        ),
        (
            "kicked when stopped",
            Running,
            |m, _| {
                m.stop_ring(0);
                m.offer(0, 0);
                m.kick(0);
            },
            Serves,
        ),
        ("features again", Running, |_, w| w.send(SET_FEATURES, &numbers64(&[FEATURES])), Answers),
        ("no features", Running, |_, w| w.send(SET_FEATURES, &numbers64(&[0])), Answers),
        ("all features", Negotiated, |_, w| w.send(SET_FEATURES, &numbers64(&[u64::MAX])), Closed),
        (
            "all protocol features",
            Negotiated,
            |_, w| w.send(SET_PROTOCOL_FEATURES, &numbers64(&[u64::MAX])),
            Answers,
        ),
        (
            "a configuration before its feature",
            Connected,
            |_, w| w.send(GET_CONFIG, &config(0, 8, 0, &[0; 8])),
            Closed,
        ),
        ("a reset before everything", Connected, |_, w| w.send(RESET_DEVICE, &[]), Closed),
        ("a reset of a running device", Running, |_, w| w.send(RESET_DEVICE, &[]), Answers),
    ]
}

/// Rings where and as they cannot be. A ring with wrong addresses is kicked; the other one must not mind.
fn rings() -> Vec<Case> {
    fn moved(machine: &mut Machine, wire: &Wire, desc: u64, used: u64, avail: u64) {
        machine.stop_ring(0);
        wire.send(
            SET_VRING_ADDR,
            &addresses(0, USER + desc, USER + used, USER.wrapping_add(avail)),
        );
        let (kick, call) = (machine.rings[0].kick.as_raw_fd(), machine.rings[0].call.as_raw_fd());
        wire.send_with(SET_VRING_CALL, PLAIN, &numbers64(&[0]), &[call]);
        wire.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &[kick]);
        wire.send(SET_VRING_ENABLE, &state(0, 1));
        machine.offer(0, 0);
        machine.kick(0);
    }
    vec![
        ("no such ring: size", Negotiated, |_, w| w.send(SET_VRING_NUM, &state(64, 16)), Closed),
        (
            "no such ring: base",
            Negotiated,
            |_, w| w.send(SET_VRING_BASE, &state(u32::MAX, 0)),
            Closed,
        ),
        (
            "no such ring: enable",
            Running,
            |_, w| w.send(SET_VRING_ENABLE, &state(1 << 16, 1)),
            Closed,
        ),
        (
            "no such ring: addresses",
            Running,
            |_, w| w.send(SET_VRING_ADDR, &addresses(999, USER, USER + USED, USER + AVAIL)),
            Closed,
        ),
        ("no such ring: stop", Running, |_, w| w.send(GET_VRING_BASE, &state(64, 0)), Closed),
        (
            "no such ring: kick",
            Running,
            |m, w| {
                w.send_with(
                    SET_VRING_KICK,
                    PLAIN,
                    &numbers64(&[255]),
                    &[m.rings[0].kick.as_raw_fd()],
                )
            },
            Closed,
        ),
        ("size 0", Negotiated, |_, w| w.send(SET_VRING_NUM, &state(0, 0)), Closed),
        ("size 2048", Negotiated, |_, w| w.send(SET_VRING_NUM, &state(0, 2048)), Closed),
        ("size 65552", Negotiated, |_, w| w.send(SET_VRING_NUM, &state(0, 65552)), Closed),
        (
            "size 1000, no power of two",
            Running,
            |m, w| {
                m.stop_ring(0);
                w.send(SET_VRING_NUM, &state(0, 1000));
                moved(m, w, 0, USED, AVAIL);
            },
            Serves,
        ),
        (
            "size changed while it runs",
            Running,
            |m, w| {
                w.send(SET_VRING_NUM, &state(0, 1024));
                m.set_avail(0, 900);
                m.kick(0);
            },
            Serves,
        ),
        (
            "base changed while it runs",
            Running,
            |m, w| {
                w.send(SET_VRING_BASE, &state(0, 77));
                m.kick(0);
            },
            Serves,
        ),
        (
            "base beyond 16 bits",
            Running,
            |m, w| {
                m.stop_ring(0);
                w.send(SET_VRING_BASE, &state(0, u32::MAX));
                moved(m, w, 0, USED, AVAIL);
            },
            Serves,
        ),
        ("descriptors misaligned", Running, |m, w| moved(m, w, 8, USED, AVAIL), Closed),
        ("used ring misaligned", Running, |m, w| moved(m, w, 0, USED + 2, AVAIL), Closed),
        ("available ring misaligned", Running, |m, w| moved(m, w, 0, USED, AVAIL + 1), Closed),
        ("descriptors outside", Running, |m, w| moved(m, w, MEMORY, USED, AVAIL), Closed),
        ("used ring outside", Running, |m, w| moved(m, w, 0, MEMORY + (1 << 40), AVAIL), Closed),
        (
            "available ring outside",
            Running,
            |m, w| moved(m, w, 0, USED, 0u64.wrapping_sub(USER)),
            Closed,
        ),
        ("descriptors over the end", Running, |m, w| moved(m, w, MEMORY - 16, USED, AVAIL), Serves),
        ("used ring over the end", Running, |m, w| moved(m, w, 0, MEMORY - 4, AVAIL), Serves),
        ("used index over the end", Running, |m, w| moved(m, w, 0, MEMORY - 4, AVAIL), Serves),
        ("available ring over the end", Running, |m, w| moved(m, w, 0, USED, MEMORY - 4), Serves),
        ("available index over the end", Running, |m, w| moved(m, w, 0, USED, MEMORY - 2), Serves),
        (
            "all three rings in one place",
            Running,
            |m, w| moved(m, w, 0x30000, 0x30000, 0x30000),
            Serves,
        ),
        (
            "on another ring's used ring",
            Running,
            |m, w| moved(m, w, RINGS + USED, 0x30000, AVAIL),
            Serves,
        ),
        (
            "moved while it runs",
            Running,
            |m, w| {
                w.send(
                    SET_VRING_ADDR,
                    &addresses(0, USER + 0x30000, USER + 0x38000, USER + 0x3c000),
                );
                m.kick(0);
            },
            Serves,
        ),
        (
            "unknown flags of addresses",
            Running,
            |_, w| {
                let mut payload = good_addresses();
                payload[4..8].copy_from_slice(&[0xff; 4]);
                w.send(SET_VRING_ADDR, &payload);
            },
            Closed,
        ),
    ]
}

/// Memory that is not there, twice there, or gone.
fn memory() -> Vec<Case> {
    fn add(machine: &Machine, wire: &Wire, region: Region) {
        wire.send_with(ADD_MEM_REG, PLAIN, &single(region), &[memory_fd(machine)]);
    }
    const SECOND: u64 = 1 << 32;
    vec![
        ("no regions", Negotiated, |m, w| set_table(m, w, &[], 0), Closed),
        ("no regions while rings run", Running, |m, w| set_table(m, w, &[], 0), Closed),
        (
            "more regions than there are",
            Negotiated,
            |m, w| {
                w.send_with(SET_MEM_TABLE, PLAIN, &table(8, &[ALL]), &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "more regions than allowed",
            Negotiated,
            |m, w| {
                let regions: Vec<Region> =
                    (0..33).map(|i| [i << 32, 4096, USER + (i << 32), 0]).collect();
                set_table(m, w, &regions, 33);
            },
            Closed,
        ),
        (
            "a count that overflows",
            Negotiated,
            |m, w| {
                w.send_with(SET_MEM_TABLE, PLAIN, &table(u32::MAX, &[ALL]), &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "regions that overlap",
            Negotiated,
            |m, w| set_table(m, w, &[ALL, [4096, 8192, USER + SECOND, 0]], 2),
            Closed,
        ),
        ("the same region twice", Negotiated, |m, w| set_table(m, w, &[ALL, ALL], 2), Closed),
        ("an empty region", Negotiated, |m, w| set_table(m, w, &[[0, 0, USER, 0]], 1), Closed),
        (
            "guest addresses wrap",
            Negotiated,
            |m, w| set_table(m, w, &[[u64::MAX - 4095, 8192, USER, 0]], 1),
            Closed,
        ),
        (
            "user addresses wrap",
            Negotiated,
            |m, w| set_table(m, w, &[[0, 8192, u64::MAX - 4095, 0]], 1),
            Closed,
        ),
        (
            "offset and size wrap",
            Negotiated,
            |m, w| set_table(m, w, &[[0, 8192, USER, u64::MAX - 4095]], 1),
            Closed,
        ),
        (
            "a size that cannot be mapped",
            Negotiated,
            |m, w| set_table(m, w, &[[0, 1 << 62, USER, 0]], 1),
            Closed,
        ),
        (
            "an offset within a page",
            Negotiated,
            |m, w| set_table(m, w, &[[0, 4096, USER, 100]], 1),
            Closed,
        ),
        (
            "a region behind the file's end",
            Negotiated,
            |m, w| set_table(m, w, &[[0, 4096, USER, MEMORY]], 1),
            Closed,
        ),
        (
            "a region longer than its file",
            Negotiated,
            |m, w| set_table(m, w, &[[0, MEMORY * 2, USER, 0]], 1),
            Closed,
        ),
        ("no descriptor", Negotiated, |m, w| set_table(m, w, &[ALL], 0), Closed),
        (
            "too few descriptors",
            Negotiated,
            |m, w| set_table(m, w, &[ALL, [SECOND, 4096, USER + SECOND, 0]], 1),
            Closed,
        ),
        ("too many descriptors", Negotiated, |m, w| set_table(m, w, &[ALL], 8), Closed),
        (
            "a directory as memory",
            Negotiated,
            |_, w| {
                let file = File::open("/").expect("open");
                w.send_with(SET_MEM_TABLE, PLAIN, &table(1, &[ALL]), &[file.as_raw_fd()]);
            },
            Closed,
        ),
        (
            "an event as memory",
            Negotiated,
            |m, w| {
                m.add_ring(16);
                w.send_with(
                    SET_MEM_TABLE,
                    PLAIN,
                    &table(1, &[ALL]),
                    &[m.rings[0].kick.as_raw_fd()],
                );
            },
            Closed,
        ),
        (
            "memory without writing",
            Negotiated,
            |m, w| {
                let path = format!("/proc/self/fd/{}", memory_fd(m));
                let file = File::open(path).expect("open");
                w.send_with(SET_MEM_TABLE, PLAIN, &table(1, &[ALL]), &[file.as_raw_fd()]);
            },
            Closed,
        ),
        ("added twice", Running, |m, w| add(m, w, ALL), Closed),
        (
            "added, overlapping",
            Running,
            |m, w| add(m, w, [MEMORY - 4096, 8192, USER + SECOND, 0]),
            Closed,
        ),
        (
            "added without a descriptor",
            Running,
            |_, w| w.send(ADD_MEM_REG, &single([SECOND, 4096, USER + SECOND, 0])),
            Closed,
        ),
        (
            "added, half a message",
            Running,
            |m, w| {
                w.send_with(ADD_MEM_REG, PLAIN, &numbers64(&[0, SECOND]), &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "added and removed",
            Running,
            |m, w| {
                let region = [SECOND, 1 << 20, USER + SECOND, 0];
                for _ in 0..100 {
                    add(m, w, region);
                    w.send(REM_MEM_REG, &single(region));
                }
            },
            Serves,
        ),
        (
            "removed, with a descriptor",
            Running,
            |m, w| {
                let region = [SECOND, 1 << 20, USER + SECOND, 0];
                add(m, w, region);
                w.send_with(REM_MEM_REG, PLAIN, &single(region), &[memory_fd(m)]);
            },
            Serves,
        ),
        (
            "removed and never added",
            Running,
            |_, w| w.send(REM_MEM_REG, &single([SECOND, 4096, USER, 0])),
            Closed,
        ),
        (
            "removed in part",
            Running,
            |_, w| w.send(REM_MEM_REG, &single([0, MEMORY / 2, USER, 0])),
            Closed,
        ),
        (
            "more regions added than there are slots",
            Running,
            |m, w| {
                for i in 1..520 {
                    add(m, w, [i << 32, 4096, USER + (i << 32), 0]);
                }
            },
            Closed,
        ),
        (
            "all memory removed while rings run",
            Running,
            |m, w| {
                w.send(REM_MEM_REG, &single(ALL));
                m.offer(0, 0);
                m.kick(0);
            },
            Answers,
        ),
    ]
}

/// Descriptors of the wrong kind or number.
fn descriptors() -> Vec<Case> {
    fn with_file(wire: &Wire, request: u32) {
        let file = tempfile::tempfile().expect("temporary file");
        wire.send_with(request, PLAIN, &numbers64(&[0]), &[file.as_raw_fd()]);
        wire.send(SET_VRING_ENABLE, &state(0, 1));
    }
    vec![
        (
            "no kick, by flag",
            Running,
            |m, w| {
                w.send(SET_VRING_KICK, &numbers64(&[1 << 8]));
                m.kick(0);
            },
            Serves,
        ),
        (
            "no kick, without the flag",
            Running,
            |_, w| w.send(SET_VRING_KICK, &numbers64(&[0])),
            Closed,
        ),
        ("no call, by flag", Running, |_, w| w.send(SET_VRING_CALL, &numbers64(&[1 << 8])), Serves),
        (
            "no call, without the flag",
            Running,
            |_, w| w.send(SET_VRING_CALL, &numbers64(&[0])),
            Closed,
        ),
        (
            "a kick and the flag for none",
            Running,
            |m, w| {
                let fd = m.rings[0].kick.as_raw_fd();
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[1 << 8]), &[fd]);
            },
            Closed,
        ),
        (
            "two kicks",
            Running,
            |m, w| {
                let fds = [m.rings[0].kick.as_raw_fd(), m.rings[1].kick.as_raw_fd()];
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &fds);
            },
            Closed,
        ),
        (
            "a hundred kicks",
            Running,
            |m, w| {
                let fds = [m.rings[0].kick.as_raw_fd(); 100];
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &fds);
            },
            Closed,
        ),
        (
            "a descriptor with a message that has none",
            Negotiated,
            |m, w| {
                w.send_with(GET_FEATURES, PLAIN, &[], &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "descriptors with a body",
            Running,
            |m, w| {
                let bytes = message(SET_VRING_CALL, PLAIN, &numbers64(&[0]));
                w.bytes(&bytes[..12]);
                w.bytes_with(&bytes[12..], &[m.rings[0].call.as_raw_fd()]);
            },
            Answers,
        ),
        (
            "a file to signal",
            Running,
            |m, w| {
                with_file(w, SET_VRING_CALL);
                m.offer(0, 0);
                m.kick(0);
            },
            Serves,
        ),
        (
            "an event that is full, to signal",
            Running,
            |m, w| {
                // Who writes to it waits until somebody reads, which nobody does.
                let full = EventFd::new(0).expect("eventfd");
                full.write(u64::MAX - 1).expect("written");
                w.send_with(SET_VRING_CALL, PLAIN, &numbers64(&[0]), &[full.as_raw_fd()]);
                w.verdict();
                m.offer(0, 0);
                m.kick(0);
            },
            Serves,
        ),
        (
            "a pipe with one byte as kick",
            Running,
            |m, w| {
                m.stop_ring(0);
                let (read, write) = nix::unistd::pipe().expect("pipe");
                nix::unistd::write(&write, &[1]).expect("written");
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &[read.as_raw_fd()]);
                w.send(SET_VRING_ENABLE, &state(0, 1));
            },
            Answers,
        ),
        (
            "a pipe without a writer as kick",
            Running,
            |m, w| {
                m.stop_ring(0);
                let (read, _) = nix::unistd::pipe().expect("pipe");
                w.send_with(SET_VRING_KICK, PLAIN, &numbers64(&[0]), &[read.as_raw_fd()]);
                w.send(SET_VRING_ENABLE, &state(0, 1));
            },
            Answers,
        ),
        ("a file to signal errors", Running, |_, w| with_file(w, SET_VRING_ERR), Serves),
        (
            "a file to send requests to",
            Negotiated,
            |m, w| {
                w.send_with(SET_BACKEND_REQ_FD, PLAIN, &[], &[memory_fd(m)]);
            },
            Closed,
        ),
        ("nothing to send requests to", Negotiated, |_, w| w.send(SET_BACKEND_REQ_FD, &[]), Closed),
    ]
}

/// The configuration space beyond its ends.
fn configuration() -> Vec<Case> {
    vec![
        ("nothing read", Negotiated, |_, w| w.send(GET_CONFIG, &config(0, 0, 0, &[])), Closed),
        (
            "read beyond the end",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(200, 56, 0, &[0; 56])),
            Answers,
        ),
        (
            "read from far away",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(u32::MAX, 8, 0, &[0; 8])),
            Closed,
        ),
        (
            "read too much",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(0, 512, 0, &[0; 512])),
            Answers,
        ),
        (
            "read more than is said",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(0, 8, 0, &[0; 60])),
            Closed,
        ),
        (
            "read less than is said",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(0, 60, 0, &[0; 8])),
            Closed,
        ),
        (
            "read by unknown flags",
            Negotiated,
            |_, w| w.send(GET_CONFIG, &config(0, 8, 0xff, &[0; 8])),
            Closed,
        ),
        (
            "written: the capacity",
            Running,
            |_, w| w.send(SET_CONFIG, &config(0, 8, 0, &[0xff; 8])),
            Closed,
        ),
        ("written: nothing", Running, |_, w| w.send(SET_CONFIG, &config(32, 0, 0, &[])), Closed),
        (
            "written: far away",
            Running,
            |_, w| w.send(SET_CONFIG, &config(u32::MAX, 1, 0, &[1])),
            Closed,
        ),
        (
            "written: a strange truth",
            Running,
            |_, w| w.send(SET_CONFIG, &config(32, 1, 0, &[0xa5])),
            Serves,
        ),
        (
            "written: two bytes",
            Running,
            |_, w| w.send(SET_CONFIG, &config(32, 2, 0, &[0, 0])),
            Closed,
        ),
        (
            "written: less than is said",
            Running,
            |_, w| w.send(SET_CONFIG, &config(32, 200, 0, &[0; 1])),
            Closed,
        ),
    ]
}

/// Requests of features that were not agreed on.
fn features() -> Vec<Case> {
    vec![
        (
            "a log without its feature",
            Connected,
            |m, w| {
                w.send_with(SET_LOG_BASE, PLAIN, &numbers64(&[4096, 0]), &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "a log longer than its file",
            Running,
            |m, w| {
                let numbers = numbers64(&[MEMORY + 1, 0]);
                w.send_with(SET_LOG_BASE, PLAIN, &numbers, &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "a log that begins behind its file",
            Running,
            |m, w| {
                let numbers = numbers64(&[4096, MEMORY]);
                w.send_with(SET_LOG_BASE, PLAIN, &numbers, &[memory_fd(m)]);
            },
            Closed,
        ),
        (
            "a log's event",
            Running,
            |m, w| {
                w.send_with(SET_LOG_FD, PLAIN, &[], &[m.rings[0].call.as_raw_fd()]);
            },
            Closed,
        ),
        (
            "an inflight region without its feature",
            Running,
            |_, w| w.send(GET_INFLIGHT_FD, &[0; 24]),
            Closed,
        ),
        ("a status", Running, |_, w| w.send(SET_STATUS, &numbers64(&[0xff])), Closed),
        ("an address space", Running, |_, w| w.send(22, &[0; 40]), Closed),
        ("a postcopy", Running, |_, w| w.send_with(28, NEED_REPLY, &[], &[]), Closed),
        (
            "a device's state",
            Running,
            |m, w| {
                w.send_with(42, PLAIN, &numbers32(&[0, 0]), &[memory_fd(m)]);
            },
            Answers,
        ),
    ]
}

const NO_ARGUMENTS: [&str; 0] = [];

/// Bytes of memory that belong to the daemon alone.
fn private_bytes(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a size");
    let kib = line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok());
    kib.expect("a number") << 10
}

/// The daemon's open descriptors: what each is.
fn open_descriptors(daemon: &Daemon) -> Vec<String> {
    let dir = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("proc");
    // One that is closed meanwhile is none.
    let mut links: Vec<String> = dir
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|link| link.display().to_string())
        .collect();
    links.sort();
    links
}

fn sockets(links: &[String]) -> usize {
    links.iter().filter(|link| link.starts_with("socket:")).count()
}

/// The daemon's open descriptors when it has dealt with the end of its last connection, and has as many
/// sockets as at its start.
fn descriptors_of(daemon: &Daemon, idle: usize, at_most: Option<usize>) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE / 4;
    loop {
        let links = open_descriptors(daemon);
        let connected = sockets(&links) > idle;
        let enough = at_most.is_none_or(|most| links.len() <= most) && !connected;
        if enough || Instant::now() > deadline {
            return links;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn run(cases: Vec<Case>) {
    let dir = scratch();
    let path = dir.path().join("disk.exd");
    image::create(&path, 64 << 20);
    let mut daemon = Daemon::start(&dir.path().join("s"), &path, NO_ARGUMENTS);
    let next = |daemon: &Daemon| {
        let mut machine = Machine::start(daemon.socket(), 1, 16);
        assert_unharmed(&mut machine, 0);
    };
    let idle = sockets(&open_descriptors(&daemon));
    next(&daemon);
    let before = (private_bytes(&daemon), descriptors_of(&daemon, idle, None));
    let mut wrong = Vec::new();
    for (name, stage, act, end) in cases {
        println!("{name}");
        let mut machine = match stage {
            Connected => Machine::connect(daemon.socket()),
            Negotiated => Machine::negotiate(daemon.socket()),
            Running => Machine::start(daemon.socket(), 2, 16),
        };
        if stage == Running {
            assert_unharmed(&mut machine, 0);
        }
        let wire = Wire::of(&machine.control);
        act(&mut machine, &wire);
        if end != Left {
            let expected = if end == Closed { Verdict::Closed } else { Verdict::Answers };
            let verdict = wire.verdict();
            if verdict != expected {
                wrong.push(format!("{name}: {verdict:?}"));
            }
            if verdict == Verdict::Answers && end == Serves {
                assert_unharmed(&mut machine, 1);
            }
        }
        drop(wire);
        drop(machine);
        next(&daemon);
        assert!(!daemon.has_ended(), "{name}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let open = descriptors_of(&daemon, idle, Some(before.1.len()));
    assert!(open.len() <= before.1.len(), "descriptors: {:#?} {open:#?}", before.1);
    let bytes = private_bytes(&daemon);
    assert!(bytes < before.0 + (16 << 20), "memory: {} {bytes}", before.0);
    daemon.terminate();
}

#[test]
fn broken_messages() {
    run(framing());
}

#[test]
fn messages_out_of_order() {
    run(order());
}

#[test]
fn impossible_rings() {
    run(rings());
}

#[test]
fn impossible_memory() {
    run(memory());
}

#[test]
fn wrong_descriptors() {
    run(descriptors());
}

#[test]
fn impossible_configuration() {
    run(configuration());
}

#[test]
fn features_not_agreed_on() {
    run(features());
}
