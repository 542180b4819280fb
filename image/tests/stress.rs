//! Random requests at depth, ended in random order, with errors for a while, kills and closings in
//! between. Every request must end, and the image must be sound after each session (P2, P4, P5, P8).
//!
//! `EXD_STRESS_SEEDS` says which seeds are run: a number of them, or a range such as `67..68`.

mod common;

use common::{EIO, Fate, Memory, Random, buffer_len};
use exd_image::check::check;
use exd_image::{
    CreateOptions, Disk, Op, OpenOptions, Preallocation, Request, RequestId, StorageError, create,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Seeds of an ordinary run.
const SEEDS: u64 = 200;
/// Sessions of one image.
const SESSIONS: u64 = 6;
/// Requests under way at once.
const DEPTH: usize = 24;
/// So many ticks without an operation under way are a hang.
const IDLE_MAX: u64 = 300;

/// How often operations fail, in thousandths; shared with the storage's hook.
#[derive(Clone, Default)]
struct Errors {
    rate: Rc<Cell<u64>>,
    of_syncs_too: Rc<Cell<bool>>,
}

impl Errors {
    fn install(&self, storage: &mut Memory, mut random: Random) {
        let errors = self.clone();
        storage.set_hook(move |op| {
            let spared = *op == Op::Sync && !errors.of_syncs_too.get();
            if errors.rate.get() == 0 || spared || random.below(1000) >= errors.rate.get() {
                Fate::Proceed
            } else if random.one_in(2) {
                Fate::Fail(StorageError::NoSpace)
            } else {
                Fate::Fail(EIO)
            }
        });
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        window_bytes: 128 << 10,
        overlay_max: 64,
        clear_up_nodes: 1,
        cache_bytes: 64 << 10,
        log_slots: 512,
        journal_max: 1 << 20,
        ..Default::default()
    }
}

/// A new image, on hosts of all kinds.
fn image(random: &mut Random) -> Memory {
    let block_size = random.pick(&[512, 4096, 65536, 4096]);
    let mut storage = Memory {
        alignment: if block_size >= 4096 && random.one_in(4) { 4096 } else { 512 },
        host_block: random.pick(&[4096, 4096, 65536]),
        fixed_length: random.one_in(5),
        ..Default::default()
    };
    if storage.fixed_length {
        storage.file = vec![0xee; 64 << 20];
    }
    let image = CreateOptions {
        virtual_size: 512 * (4000 + random.below(16000)),
        block_size,
        preallocation: random.pick(&[
            Preallocation::Off,
            Preallocation::Off,
            Preallocation::Metadata,
        ]),
        ..common::small_image(0)
    };
    create(&mut storage, &image).expect("the image can be made");
    storage.shuffle = Some(random.clone());
    storage
}

fn random_request(random: &mut Random, size: u64) -> Request {
    let offset = random.below(size / 512) * 512;
    let scale = 1 << random.below(10);
    let len = (512 * (1 + random.below(scale))).min(size - offset);
    match random.below(40) {
        0..=19 => Request::Write { offset, len, durable: random.one_in(8) },
        20..=25 => Request::Read { offset, len },
        26..=28 => {
            Request::WriteZeroes { offset, len, unmap: random.one_in(2), durable: random.one_in(8) }
        }
        29..=32 => Request::Discard { offset, len },
        33..=36 => Request::Flush,
        37 => Request::Checkpoint,
        38 if random.one_in(3) => Request::Resize { size: 512 * (3000 + random.below(17000)) },
        _ => Request::Discard { offset: 0, len: size / 1024 * 512 },
    }
}

/// One opening of the image.
struct Session<'a> {
    storage: &'a mut Memory,
    disk: Disk,
    live: BTreeMap<RequestId, Request>,
    /// The smallest size the disk may have: what lies below it is surely in range.
    size: u64,
    next_id: u64,
    now_ms: u64,
}

impl<'a> Session<'a> {
    fn open(storage: &'a mut Memory) -> Self {
        let disk = Disk::open(storage, options()).expect("the image opens");
        let size = disk.info().virtual_size;
        Session { storage, disk, live: BTreeMap::new(), size, next_id: 0, now_ms: 0 }
    }

