//! P3 with real threads: while a lane's ticket lasts, its place holds its block and nothing else,
//! whatever the engine discards, recycles and writes elsewhere meanwhile.

use exd_image::fast::{Access, Fast};
use exd_image::{
    Completion, CreateOptions, Disk, Done, Geometry, Op, OpenOptions, Request, RequestId, Segment,
    Storage, StorageError, Token, create,
};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// What a request reads or writes at least.
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 96;
/// Words of the file.
const WORDS: usize = 16 << 20 >> 3;

/// How an image is used.
#[derive(Clone, Copy)]
struct Use {
    block_size: u32,
    /// Where the guest's partition begins.
    start: u64,
}

const ALIGNED: Use = Use { block_size: 4096, start: 0 };
const AT_63: Use = Use { block_size: 512, start: 63 * 512 };

/// A file that several threads use at once.
struct File(Vec<AtomicU64>);

/// What all words of a block's data are.
fn stamp(block: u64) -> u64 {
    0x5151_0000_0000_0000 | block
}

impl File {
    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let words = (offset / 8) as usize..((offset + len) / 8) as usize;
        words.flat_map(|word| self.load(word).to_le_bytes()).collect()
    }

    fn load(&self, word: usize) -> u64 {
        self.0.get(word).map_or(0, |word| word.load(SeqCst))
    }

    fn store(&self, word: u64, value: u64) {
        self.0[word as usize].store(value, SeqCst);
    }

    fn zero(&self, offset: u64, len: u64) {
        let end = ((offset + len) / 8).min(WORDS as u64);
        (offset / 8..end).for_each(|word| self.store(word, 0));
    }
}

/// The engine's storage on it. Operations end at once, in order.
struct Host {
    file: Arc<File>,
    len: u64,
    log: Option<Vec<u8>>,
    start: u64,
    /// Requests under way, and where in the partition their data lies.
    requests: HashMap<RequestId, u64>,
    ended: VecDeque<Completion>,
}

impl Host {
    fn write(&mut self, offset: u64, segments: Vec<Segment>) {
        let mut at = offset;
        for segment in segments {
            match &segment {
                Segment::Zero(len) | Segment::Spare(len) => self.file.zero(at, *len),
                Segment::Bytes(bytes) => {
                    for (index, word) in bytes.chunks(8).enumerate() {
                        let value = u64::from_le_bytes(word.try_into().expect("whole words"));
                        self.file.store(at / 8 + index as u64, value);
                    }
                }
                Segment::Request { request, offset, len } => {
                    let start = self.requests[request] + offset;
                    for word in 0..len / 8 {
                        self.file.store(at / 8 + word, stamp((start + word * 8) / BLOCK));
                    }
                }
            }
            at += segment.len();
        }
        self.len = self.len.max(at);
    }
}

impl Storage for Host {
    fn submit(&mut self, token: Token, op: Op) {
        let mut done = Done::Ok;
        match op {
            Op::ReadBytes { offset, len } => done = Done::Bytes(self.file.read(offset, len)),
            Op::Write { offset, segments } => self.write(offset, segments),
            Op::Punch { offset, len } => self.file.zero(offset, len),
            Op::SetLen { len } => self.len = len,
            Op::NextData { .. } => done = Done::Data(None),
            Op::ReadRequest { .. } | Op::Allocate { .. } | Op::Sync => {}
        }
        self.ended.push_back((token, Ok(done)));
    }

    fn wait(&mut self) -> Completion {
        self.ended.pop_front().expect("something is under way")
    }

    fn zero_request(&mut self, _: RequestId, _: u64, _: u64) {}

    fn geometry(&self) -> Geometry {
        Geometry { alignment: 512, host_block: 4096, fixed_length: false }
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        Ok(self.len)
    }

    fn identity(&self) -> [u8; 16] {
        [1; 16]
    }

    fn boot_id(&self) -> [u8; 16] {
        [2; 16]
    }

