//! P2: requests in flight survive the death of the daemon. Whoever takes over completes each of them, once,
//! and nothing that was completed runs again.
//!
//! `EXD_KILLS` sets how often the daemon is killed (default 40; 1000 for a full run), `EXD_SEED` the seed.

#![forbid(unsafe_code)]

use exd_file::lock::lock;
use exd_file::{HostFile, LockMode, OpenMode};
use exd_system_tests::daemon::{Daemon, PATIENCE};
use exd_system_tests::frontend::{FREE, Machine, NEXT, WRITE, desc};
use exd_system_tests::history::{Change, History, SECTOR};
use exd_system_tests::image;
use exd_system_tests::programs::scratch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const DISK: u64 = 8 << 20;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;

/// Longest request in sectors.
const LONGEST: u64 = 64;
const DATA_LEN: u64 = LONGEST * SECTOR as u64;
/// Header and status of a request, and its data behind.
const PLACE: u64 = 0x1000 + DATA_LEN;
/// Requests in flight on each ring.
const DEPTH: u16 = 20;
const RING_SIZE: u16 = 64;
/// How long to wait for an answer before looking whether there is still a daemon.
const GLANCE: Duration = Duration::from_millis(5);

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn kills() -> u64 {
    number("EXD_KILLS", 40)
}

/// Where request `slot` of a ring has its bytes.
fn place(ring: usize, slot: u16) -> u64 {
    FREE + (ring as u64 * u64::from(DEPTH) + u64::from(slot)) * PLACE
}

/// Describes request `slot` of a ring in the descriptors from its head on, and returns the head.
fn describe(machine: &Machine, ring: usize, slot: u16, kind: u32, first: u64, bytes: u64) -> u16 {
    let (at, head) = (place(ring, slot), slot * 3);
    machine.put_header(at, kind, first);
    machine.memory.write_obj(0xffu8, GuestAddress(at + 16)).expect("in memory");
    let next = if bytes == 0 { head + 2 } else { head + 1 };
    machine.describe(ring, head, desc(at, 16, NEXT, next));
    let flags = if kind == IN { WRITE | NEXT } else { NEXT };
    machine.describe(ring, head + 1, desc(at + 0x1000, bytes as u32, flags, head + 2));
    machine.describe(ring, head + 2, desc(at + 16, 1, WRITE, 0));
    head
}

#[derive(Clone, Copy, Debug)]
enum Running {
    Change(Change),
    Flush { begun: u64 },
    Read { begun: u64, first: u64, count: u64 },
}

/// A guest that does not know that daemons die.
struct Guest {
    machine: Machine,
    history: History,
    random: fastrand::Rng,
    running: Vec<Vec<Option<Running>>>,
    /// Nothing new is submitted any more.
    closing: bool,
}

impl Guest {
    fn new(machine: Machine, history: History, seed: u64) -> Guest {
        let rings = machine.rings.len();
        Guest {
            machine,
            history,
            random: fastrand::Rng::with_seed(seed),
            running: vec![vec![None; DEPTH.into()]; rings],
            closing: false,
        }
    }

    fn in_flight(&self) -> usize {
        self.running.iter().flatten().flatten().count()
    }

    fn fill(&mut self) {
        for ring in 0..self.running.len() {
            let mut offered = false;
            for slot in 0..DEPTH {
                if self.running[ring][usize::from(slot)].is_none() && !self.closing {
                    let (running, head) = self.begin(ring, slot);
                    self.running[ring][usize::from(slot)] = Some(running);
                    self.machine.offer(ring, head);
                    offered = true;
                }
            }
            if offered {
                self.machine.kick(ring);
            }
        }
    }

    fn begin(&mut self, ring: usize, slot: u16) -> (Running, u16) {
        let count = if self.random.bool() { 8 } else { self.random.u64(1..=LONGEST) };
        // Half of them in a narrow place, where they meet others.
        let last = self.history.sectors() - count;
        let last = if self.random.bool() { last } else { last.min(256) };
        let first = self.random.u64(0..=last);
        let bytes = count * SECTOR as u64;
        match self.random.u32(0..100) {
            0..5 => {
                let begun = self.history.now();
                (Running::Flush { begun }, describe(&self.machine, ring, slot, FLUSH, 0, 0))
            }
            5..20 => {
                let begun = self.history.now();
                let head = describe(&self.machine, ring, slot, IN, first, bytes);
                (Running::Read { begun, first, count }, head)
            }
            _ => {
                let mut data = vec![0; bytes as usize];
                let change = self.history.begin_write(first, &mut data);
                let at = GuestAddress(place(ring, slot) + 0x1000);
                self.machine.memory.write_slice(&data, at).expect("in memory");
                let head = describe(&self.machine, ring, slot, OUT, first, bytes);
                (Running::Change(change), head)
            }
        }
    }