    fn submit(&mut self, request: Request) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.storage.buffers.insert(id, vec![0x77; buffer_len(&request)]);
        self.live.insert(id, request);
        self.disk.submit(self.storage, id, request);
    }

    /// One operation ends; false if none is under way.
    fn step(&mut self) -> bool {
        let Some((token, result)) = self.storage.step() else { return false };
        self.disk.complete(self.storage, token, result);
        true
    }

    fn tick(&mut self, ms: u64) {
        self.now_ms += ms;
        self.disk.tick(self.storage, self.now_ms);
    }

    fn reap(&mut self) {
        while let Some((id, outcome)) = self.disk.pop_finished() {
            let request = self.live.remove(&id).expect("the request is under way");
            let size = self.disk.info().virtual_size;
            let resized = matches!(request, Request::Resize { .. }) && outcome.is_ok();
            self.size = if resized { size } else { self.size.min(size) };
            self.storage.buffers.remove(&id);
        }
    }

    /// Requests at random, while the storage works now and then.
    fn load(&mut self, random: &mut Random, errors: &Errors) {
        let rate = random.pick(&[0, 0, 20, 100]);
        errors.of_syncs_too.set(random.one_in(4));
        let steps = 300 + random.below(700);
        for step in 0..steps {
            errors.rate.set(if step < steps / 2 { rate } else { 0 });
            for _ in 0..random.below(6) {
                if self.live.len() < DEPTH {
                    self.submit(random_request(random, self.size));
                }
            }
            self.disk.kick(self.storage);
            for _ in 0..random.below(12) {
                self.step();
            }
            if random.one_in(10) {
                self.tick(random.below(600));
            }
            self.reap();
        }
    }

    /// Waits for every request.
    fn finish(&mut self) {
        let mut idle = 0;
        while !self.live.is_empty() {
            if !self.step() {
                idle += 1;
                assert!(idle < IDLE_MAX, "hangs: {:?} {:?}", self.live, self.disk.info());
                self.tick(300);
            }
            self.reap();
        }
    }

    /// Ends the session, well if nothing stands against it.
    fn close(mut self, random: &mut Random, errors: &Errors) {
        errors.of_syncs_too.set(false);
        errors.rate.set(if random.one_in(3) { 30 } else { 0 });
        let sound = errors.rate.get() == 0 && !self.disk.has_failed();
        // Operations may be under way that fail yet.
        let sound = sound && self.storage.queue.iter().all(|(_, _, error)| error.is_none());
        let closed = self.disk.close(self.storage);
        errors.rate.set(0);
        assert!(closed.is_ok() || !sound, "cannot be closed: {closed:?}");
    }
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let mut storage = image(&mut random);
    let errors = Errors::default();
    errors.install(&mut storage, random.clone());
    for number in 0..SESSIONS {
        let mut session = Session::open(&mut storage);
        session.load(&mut random, &errors);
        match random.below(4) {
            0 => {}
            1 => {
                session.finish();
                session.close(&mut random, &errors);
            }
            _ => session.finish(),
        }
        storage.kill(|| random.one_in(2));
        let report = check(&mut storage).expect("the image can be examined");
        assert_eq!(report.corruption_count, 0, "session {number}: {:?}", report.corruptions);
        if !storage.fixed_length {
            assert_eq!(report.leaked_bytes, 0, "session {number}: {:?}", report.leaks);
        }
    }
}

fn seeds() -> Range<u64> {
    let Ok(seeds) = std::env::var("EXD_STRESS_SEEDS") else { return 0..SEEDS };
    let number = |text: &str| text.trim().parse().expect("EXD_STRESS_SEEDS is 500 or 67..68");
    match seeds.split_once("..") {
        Some((first, end)) => number(first)..number(end),
        None => 0..number(&seeds),
    }
}

#[test]
fn p2_p4_p5_p8_requests_end_and_the_image_stays_sound() {
    let failed: Vec<u64> =
        seeds().filter(|&seed| std::panic::catch_unwind(|| run(seed)).is_err()).take(10).collect();
    assert!(failed.is_empty(), "these seeds fail (EXD_STRESS_SEEDS=N..N+1): {failed:?}");
}
