//! Streams and pairs of writes at any sector, with others who want the blocks where they end: of what has completed
//! nothing is lost, in any order of completions, and whatever has landed when the process dies.

mod common;

use common::{Memory, Random, Rig, check_killed, small_image};
use exd_image::blocking::BufferRegistry;
use exd_image::{Disk, OpenOptions, Request, RequestId, ZeroAhead};
use std::collections::HashMap;

const SECTORS: usize = 2048;
const SIZE: u64 = 64 << 20;

struct Guest {
    disk: Disk,
    storage: Memory,
    /// What a sector may hold; 0xff: anything, since several requests cleared it at once.
    sectors: Vec<Vec<u8>>,
    /// Requests under way for a sector.
    busy: Vec<u32>,
    under_way: HashMap<RequestId, (std::ops::Range<usize>, Option<u8>)>,
    next: u64,
    /// Where the stream is.
    at: u64,
}

impl Guest {
    fn reap(&mut self) {
        while let Some((id, outcome)) = self.disk.pop_finished() {
            assert_eq!(outcome, Ok(()));
            self.storage.take(id);
            let Some((range, value)) = self.under_way.remove(&id) else { continue };
            for sector in range {
                self.busy[sector] -= 1;
                let alone = self.busy[sector] == 0 && !self.sectors[sector].contains(&0xff);
                if let (Some(value), true) = (value, alone) {
                    self.sectors[sector] = vec![value];
                }
            }
        }
    }

    fn step(&mut self) -> bool {
        self.reap();
        let Some((token, result)) = self.storage.step() else { return false };
        self.disk.complete(&mut self.storage, token, result);
        self.reap();
        true
    }

    fn submit(&mut self, request: Request, data: Vec<u8>) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        self.storage.put(id, data);
        self.disk.submit(&mut self.storage, id, request);
        id
    }

    fn write(&mut self, range: std::ops::Range<usize>) {
        if range.is_empty() || range.clone().any(|sector| self.busy[sector] > 0) {
            return;
        }
        let value = (self.next % 250) as u8 + 1;
        for sector in range.clone() {
            self.busy[sector] += 1;
            // What it was, which is among these, or this.
            self.sectors[sector].retain(|value| *value != 0xff);
            self.sectors[sector].push(value);
        }
        let (offset, len) = (range.start as u64 * 512, range.len() as u64 * 512);
        let id = RequestId(self.next);
        self.under_way.insert(id, (range, Some(value)));
        self.submit(Request::Write { offset, len, durable: false }, vec![value; len as usize]);
    }

    fn clear(&mut self, range: std::ops::Range<usize>, zero: bool, unmap: bool) {
        for sector in range.clone() {
            self.busy[sector] += 1;
            if self.busy[sector] > 1 {
                // Several at once.
                self.sectors[sector].push(0xff);
            }
            self.sectors[sector].push(0);
        }
        let (offset, len) = (range.start as u64 * 512, range.len() as u64 * 512);
        let id = RequestId(self.next);
        self.under_way.insert(id, (range, if zero { Some(0) } else { None }));
        let request = match zero {
            true => Request::WriteZeroes { offset, len, unmap, durable: false },
            false => Request::Discard { offset, len },
        };
        self.submit(request, Vec::new());
    }

    fn verify(&mut self, what: &str) {
        let len = SECTORS as u64 * 512;
        let id = RequestId(self.next);
        self.next += 1;
        self.storage.put(id, vec![0; len as usize]);
        self.disk.submit(&mut self.storage, id, Request::Read { offset: 0, len });
        self.disk.kick(&mut self.storage);
        let data = loop {
            if let Some((done, outcome)) = self.disk.pop_finished() {
                assert_eq!(outcome, Ok(()));
                let data = self.storage.take(done);
                if done == id {
                    break data;
                }
                continue;
            }
            let (token, result) = self.storage.step().expect("reads end");
            self.disk.complete(&mut self.storage, token, result);
        };
        for (sector, allowed) in self.sectors.iter().enumerate() {
            let found = &data[sector * 512..][..512];
            let whole = found.iter().all(|byte| *byte == found[0]);
            assert!(
                whole && (allowed.contains(&found[0]) || allowed.contains(&0xff)),
                "{what}: sector {sector} holds {} and not {allowed:?}",
                found[0]
            );
        }
    }
}