    /// Takes what is completed. An error says what a guest must never see.
    fn take(&mut self) -> Result<usize, String> {
        let mut taken = 0;
        for ring in 0..self.running.len() {
            for (head, len) in self.machine.take_used(ring) {
                taken += 1;
                let slot = usize::try_from(head / 3).map_err(|error| error.to_string())?;
                let running = self.running[ring].get_mut(slot).and_then(Option::take);
                let running =
                    running.ok_or(format!("ring {ring}: head {head} was not in flight"))?;
                self.end(ring, slot as u16, len, running)?;
            }
        }
        Ok(taken)
    }

    fn end(&mut self, ring: usize, slot: u16, len: u32, running: Running) -> Result<(), String> {
        let at = place(ring, slot);
        let status: u8 = self.machine.memory.read_obj(GuestAddress(at + 16)).expect("in memory");
        if status != OK {
            return Err(format!("status {status} for {running:?}"));
        }
        let mut expected = 1;
        match running {
            Running::Change(change) => self.history.end(change),
            Running::Flush { begun } => {
                let horizon =
                    self.running.iter().flatten().flatten().filter_map(|other| match other {
                        Running::Read { begun, .. } => Some(*begun),
                        _ => None,
                    });
                let horizon = horizon.min().unwrap_or(u64::MAX);
                self.history.flushed(begun, horizon);
            }
            Running::Read { begun, first, count } => {
                let mut data = vec![0; count as usize * SECTOR];
                expected += data.len() as u32;
                let from = GuestAddress(at + 0x1000);
                self.machine.memory.read_slice(&mut data, from).expect("in memory");
                self.history.check_read(first, &data, begun)?;
            }
        }
        if len != expected {
            return Err(format!("a used length of {len} for {running:?}"));
        }
        Ok(())
    }

    /// Goes on until the daemon is dead, or everything is done if nothing new is submitted.
    fn run(&mut self, daemon: &mut Daemon) -> Result<(), String> {
        let mut progress = Instant::now();
        loop {
            self.fill();
            if self.take()? > 0 {
                progress = Instant::now();
                continue;
            }
            if daemon.has_ended() || (self.closing && self.in_flight() == 0) {
                return Ok(());
            }
            if progress.elapsed() > PATIENCE {
                return Err(format!("never completed: {:?}", self.running));
            }
            for ring in 0..self.running.len() {
                self.machine.wait_call(ring, GLANCE);
            }
        }
    }

    /// Everything that was taken is completed: what is left was lost.
    fn lost(&mut self) -> Result<(), String> {
        for ring in 0..self.running.len() {
            self.machine.stop_ring(ring);
        }
        self.take()?;
        match self.in_flight() {
            0 => Ok(()),
            count => Err(format!("{count} requests are lost: {:?}", self.running)),
        }
    }

    /// Reads the whole disk.
    fn verify(&mut self) -> Result<(), String> {
        for first in (0..self.history.sectors()).step_by(LONGEST as usize) {
            let begun = self.history.now();
            let head = describe(&self.machine, 0, 0, IN, first, DATA_LEN);
            self.running[0][0] = Some(Running::Read { begun, first, count: LONGEST });
            self.machine.offer(0, head);
            self.machine.kick(0);
            let used = self.machine.wait_used(0, 1);
            let running = self.running[0][0].take().ok_or("it was there")?;
            self.end(0, 0, used[0].1, running)?;
        }
        Ok(())
    }
}

/// Kills the daemon when its moment has come, which is what is random here.
fn kill_after(pid: i32, delay: Duration) -> JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(delay);
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    })
}

struct Site {
    dir: TempDir,
    image: PathBuf,
    args: Vec<String>,
}

impl Site {
    /// An EXD image in blocks of so many bytes.
    fn exd(block_size: u32, args: &[&str]) -> Site {
        Site::new("exd", args, |path| image::create_in_blocks(path, DISK, block_size))
    }

    fn raw(args: &[&str]) -> Site {
        Site::new("raw", args, |path| {
            File::create(path).and_then(|file| file.set_len(DISK)).expect("create");
        })
    }