    fn read_log(&mut self, _: [u8; 16], _: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.log.clone())
    }

    fn create_log(&mut self, _: [u8; 16], _: &[u8], len: usize) -> Result<String, StorageError> {
        self.log = Some(vec![0; len]);
        Ok("/log".into())
    }

    fn store_log(&mut self, _: usize, _: &[u8]) {}

    fn remove_log(&mut self) {
        self.log = None;
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

/// Tells the threads to end, also when the engine's has panicked.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// A thread past the engine. The first wrong word it sees, and how often it could look.
fn look(
    fast: &Arc<Fast>,
    file: &File,
    done: &AtomicBool,
    Use { start, .. }: Use,
    seed: u64,
) -> Result<u64, String> {
    let (mut lane, mut parts, mut state, mut seen) = (fast.lane(), Vec::new(), seed, 0);
    while !done.load(SeqCst) {
        let block = random(&mut state) % BLOCKS;
        let access = if random(&mut state) & 1 == 0 { Access::Read } else { Access::Overwrite };
        parts.clear();
        let Some(ticket) = lane.begin(access, start + block * BLOCK, BLOCK, &mut parts) else {
            std::thread::yield_now();
            continue;
        };
        seen += 1;
        for round in 0..6 {
            let words = parts.iter().flat_map(|part| part.offset / 8..(part.offset + part.len) / 8);
            for word in words.step_by(37) {
                let value = file.load(word as usize);
                if value != stamp(block) {
                    done.store(true, SeqCst);
                    return Err(format!("block {block}: {value:x} at word {word}"));
                }
                if access == Access::Overwrite {
                    file.store(word, value);
                }
            }
            if round % 2 == 1 {
                std::thread::yield_now();
            }
        }
        lane.end(ticket);
    }
    Ok(seen)
}

/// Carries a request out.
fn run(disk: &mut Disk, host: &mut Host, id: u64, request: Request) {
    if let Request::Write { offset, .. } = request {
        host.requests.insert(RequestId(id), offset - host.start);
    }
    disk.submit(host, RequestId(id), request);
    disk.kick(host);
    for tick in 0..200_000 {
        while let Some((token, result)) = host.ended.pop_front() {
            disk.complete(host, token, result);
        }
        if let Some((_, result)) = disk.pop_finished() {
            host.requests.clear();
            return result.expect("the request succeeds");
        }
        // Something waits for a thread.
        std::thread::yield_now();
        disk.tick(host, 1000 * tick);
    }
    panic!("{request:?} hangs");
}

fn trial(usage: Use, requests: u64) -> Result<u64, String> {
    let file = Arc::new(File((0..WORDS).map(|_| AtomicU64::new(0)).collect()));
    let mut host = Host {
        file: Arc::clone(&file),
        len: 0,
        log: None,
        start: usage.start,
        requests: HashMap::new(),
        ended: VecDeque::new(),
    };
    let image = CreateOptions {
        virtual_size: usage.start + BLOCKS * BLOCK,
        block_size: usage.block_size,
        uuid: [5; 16],
        journal_bytes: 65536,
        ..Default::default()
    };
    create(&mut host, &image).expect("create");
    let options = OpenOptions {
        window_bytes: 64 << 10,
        overlay_max: 64,
        journal_max: 256 << 10,
        ..Default::default()
    };
    let mut disk = Disk::open(&mut host, options).expect("open");
    let fast = Fast::new(8192);
    disk.share(&fast).expect("share");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lookers: Vec<_> = (1..3)
            .map(|seed| {
                let (fast, file, done) = (&fast, &file, &done);
                scope.spawn(move || look(fast, file, done, usage, seed * 77))
            })
            .collect();
        let end = End(&done);
        let mut state = 4711;
        for id in 0..requests {
            // Threads that sleep on their tickets make the file grow: freed space waits for them.
            if done.load(SeqCst) || host.len > (WORDS as u64 - 1) * 8 - (4 << 20) {
                break;
            }
            std::thread::yield_now();
            let offset = random(&mut state) % BLOCKS * BLOCK;
            let len = (1 + random(&mut state) % 4) * BLOCK;
            let len = len.min(BLOCKS * BLOCK - offset);
            let offset = usage.start + offset;
            let request = match random(&mut state) % 8 {
                0..4 => Request::Write { offset, len, durable: false },
                4..6 => Request::Discard { offset, len },
                6 => Request::Flush,
                _ => Request::WriteZeroes { offset, len, unmap: true, durable: false },
            };
            run(&mut disk, &mut host, id, request);
        }
        drop(end);
        let mut seen = 0;
        for looker in lookers {
            seen += looker.join().expect("no panic")?;
        }
        Ok(seen)
    })
}

#[test]
fn p3_places_keep_their_blocks_as_long_as_a_ticket_lasts() {
    for usage in [ALIGNED, AT_63] {
        let seen = trial(usage, 10_000).expect("every word belongs to its block");
        assert!(seen > 0, "the threads hardly ran: {seen}");
    }
}

/// The test sees what it is made for.
#[cfg(feature = "seeded-bugs")]
#[test]
fn early_recycling_is_seen() {
    use exd_image::bugs::{Bug, set};
    for (bug, usage) in [(Bug::FastRecyclesEarly, ALIGNED), (Bug::FastShowsDiscarded, AT_63)] {
        set(Some(bug));
        let found = (0..30).find_map(|_| trial(usage, 1000).err());
        set(None);
        assert!(found.is_some(), "{bug:?} is not seen");
    }
}