fn settings(random: &mut Random) -> (Memory, exd_image::CreateOptions, OpenOptions) {
    let mut storage = Memory { shuffle: Some(random.clone()), ..Default::default() };
    let block_size = random.pick(&[4096, 4096, 65536, 8192, 2048, 512]);
    storage.keep_spare = random.one_in(2);
    if random.one_in(4) && block_size >= 4096 {
        storage.alignment = 4096;
    }
    storage.host_block = random.pick(&[4096, 4096, 65536]);
    if random.one_in(6) {
        storage.file = vec![0x77; 48 << 20];
        storage.fixed_length = true;
    }
    let mut image = small_image(SIZE);
    image.block_size = block_size;
    let options = OpenOptions {
        window_bytes: random.pick(&[256 << 10, 1 << 20, 16 << 20]),
        zero_ahead: random.pick(&[
            ZeroAhead::Off,
            ZeroAhead::Off,
            ZeroAhead::Zero,
            ZeroAhead::Falloc,
        ]),
        zero_ahead_bytes: random.pick(&[64 << 10, 1 << 20]),
        zero_ahead_write_max: random.pick(&[0, 4096, 64 << 10]),
        zero_ahead_burst: random.pick(&[16 << 10, 1 << 20]),
        ..Default::default()
    };
    (storage, image, options)
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    random.below(10);
    let (storage, image, options) = settings(&mut random);
    let block = image.block_size as usize / 512;
    let rig = Rig::on(storage, &image, options.clone());
    let Rig { storage, disk, .. } = rig;
    let mut guest = Guest {
        disk,
        storage,
        sectors: vec![vec![0]; SECTORS],
        busy: vec![0; SECTORS],
        under_way: HashMap::new(),
        next: 1,
        at: 63,
    };
    let mut now = 0;
    let mut gaps: Vec<std::ops::Range<usize>> = Vec::new();
    for _ in 0..400 {
        for _ in 0..random.below(4) {
            let at = guest.at as usize;
            match random.below(26) {
                20..23 => {
                    // Two that become one, with a gap in the block where they end.
                    let end = at + 8 * random.below(4) as usize + 8;
                    let (from, to) = (end - 1 - random.below(4) as usize, end);
                    let gap = from - 1 - random.below(2) as usize;
                    if end < SECTORS {
                        guest.write(at..gap);
                        guest.write(from..to);
                        gaps.push(gap..from);
                        guest.at = end as u64;
                    }
                }
                23.. => {
                    let last = gaps.len().saturating_sub(random.below(2) as usize + 1);
                    if let Some(gap) = gaps.get(last).cloned() {
                        guest.write(gap);
                    }
                }
                0..9 => {
                    let len = random.pick(&[8, 8, 1, 16, 7, 24, 128]).min(SECTORS - at);
                    guest.write(at..at + len);
                    guest.at = (at + len) as u64;
                    if at + len >= SECTORS - 1 || random.one_in(30) {
                        guest.at = random.pick(&[63, 0, 63 + 256, 1024 + 5]);
                    }
                }
                9..13 => {
                    // Behind what the stream leaves, with a gap or without one.
                    let from = (at + random.below(6) as usize).min(SECTORS - 1);
                    let to = (from + 1 + random.below(8) as usize).min(SECTORS);
                    guest.write(from..to);
                    if random.one_in(2) {
                        guest.at = (to % (SECTORS - 1)) as u64;
                    }
                }
                13..15 => {
                    let from = at.saturating_sub(1 + random.below(2 * block as u64) as usize);
                    guest.write(from..(from + 1 + random.below(5) as usize).min(SECTORS));
                }
                15 | 16 => {
                    let from = at.saturating_sub(random.below(3) as usize * block) / block * block;
                    let to = (from + block * (1 + random.below(2) as usize)).min(SECTORS);
                    let (zero, unmap) = (random.one_in(2), random.one_in(2));
                    guest.clear(from..to, zero, unmap);
                }
                17 => {
                    guest.submit(Request::Flush, Vec::new());
                }
                18 => {
                    guest.submit(Request::Defragment { offset: 0, len: 1 << 20 }, Vec::new());
                }
                _ => {
                    let request = random.pick(&[Request::Checkpoint, Request::Flush]);
                    guest.submit(request, Vec::new());
                }
            }
            if random.one_in(8) {
                guest.disk.send_staged(&mut guest.storage);
            }
        }
        guest.disk.kick(&mut guest.storage);
        for _ in 0..random.below(8) {
            guest.step();
        }
        if random.one_in(10) {
            now += 300;
            guest.disk.tick(&mut guest.storage, now);
        }
    }
    let report = check_killed(&guest.storage);
    assert_eq!((report.corruption_count, report.leaked_bytes), (0, 0), "seed {seed}");
    // A death of the process, with what is under way landing or not.
    let mut copy = guest.storage.killed();
    copy.queue = guest.storage.queue.iter().cloned().collect();
    copy.buffers = guest.storage.buffers.clone();
    let mut lands = random.clone();
    copy.kill(|| lands.one_in(2));
    let disk = Disk::open(&mut copy, options.clone()).expect("it opens");
    let mut after = Guest {
        disk,
        storage: copy,
        sectors: guest.sectors.clone(),
        busy: vec![0; SECTORS],
        under_way: HashMap::new(),
        next: 1 << 40,
        at: 0,
    };
    after.verify(&format!("seed {seed}, after a death"));
    for _ in 0..60 {
        while guest.step() {}
        if guest.under_way.is_empty() {
            break;
        }
        now += 1000;
        guest.disk.tick(&mut guest.storage, now);
    }
    assert!(guest.under_way.is_empty(), "seed {seed} hangs");
    guest.verify(&format!("seed {seed}"));
    guest.disk.close(&mut guest.storage).expect("it closes");
    let report = exd_image::check::check(&mut guest.storage).expect("examined");
    assert!(report.is_clean(), "seed {seed}: {report:?}");
}

/// P2, P4, P7. `EXD_SEEDS` is how many seeds are tried, if not 200.
#[test]
fn p7_random_streams_lose_nothing() {
    let seeds = std::env::var("EXD_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    for seed in 0..seeds.unwrap_or(200) {
        run(seed);
    }
}