    fn new(format: &str, args: &[&str], create: impl FnOnce(&Path)) -> Site {
        let dir = scratch();
        let path = dir.path().join("disk");
        create(&path);
        let format = format!("--format={format}");
        let args = args.iter().map(|arg| arg.to_string()).chain([format]).collect();
        Site { dir, image: path, args }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(&self.socket(), &self.image, &self.args)
    }

    fn daemon_with(&self, more: &str) -> Daemon {
        let args = self.args.iter().map(String::as_str).chain([more]);
        Daemon::start(&self.socket(), &self.image, args)
    }
}

/// Kills and restarts under load. The error is what went wrong, if something did.
fn kill_under_load(site: &Site, tracked: bool, rings: usize, kills: u64) -> Result<(), String> {
    let seed = number("EXD_SEED", fastrand::u64(..));
    println!("repeat with EXD_SEED={seed} EXD_KILLS={kills}");
    let mut daemon = site.daemon();
    let mut machine = Machine::tracked_if(tracked, daemon.socket(), rings, RING_SIZE);
    // The used index wraps early on.
    for ring in 0..rings {
        machine.set_indices(ring, 65500);
        machine.start_ring(ring, 65500);
    }
    let history = History::of_daemon(DISK / SECTOR as u64, &site.args);
    let mut guest = Guest::new(machine, history, seed);
    for _ in 0..kills {
        let delay = Duration::from_millis(30).mul_f64(guest.random.f64());
        let killer = kill_after(daemon.pid(), delay);
        guest.run(&mut daemon)?;
        killer.join().expect("no panic");
        daemon.wait();
        daemon = site.daemon();
        guest.machine.reconnect(daemon.socket());
    }
    guest.closing = true;
    if !tracked {
        guest.lost()?;
    }
    guest.run(&mut daemon)?;
    guest.lost()?;
    let ring = guest.machine.used(0);
    guest.machine.start_ring(0, ring);
    guest.verify()?;
    println!("{} changes acknowledged, {kills} kills", guest.history.acknowledged);
    drop(guest);
    daemon.terminate();
    Ok(())
}

#[test]
fn p2_requests_in_flight_survive_sigkill() {
    let site = Site::exd(512, &[]);
    kill_under_load(&site, true, 2, kills()).expect("the guest sees nothing of it");
    image::assert_clean(&site.image);
}

/// More rings than threads, through the host's page cache, every write durable.
#[test]
fn p2_requests_in_flight_survive_sigkill_without_a_cache() {
    let site = Site::exd(4096, &["--cache=writethrough", "--threads=1"]);
    kill_under_load(&site, true, 3, kills() / 4).expect("the guest sees nothing of it");
    image::assert_clean(&site.image);
}

#[test]
fn p2_requests_in_flight_survive_sigkill_raw() {
    let site = Site::raw(&[]);
    kill_under_load(&site, true, 2, kills() / 4).expect("the guest sees nothing of it");
}

/// The tests above can fail: without the region requests are lost, or run twice.
#[test]
fn without_tracking_the_loss_is_noticed() {
    let site = Site::exd(4096, &["--no-inflight"]);
    let error = kill_under_load(&site, false, 2, kills()).expect_err("something is lost");
    println!("noticed: {error}");
}

const VERSION: u64 = 8;
const LAST_HEAD: u64 = 12;
const USED_INDEX: u64 = 14;

/// What a daemon that is dead by now has left in the region of the only ring.
struct Remains<'a>(&'a File);

impl Remains<'_> {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).expect("written");
    }

    /// The region was in use, and this was the used index.
    fn begin(&self, entries: u16, used: u16) {
        self.put(VERSION, &1u16.to_le_bytes());
        self.put(VERSION + 2, &entries.to_le_bytes());
        self.put(USED_INDEX, &used.to_le_bytes());
    }

    fn mark(&self, head: u16, counter: u64) {
        let at = 16 + u64::from(head) * 16;
        self.put(at + 8, &counter.to_le_bytes());
        self.put(at, &[1]);
    }

    fn mark_of(&self, head: u16) -> u8 {
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, 16 + u64::from(head) * 16).expect("read");
        byte[0]
    }
}

/// A machine whose daemon died a moment ago at used index `used`, with its one ring stopped. The requests
/// of all slots are there, each a write of its own block, and offered in this order.
fn after_death(socket: &Path, used: u16, offered: &[u16]) -> Machine {
    let mut machine = Machine::tracked(socket, 1, RING_SIZE);
    machine.set_indices(0, used);
    for slot in offered {
        let head = describe(&machine, 0, *slot, OUT, u64::from(*slot) * 8, 4096);
        let data = GuestAddress(place(0, *slot) + 0x1000);
        machine.memory.write_slice(&[*slot as u8 + 1; 4096], data).expect("in memory");
        machine.offer(0, head);
    }
    machine
}

fn remains(machine: &Machine) -> Remains<'_> {
    let (_, file) = machine.inflight.as_ref().expect("it is tracked");
    Remains(file)
}

/// Each of these slots is completed, once, and nothing else.
fn assert_completed(machine: &mut Machine, slots: &[u16]) {
    let mut used = machine.wait_used(0, slots.len());
    let stopped = machine.stop_ring(0);
    used.extend(machine.take_used(0));
    let heads: Vec<u32> = used.into_iter().map(|(head, _)| head).collect();
    let expected: BTreeSet<u32> = slots.iter().map(|slot| u32::from(*slot) * 3).collect();
    assert_eq!(heads.len(), slots.len(), "each once: {heads:?}");
    assert_eq!(heads.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(stopped, machine.rings[0].avail, "all were taken");
    for slot in slots {
        assert_eq!(remains(machine).mark_of(slot * 3), 0);
    }
}

/// The ring and the region wrap; nothing had been completed, or every slot was in flight, or a batch had
/// been shown and not noted.
#[test]
fn p2_what_a_dead_daemon_left_is_completed_once() {
    let site = Site::exd(512, &[]);
    let daemon = site.daemon();
    let all: Vec<u16> = (0..DEPTH).collect();
    for (used, counter) in [(0, 0), (7, 100), (65535, u64::MAX - 3), (65530, u64::MAX)] {
        println!("used index {used}, counter {counter}");
        // Three of five had been taken, in the order in which they lie in the ring.
        let mut machine = after_death(daemon.socket(), used, &[3, 1, 4, 0, 2]);
        remains(&machine).begin(2 * RING_SIZE, used);
        for (position, slot) in [3, 1, 4].into_iter().enumerate() {
            remains(&machine).mark(slot * 3, counter_after(counter, position));
        }
        machine.start_ring(0, used);
        assert_completed(&mut machine, &[3, 1, 4, 0, 2]);
        drop(machine);

        // Every slot.
        let mut machine = after_death(daemon.socket(), used, &all);
        remains(&machine).begin(2 * RING_SIZE, used);
        for slot in &all {
            remains(&machine).mark(slot * 3, counter_after(counter, usize::from(*slot)));
        }
        machine.start_ring(0, used);
        assert_completed(&mut machine, &all);
        drop(machine);

        // Four were taken, and a batch of the last and the second was shown and is still marked. The ring is
        // said to start at the used index, which would leave out the third.
        let mut machine = after_death(daemon.socket(), used, &[0, 1, 2, 3, 4]);
        remains(&machine).begin(2 * RING_SIZE, used);
        for slot in 0..4u16 {
            remains(&machine).mark(slot * 3, counter_after(counter, usize::from(slot)));
        }
        remains(&machine).put(16 + 16 * 9 + 6, &3u16.to_le_bytes());
        remains(&machine).put(LAST_HEAD, &9u16.to_le_bytes());
        machine.put_used(0, used, 3);
        machine.put_used(0, used.wrapping_add(1), 9);
        machine.set_used(0, used.wrapping_add(2));
        machine.start_ring(0, used.wrapping_add(2));
        assert_completed(&mut machine, &[0, 1, 2, 3, 4]);
    }
    daemon.terminate();
}

fn counter_after(counter: u64, count: usize) -> u64 {
    counter.wrapping_add(count as u64)
}

/// A region that is new to a ring that has run: nothing of it is taken for completed. The daemon dies with
/// everything in flight and nothing completed.
#[test]
fn p2_a_new_region_on_an_old_ring() {
    let site = Site::exd(4096, &[]);
    let slots: Vec<u16> = (0..DEPTH).collect();
    // So slow that nothing but the first gets through.
    let daemon = site.daemon_with("--throttling=iops-total=1");
    let mut machine = after_death(daemon.socket(), 500, &slots);
    machine.start_ring(0, 500);
    while slots.iter().filter(|slot| remains(&machine).mark_of(**slot * 3) == 1).count()
        + usize::from(machine.used(0).wrapping_sub(500))
        < slots.len()
    {
        thread::yield_now();
    }
    daemon.kill();
    let daemon = site.daemon();
    machine.reconnect(daemon.socket());
    assert_completed(&mut machine, &slots);
    daemon.terminate();
}

/// P9: what was in flight is submitted again under the image's lock, not before.
#[test]
fn p9_nothing_is_submitted_again_without_the_lock() {
    let site = Site::exd(512, &[]);
    let slots = [0, 1, 2];
    let daemon = site.daemon();
    let mut machine = after_death(daemon.socket(), 0, &slots);
    remains(&machine).begin(2 * RING_SIZE, 0);
    for slot in slots {
        remains(&machine).mark(slot * 3, u64::from(slot));
    }
    daemon.kill();
    let open = || HostFile::open(&site.image, OpenMode { write: true, direct: false });
    let holder = open().expect("open");
    lock(&holder, LockMode::Writer, PATIENCE).expect("lock");
    let before = fs::read(&site.image).expect("read");
    let mut daemon = Daemon::launch(&site.socket(), &site.image, &site.args);
    daemon.wait_for("waiting for the lock");
    assert_eq!(machine.used(0), 0);
    assert!(before == fs::read(&site.image).expect("read"), "nothing is written");
    drop(holder);
    daemon.wait_for("serving");
    machine.reconnect(daemon.socket());
    assert_completed(&mut machine, &slots);
    daemon.terminate();
}

/// A ring that is stopped as soon as it is started: what was in flight is completed before the front-end is
/// told where to go on, since that may be elsewhere.
#[test]
fn p2_a_ring_that_is_stopped_at_once_is_drained() {
    let site = Site::exd(4096, &[]);
    let daemon = site.daemon();
    for used in 0..20 {
        let mut machine = after_death(daemon.socket(), used, &[3, 1, 4]);
        remains(&machine).begin(2 * RING_SIZE, used);
        for (position, slot) in [3, 1].into_iter().enumerate() {
            remains(&machine).mark(slot * 3, position as u64);
        }
        machine.start_ring(0, used);
        let base = machine.stop_ring(0);
        assert_eq!(machine.used(0), base, "what was taken is completed");
        assert!(base >= used + 2, "{base}");
        assert!((0..5).all(|slot| remains(&machine).mark_of(slot * 3) == 0));
    }
    daemon.terminate();
}

/// A front-end that replaces the descriptor by which the guest is interrupted may look at the old one no
/// more: what was completed before must not go unnoticed.
#[test]
fn a_new_call_descriptor_is_signalled() {
    let site = Site::exd(512, &[]);
    let daemon = site.daemon();
    let mut machine = after_death(daemon.socket(), 0, &[0]);
    machine.start_ring(0, 0);
    machine.kick(0);
    machine.wait_used(0, 1);
    machine.replace_call(0);
    assert!(machine.wait_call(0, PATIENCE), "the guest is interrupted");
    daemon.terminate();
}

/// P8: what the front-end writes into the region costs that ring, until it is started with another region.
#[test]
fn p8_a_spoilt_region_stops_the_ring() {
    let site = Site::exd(4096, &[]);
    let mut daemon = site.daemon();
    type Spoil = fn(&Remains<'_>);
    let cases: [(&str, Spoil); 5] = [
        ("version", |remains| remains.put(VERSION, &[9, 9])),
        ("made for", |remains| remains.put(VERSION + 2, &[1, 0])),
        ("used index", |remains| {
            remains.mark(0, 0);
            remains.put(USED_INDEX, &[0, 128]);
        }),
        ("is not in the ring", |remains| remains.mark(2 * RING_SIZE - 1, 0)),
        ("its last batch", |remains| {
            remains.mark(0, 0);
            remains.put(USED_INDEX, &5u16.to_le_bytes());
            remains.put(LAST_HEAD, &[0xff, 0xff]);
        }),
    ];
    for (complaint, spoil) in cases {
        println!("{complaint}");
        let mut machine = after_death(daemon.socket(), 7, &[0]);
        remains(&machine).begin(2 * RING_SIZE, 7);
        spoil(&remains(&machine));
        machine.start_ring(0, 7);
        let line = daemon.wait_for("ring unusable");
        assert!(line.contains(complaint), "{line}");
        machine.wait_error(0);
        assert_eq!(machine.stop_ring(0), 7);
        machine.renew_inflight(1, 2 * RING_SIZE);
        machine.start_ring(0, 7);
        assert_completed(&mut machine, &[0]);
    }
    daemon.terminate();
}
