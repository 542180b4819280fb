//! Host I/O on the image file.
//!
//! A [`HostIo`] belongs to one thread at a time. Operations are prepared by [`HostIo::start`], which makes
//! no system call, so that it can be called under the image's lock; [`HostIo::enter`] hands them to the
//! kernel: through io_uring ([`uring`]), or through a pool of threads ([`threads`]) where io_uring is
//! forbidden; or by a plain call where the thread has nothing else to do ([`lone`]). What these have in common is
//! here and in [`transfer`].

#![allow(unsafe_code)]

pub mod bounce;
pub mod lone;
pub mod threads;
pub mod transfer;
pub mod uring;

use crate::event::Event;
use crate::io::bounce::{Account, BUDGET_BYTES, Budget};
use crate::io::lone::LoneCalls;
use crate::io::threads::{ThreadPool, Threads};
use crate::io::transfer::{Call, Transfer};
use crate::io::uring::{COMPLETIONS, Ring};
use crate::queue::memory::GuestBuffer;
use clap::ValueEnum;
use exd_file::HostFile;
use exd_image::{Completion, Done, StorageError, Token};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many of the operations that wait a write is compared with.
const NEIGHBOURS: usize = 8;

/// A part of what a write stores.
#[derive(Debug)]
pub enum Part {
    /// So many zero bytes.
    Zero(u64),
    /// Bytes of a guest's buffer.
    Guest {
        /// The buffer.
        buffer: Arc<GuestBuffer>,
        /// First byte in it.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes of our own.
    Bytes(Arc<[u8]>),
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Part::Zero(len) | Part::Guest { len, .. } => *len,
            Part::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// The parts of a write: most have one, for which nothing is allocated.
#[derive(Debug)]
pub enum Parts {
    /// One.
    One(Part),
    /// Any number.
    Many(Vec<Part>),
}

impl std::ops::Deref for Parts {
    type Target = [Part];

    fn deref(&self) -> &[Part] {
        match self {
            Parts::One(part) => std::slice::from_ref(part),
            Parts::Many(parts) => parts,
        }
    }
}

impl From<Part> for Parts {
    fn from(part: Part) -> Self {
        Parts::One(part)
    }
}

impl From<Vec<Part>> for Parts {
    fn from(parts: Vec<Part>) -> Self {
        Parts::Many(parts)
    }
}

/// An operation on the file. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Work {
    /// Reads into memory of our own; ends with [`Done::Bytes`].
    ReadBytes {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Reads into a guest's buffer.
    ReadGuest {
        /// Position in the file.
        offset: u64,
        /// The buffer.
        buffer: Arc<GuestBuffer>,
        /// First byte in it.
        buffer_offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Writes the parts one after another.
    Write {
        /// Position in the file.
        offset: u64,
        /// What to store.
        parts: Parts,
        /// Durable at its end (RWF_DSYNC).
        durable: bool,
        /// So many bytes before and behind may be zeroed as well.
        spare: (u64, u64),
    },
    /// Gives the range back to the host.
    Punch {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Zeroes the range without giving it back.
    Zero {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Reserves space; neither content nor length change.
    Allocate {
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Sets the file's length. Never by a call on the thread that does the rest: the file system waits for
    /// direct I/O that is under way, and the kernel may want that very thread to complete it.
    SetLen {
        /// The new length in bytes.
        len: u64,
    },
    /// fdatasync.
    Sync,
    /// Carried out already; only its end is still to be told.
    Ended(Result<Done, StorageError>),
}

/// Ways to the kernel.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoEngine {
    /// io_uring where it is allowed, else threads
    #[default]
    Auto,
    /// io_uring
    IoUring,
    /// A pool of threads
    Threads,
}

/// How a disk does its I/O. Shared by its threads.
#[derive(Clone, Debug)]
pub struct IoSetup {
    uring: bool,
    pool: Arc<ThreadPool>,
    budget: Arc<Budget>,
}

impl IoSetup {
    /// For a disk on a file with these requirements.
    pub fn new(engine: IoEngine, file: &HostFile) -> Result<IoSetup, String> {
        let uring = match (engine, uring::probe()) {
            (IoEngine::Threads, _) => false,
            (_, Ok(())) => true,
            (IoEngine::IoUring, Err(error)) => return Err(format!("no io_uring: {error}")),
            (IoEngine::Auto, Err(error)) => {
                log::warn!(
                    "io_uring cannot be used here ({error}); a pool of threads does the I/O"
                );
                false
            }
        };
        let alignment = file.memory_alignment().max(file.geometry().alignment);
        let alignment = alignment.max(transfer::HOST_BLOCK) as usize;
        let budget = Arc::new(Budget::new(BUDGET_BYTES, alignment));
        Ok(IoSetup { uring, pool: Arc::default(), budget })
    }
}

/// A thread's way to the file.
pub struct HostIo {
    file: Arc<HostFile>,
    event: Arc<Event>,
    ring: Option<Ring>,
    threads: Threads,
    account: Account,
    transfers: Vec<Transfer>,
    free: Vec<usize>,
    /// Not handed over yet.
    waiting: VecDeque<usize>,
    /// Planned, but there was no bounce memory; they come before those that wait.
    starved: VecDeque<usize>,
    /// In the kernel or among the results, and how many of these with the threads.
    in_kernel: usize,
    with_threads: usize,
    results: Vec<(usize, i32)>,
    lone_calls: LoneCalls,
    ended: VecDeque<Completion>,
}

impl HostIo {
    /// Access to `file` that signals `event` when operations end.
    pub fn new(setup: &IoSetup, file: Arc<HostFile>, event: Arc<Event>) -> io::Result<HostIo> {
        let ring = setup.uring.then(|| Ring::new(file.clone(), &event)).transpose()?;
        Ok(HostIo {
            ring,
            threads: Threads::new(setup.pool.clone(), file.clone(), event.clone()),
            account: Account::new(setup.budget.clone(), event.clone()),
            file,
            event,
            transfers: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            starved: VecDeque::new(),
            in_kernel: 0,
            with_threads: 0,
            results: Vec::new(),
            lone_calls: LoneCalls::default(),
            ended: VecDeque::new(),
        })
    }

    /// Says when a call may be made at once, on the thread that enters. Its end is taken as any other; the
    /// event is not signalled for it.
    pub fn lone_calls(&mut self) -> &mut LoneCalls {
        &mut self.lone_calls
    }

    /// The file.
    #[cfg(test)]
    pub fn file(&self) -> &Arc<HostFile> {
        &self.file
    }

    /// Operations whose end has not been taken.
    pub fn unfinished(&self) -> usize {
        self.under_way() + self.ended.len()
    }

    fn under_way(&self) -> usize {
        self.in_kernel + self.waiting.len() + self.starved.len()
    }

    /// Prepares an operation. Call [`HostIo::enter`] afterwards.
    pub fn start(&mut self, token: Token, work: Work) {
        let transferred = match &work {
            Work::Ended(result) => {
                self.ended.push_back((token, result.clone()));
                return;
            }
            Work::ReadBytes { len, .. } | Work::ReadGuest { len, .. } => Some(*len),
            Work::Write { parts, .. } => Some(parts.iter().map(Part::len).sum()),
            _ => None,
        };
        if transferred == Some(0) {
            let done = match work {
                Work::ReadBytes { .. } => Done::Bytes(Vec::new()),
                _ => Done::Ok,
            };
            self.ended.push_back((token, Ok(done)));
            return;
        }
        let work = match self.join(token, work) {
            Some(work) => work,
            None => return,
        };
        self.begin(token, work, transferred.unwrap_or(0), true);
    }

    fn begin(&mut self, token: Token, work: Work, len: u64, joins: bool) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.transfers.push(Transfer::empty());
            self.transfers.len() - 1
        });
        self.transfers[slot].begin(token, work, len, joins);
        self.waiting.push_back(slot);
    }

    /// Makes a write a part of one that waits and ends where it begins. Returns it if there is none.
    fn join(&mut self, token: Token, work: Work) -> Option<Work> {
        let mut work = work;
        if !matches!(work, Work::Write { durable: false, .. }) {
            return Some(work);
        }
        for slot in self.waiting.iter().rev().take(NEIGHBOURS) {
            work = self.transfers[*slot].join(token, work)?;
        }
        Some(work)
    }

    /// Hands prepared operations over, as many as fit; the rest follows as others end.
    pub fn enter(&mut self) {
        loop {
            let more = self.fill();
            self.threads.submit();
            if let Some(ring) = &mut self.ring
                && !ring.submit()
            {
                // The event brings the owner back here.
                self.event.signal();
                return;
            }
            if !more {
                return;
            }
        }
    }

    /// The same, with ends in hand: whoever waits for these does not wait for a call as well.
    pub fn enter_behind<End>(&mut self, in_hand: &[End]) {
        if !in_hand.is_empty() {
            self.lone_calls.set_alone(false);
        }
        self.enter();
    }

    /// Passes on what there is room for. True if only the submission queue stood in the way of more.
    fn fill(&mut self) -> bool {
        while self.in_kernel < COMPLETIONS {
            if self.ring.as_mut().is_some_and(Ring::is_full) {
                return !(self.waiting.is_empty() && self.starved.is_empty());
            }
            if let Some(slot) = self.starved.front().copied()
                && let Some(loan) = self.account.borrow(self.transfers[slot].need())
            {
                self.starved.pop_front();
                self.transfers[slot].lend(loan);
                self.hand_over(slot);
                continue;
            }
            let Some(slot) = self.waiting.pop_front() else { return false };
            if self.plan(slot) {
                self.hand_over(slot);
            }
        }
        false
    }

    /// Plans the next call of an operation. False if it has to wait for bounce memory.
    fn plan(&mut self, slot: usize) -> bool {
        let transfer = &mut self.transfers[slot];
        transfer.plan(&self.file);
        let need = transfer.need();
        if need == 0 {
            return true;
        }
        if !transfer.is_guests() {
            transfer.lend(self.account.borrow_uncounted(need));
            return true;
        }
        let first = self.starved.is_empty();
        match first.then(|| self.account.borrow(need)).flatten() {
            Some(loan) => transfer.lend(loan),
            None => {
                self.starved.push_back(slot);
                return false;
            }
        }
        true
    }

    /// Makes the call at once and blocks until it returns, if the thread may do that.
    fn call_here(&mut self, slot: usize, call: &Call) -> bool {
        let may_block = matches!(call, Call::Read { .. } | Call::Write { .. } | Call::Sync);
        if !may_block || self.under_way() > 0 || !self.lone_calls.is_wanted() {
            return false;
        }
        let begun = Instant::now();
        // It waits for the disk, and neither for locks nor for space.
        // SAFETY: the call refers to memory that the transfer owns or keeps alive.
        let result = unsafe { threads::perform(call, &self.file, libc::RWF_NOWAIT) };
        // A sync takes no flags: what it says of the data is final, whatever the number (P5).
        let has_flags = !matches!(call, Call::Sync);
        if has_flags && matches!(-result, libc::EAGAIN | libc::EOPNOTSUPP) {
            self.lone_calls.refused();
            return false;
        }
        self.lone_calls.returned(begun.elapsed());
        self.results.push((slot, result));
        self.in_kernel += 1;
        true
    }

    fn hand_over(&mut self, slot: usize) {
        let call = self.transfers[slot].call();
        if self.call_here(slot, &call) {
            return;
        }
        // SAFETY: the call refers to memory that the transfer owns or keeps alive, and neither is touched
        // before the result has been taken. Dropping `self` waits for what is under way.
        unsafe {
            match &mut self.ring {
                Some(ring) if ring.knows(&call) => ring.push(slot, call),
                _ => {
                    self.threads.push(slot, call);
                    self.with_threads += 1;
                }
            }
        }
        self.in_kernel += 1;
    }

    /// There are ends to be taken of which no event tells.
    pub fn has_results(&self) -> bool {
        !self.results.is_empty()
    }

    /// Takes what has ended. Call [`HostIo::enter`] afterwards: some may have to go on.
    pub fn reap(&mut self, ends: &mut Vec<Completion>) {
        self.take_results();
        ends.extend(self.ended.drain(..));
    }

    fn take_results(&mut self) {
        let mut results = std::mem::take(&mut self.results);
        if self.with_threads > 0 {
            let before = results.len();
            self.threads.reap(&mut results);
            self.with_threads -= results.len() - before;
        }
        if let Some(ring) = &mut self.ring {
            ring.reap(&mut results);
        }
        for (slot, result) in results.drain(..) {
            self.step(slot, result);
        }
        self.results = results;
    }

    /// Deals with the result of a call: the operation ends or goes on.
    fn step(&mut self, slot: usize, result: i32) {
        self.in_kernel -= 1;
        let transfer = &mut self.transfers[slot];
        let end = transfer.advance(result, &self.file);
        if let Some(loan) = transfer.take_loan() {
            self.account.give_back(loan);
        }
        let Some(end) = end else {
            self.waiting.push_back(slot);
            return;
        };
        let mut apart = Vec::new();
        match end {
            Err(_) if transfer.has_joined() => apart = transfer.take_apart(),
            end => transfer.tell(&end, &mut self.ended),
        }
        transfer.clear();
        self.free.push(slot);
        for (token, work, len) in apart {
            self.begin(token, work, len, false);
        }
    }

    /// Blocks until an operation has ended; one must be under way.
    pub fn wait(&mut self) -> Completion {
        loop {
            if let Some(end) = self.ended.pop_front() {
                return end;
            }
            assert!(self.under_way() > 0, "nothing to wait for");
            self.wait_for_results();
        }
    }

    /// Blocks until some call has returned, and deals with it.
    fn wait_for_results(&mut self) {
        self.fill();
        if !self.results.is_empty() {
            return self.take_results();
        }
        self.threads.submit();
        let in_ring = self.in_kernel - self.with_threads;
        match &mut self.ring {
            _ if self.in_kernel == 0 => self.account.wait(),
            Some(ring) if self.with_threads == 0 => ring.wait(),
            Some(ring) if in_ring > 0 => {
                // Both: rare and short (a change of length on an old kernel).
                ring.submit();
                self.threads.wait(Duration::from_millis(1));
            }
            _ => self.threads.wait(Duration::from_secs(1)),
        }
        self.take_results();
    }
}

impl Drop for HostIo {
    /// The kernel must not write into memory that is gone.
    fn drop(&mut self) {
        while self.under_way() > 0 {
            self.wait_for_results();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::{memory, piece};
    use exd_file::OpenMode;
    use std::path::Path;

    struct Bench {
        _dir: tempfile::TempDir,
        io: HostIo,
        next: u64,
    }

    impl Bench {
        fn new(engine: IoEngine, direct: bool) -> Bench {
            // The current directory, since direct I/O does not work everywhere.
            let dir = tempfile::tempdir_in(".").expect("temporary directory");
            let file = HostFile::create_new(&dir.path().join("f"), direct).expect("create");
            let event = Arc::new(Event::new().expect("event"));
            let setup = IoSetup::new(engine, &file).expect("set up");
            let io = HostIo::new(&setup, Arc::new(file), event).expect("set up");
            Bench { _dir: dir, io, next: 0 }
        }

        fn run(&mut self, work: Work) -> Result<Done, StorageError> {
            self.next += 1;
            self.io.start(Token(self.next), work);
            let (token, end) = self.io.wait();
            assert_eq!(token, Token(self.next));
            end
        }

        fn content(&self, offset: u64, len: usize) -> Vec<u8> {
            let path: &Path = self.io.file().path();
            let file = HostFile::open(path, OpenMode::default()).expect("open");
            let mut bytes = vec![0xaa; len];
            file.read_at(offset, &mut bytes).expect("read");
            bytes
        }
    }

    const ENGINES: [IoEngine; 2] = [IoEngine::IoUring, IoEngine::Threads];

    /// Both ways to the kernel, with direct I/O and without.
    fn benches() -> impl Iterator<Item = Bench> {
        ENGINES
            .into_iter()
            .flat_map(|engine| [true, false].map(|direct| Bench::new(engine, direct)))
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 + i / 512) as u8).collect()
    }

    /// A buffer in guest memory of the pieces (address, length), filled with a pattern.
    fn guest(pieces: &[(u64, u32)]) -> (Arc<GuestBuffer>, Vec<u8>) {
        let pieces: Vec<_> = pieces.iter().map(|(addr, len)| piece(*addr, *len, true)).collect();
        let buffer = Arc::new(GuestBuffer::new(memory(), &pieces).expect("in memory"));
        let data = pattern(buffer.len() as usize);
        buffer.copy_from(0, &data);
        (buffer, data)
    }

    fn whole(buffer: &Arc<GuestBuffer>) -> Part {
        Part::Guest { buffer: buffer.clone(), offset: 0, len: buffer.len() }
    }

    const LAYOUTS: [&[(u64, u32)]; 6] = [
        &[(0x1000, 4096)],
        &[(0x1200, 512), (0x3000, 3584)],
        // Not aligned in memory.
        &[(0x1001, 4096)],
        &[(0x1000, 512), (0x2004, 1024), (0x5000, 2560)],
        // Lengths that are no multiple of a sector.
        &[(0x1000, 100), (0x2000, 412)],
        &[(0x1000, 512), (0x2000, 1), (0x3003, 1535), (0x10_0000, 40000), (0x6000, 448)],
    ];

    /// Padding makes whole blocks of a write, but not of its pieces of memory: that is no write of whole blocks
    /// for the host. More than one buffer's worth of it as well.
    #[test]
    fn padded_writes_are_whole_blocks_in_memory_too() {
        let (buffer, data) = guest(&[(0x1000, 0xf000)]);
        let data = data.repeat(5);
        let work = |offset| {
            let mut parts = vec![Part::Zero(3584)];
            parts.extend((0..5).map(|_| whole(&buffer)));
            parts.push(Part::Zero(512));
            Work::Write { offset, parts: parts.into(), durable: false, spare: (0, 0) }
        };
        let len = data.len() as u64 + 4096;
        let bounced = |bench: &Bench, offset| {
            let mut transfer = Transfer::empty();
            transfer.begin(Token(0), work(offset), len, false);
            transfer.plan(bench.io.file());
            transfer.need()
        };
        for (mut bench, direct) in benches().zip([true, false, true, false]) {
            if direct {
                assert_eq!(
                    bounced(&bench, 8192),
                    bounce::BOUNCE_BYTES,
                    "as much as one call takes"
                );
                assert_eq!(bounced(&bench, 8704), 0, "a part of a block has written space");
            } else {
                assert_eq!(bounced(&bench, 8192), 0, "the page cache takes anything");
            }
            assert_eq!(bench.run(work(8192)), Ok(Done::Ok));
            let content = bench.content(8192, len as usize);
            assert!(content[..3584].iter().chain(&content[len as usize - 512..]).all(|b| *b == 0));
            assert!(content[3584..len as usize - 512] == data);
        }
    }

    /// Of a padded write whose data is aligned on the host as it is in memory, only the blocks that it shares
    /// with padding are copied; and what goes on inside a block is a part of a write of whole blocks.
    #[test]
    fn whole_blocks_of_padded_writes_are_not_copied() {
        let (buffer, data) = guest(&[(0x1000, 0xf000)]);
        let len = data.len() as u64;
        let data = data.repeat(2);
        let part = |offset, len| Part::Guest { buffer: buffer.clone(), offset, len };
        let write = |offset, parts: Vec<Part>| {
            let parts = parts.into();
            Work::Write { offset, parts, durable: false, spare: (0, 0) }
        };
        // A call of the one operation that waits, and how much of it is copied.
        let copied = |bench: &mut Bench| {
            assert_eq!(bench.io.waiting.len(), 1, "one call");
            let slot = bench.io.waiting[0];
            bench.io.transfers[slot].plan(&bench.io.file);
            bench.io.transfers[slot].need()
        };
        for (mut bench, direct) in benches().zip([true, false, true, false]) {
            let rest = [part(512, len - 512), part(0, len)];
            let [a, b] = [part(512, len - 512), part(0, len)];
            bench.io.start(Token(0), write(8192, vec![Part::Zero(512), a, b, Part::Zero(4096)]));
            assert_eq!(copied(&mut bench), if direct { 4096 } else { 0 });
            assert_eq!(bench.io.wait(), (Token(0), Ok(Done::Ok)));
            let content = bench.content(8192, data.len() + 4096);
            assert!(content[512..data.len()] == data[512..]);
            assert!(content[..512].iter().chain(&content[data.len()..]).all(|byte| *byte == 0));
            // The head comes first, as an overwrite; the two are more than other neighbours may be.
            bench.io.start(Token(1), write(8192, vec![part(0, 512)]));
            bench.io.start(Token(2), write(8192 + 512, rest.into()));
            assert_eq!(copied(&mut bench), 0);
            let ends = [bench.io.wait(), bench.io.wait()];
            assert_eq!(ends, [1, 2].map(|number| (Token(number), Ok(Done::Ok))));
            assert!(bench.content(8192, data.len()) == data);
        }
    }

    #[test]
    fn writes_and_reads_of_any_layout() {
        for mut bench in benches() {
            for layout in LAYOUTS {
                let (buffer, data) = guest(layout);
                assert_eq!(data.len() % 512, 0, "a request is made of sectors");
                let own: Arc<[u8]> = pattern(1536).into();
                let parts = vec![
                    Part::Zero(512),
                    whole(&buffer),
                    Part::Bytes(own.clone()),
                    Part::Zero(512),
                ];
                let done = bench.run(Work::Write {
                    offset: 8192,
                    parts: parts.into(),
                    durable: false,
                    spare: (0, 0),
                });
                assert_eq!(done, Ok(Done::Ok));
                let len = data.len() + 2560;
                let expected = [&[0; 512], data.as_slice(), &own, &[0; 512]].concat();
                assert_eq!(bench.content(8192, len), expected);
                buffer.zero(0, buffer.len());
                let read = Work::ReadGuest {
                    offset: 8192 + 512,
                    buffer: buffer.clone(),
                    buffer_offset: 0,
                    len: buffer.len(),
                };
                assert_eq!(bench.run(read), Ok(Done::Ok));
                let mut back = vec![0; data.len()];
                buffer.copy_to(0, &mut back);
                assert!(back == data, "{layout:?}");
                let bytes = bench.run(Work::ReadBytes { offset: 8192, len: len as u64 });
                assert_eq!(bytes, Ok(Done::Bytes(expected)));
            }
        }
    }

    #[test]
    fn more_pieces_and_bytes_than_one_transfer_takes() {
        for engine in ENGINES {
            let mut bench = Bench::new(engine, true);
            let (buffer, data) = guest(&[(0x1001, 512)]);
            // 3000 unaligned parts, then zeroes beyond what 1024 pieces of 64 KiB hold.
            let mut parts: Vec<Part> = (0..3000).map(|_| whole(&buffer)).collect();
            parts.push(Part::Zero(80 << 20));
            parts.push(whole(&buffer));
            assert_eq!(
                bench.run(Work::Write {
                    offset: 0,
                    parts: parts.into(),
                    durable: true,
                    spare: (0, 0)
                }),
                Ok(Done::Ok)
            );
            let content = bench.content(0, 3000 * 512);
            assert!(content.chunks(512).all(|chunk| chunk == data));
            let end = 3000 * 512 + (80 << 20);
            assert_eq!(bench.content(end, 512), data);
            assert_eq!(bench.io.file().len().expect("length"), end + 512);
            let long = bench.run(Work::ReadBytes { offset: 0, len: 3000 * 512 });
            assert_eq!(long, Ok(Done::Bytes(content)));
        }
    }

    /// P8: a block of the host in more pieces of memory than one call takes. A guest can do that.
    #[test]
    fn p8_a_block_of_single_bytes() {
        let layout: Vec<_> = (0..512).map(|i| (0x1001 + 2 * i, 1)).collect();
        let (buffer, data) = guest(&layout);
        for mut bench in benches() {
            let mut parts: Vec<Part> = (0..16).map(|_| whole(&buffer)).collect();
            parts.push(Part::Zero(8192));
            let parts = parts.into();
            let work = Work::Write { offset: 8192, parts, durable: false, spare: (0, 0) };
            assert_eq!(bench.run(work), Ok(Done::Ok));
            let expected = [data.repeat(16), vec![0; 8192]].concat();
            assert!(bench.content(8192, expected.len()) == expected);
        }
    }

    #[test]
    fn reads_past_the_end_are_zeroes() {
        for mut bench in benches() {
            bench.io.file().set_len(1000).expect("grow");
            let (buffer, _) = guest(&[(0x1000, 2048)]);
            let read = Work::ReadGuest {
                offset: 512,
                buffer: buffer.clone(),
                buffer_offset: 0,
                len: 2048,
            };
            assert_eq!(bench.run(read), Ok(Done::Ok));
            let mut back = vec![1; 2048];
            buffer.copy_to(0, &mut back);
            assert!(back.iter().all(|byte| *byte == 0));
            let bytes = bench.run(Work::ReadBytes { offset: 1 << 30, len: 1024 });
            assert_eq!(bytes, Ok(Done::Bytes(vec![0; 1024])));
            let bytes = bench.run(Work::ReadBytes { offset: 0, len: 5120 });
            assert_eq!(bytes, Ok(Done::Bytes(vec![0; 5120])));
        }
    }

    #[test]
    fn space_and_sync() {
        for engine in ENGINES {
            let mut bench = Bench::new(engine, true);
            let (buffer, _) = guest(&[(0x1000, 8192)]);
            let parts = vec![whole(&buffer)];
            bench
                .run(Work::Write { offset: 0, parts: parts.into(), durable: false, spare: (0, 0) })
                .expect("write");
            bench.run(Work::Punch { offset: 0, len: 4096 }).expect("punch");
            assert!(bench.content(0, 4096).iter().all(|byte| *byte == 0));
            bench.run(Work::Allocate { offset: 0, len: 1 << 20 }).expect("allocate");
            assert_eq!(bench.io.file().len().expect("length"), 8192);
            bench.run(Work::Sync).expect("sync");
            bench.run(Work::SetLen { len: 4096 }).expect("cut");
            assert_eq!(bench.io.file().len().expect("length"), 4096);
            let ended = bench.run(Work::Ended(Err(StorageError::NoSpace)));
            assert_eq!(ended, Err(StorageError::NoSpace));
            assert_eq!(
                bench.run(Work::Write {
                    offset: 0,
                    parts: Vec::new().into(),
                    durable: false,
                    spare: (0, 0)
                }),
                Ok(Done::Ok)
            );
        }
    }

    /// A thread that has nothing else to do makes its call itself; its end comes as any other.
    #[test]
    fn a_lone_call_is_made_at_once() {
        for mut bench in benches() {
            bench.io.start(Token(0), Work::Sync);
            bench.io.enter();
            assert!(!bench.io.has_results(), "nobody has allowed it");
            assert_eq!(bench.io.wait(), (Token(0), Ok(Done::Ok)));

            bench.io.lone_calls().set_alone(true);
            bench.io.start(Token(1), Work::Sync);
            bench.io.enter();
            assert!(bench.io.has_results());
            let mut ends = Vec::new();
            bench.io.reap(&mut ends);
            assert_eq!(ends, [(Token(1), Ok(Done::Ok))]);
            assert!(!bench.io.has_results() && bench.io.unfinished() == 0);

            let (buffer, data) = guest(&[(0x1000, 4096)]);
            let parts = whole(&buffer).into();
            let write = Work::Write { offset: 0, parts, durable: false, spare: (0, 0) };
            bench.io.start(Token(2), write);
            bench.io.start(Token(3), Work::Sync);
            bench.io.enter();
            assert!(!bench.io.has_results(), "a write is under way");
            let mut tokens = [bench.io.wait(), bench.io.wait()].map(|(token, _)| token);
            tokens.sort_unstable();
            assert_eq!(tokens, [Token(2), Token(3)]);

            bench.io.start(Token(4), Work::Sync);
            assert_eq!(bench.io.wait(), (Token(4), Ok(Done::Ok)));

            buffer.zero(0, buffer.len());
            let read = Work::ReadGuest { offset: 0, buffer, buffer_offset: 0, len: 4096 };
            bench.io.start(Token(5), read);
            bench.io.enter();
            assert!(bench.io.has_results() || !bench.io.file().is_direct());
            assert_eq!(bench.io.wait(), (Token(5), Ok(Done::Ok)));
            assert_eq!(bench.content(0, 4096), data);

            // One has returned; more are handed over before anybody takes its end.
            *bench.io.lone_calls() = LoneCalls::default();
            bench.io.lone_calls().set_alone(true);
            for (number, work) in [Work::Sync, Work::Sync, Work::Punch { offset: 0, len: 4096 }]
                .into_iter()
                .enumerate()
            {
                bench.io.start(Token(6 + number as u64), work);
                bench.io.enter();
            }
            let mut tokens = [(); 3].map(|()| bench.io.wait().0);
            tokens.sort_unstable();
            assert_eq!(tokens, [6, 7, 8].map(Token));
            assert_eq!((bench.io.in_kernel, bench.io.with_threads), (0, 0));

            bench.io.start(Token(9), Work::Punch { offset: 0, len: 4096 });
            bench.io.enter();
            assert!(!bench.io.has_results(), "it waits for others' I/O");
            assert_eq!(bench.io.wait(), (Token(9), Ok(Done::Ok)));
        }
    }

    #[test]
    fn many_at_once() {
        for engine in ENGINES {
            let mut bench = Bench::new(engine, true);
            let (buffer, data) = guest(&[(0x1000, 512)]);
            for i in 0..2000 {
                let parts = vec![whole(&buffer)];
                bench.io.start(
                    Token(i),
                    Work::Write {
                        offset: i * 512,
                        parts: parts.into(),
                        durable: false,
                        spare: (0, 0),
                    },
                );
            }
            bench.io.enter();
            let mut seen: Vec<u64> = Vec::new();
            while bench.io.unfinished() > 0 {
                let (token, end) = bench.io.wait();
                assert_eq!(end, Ok(Done::Ok));
                seen.push(token.0);
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..2000).collect::<Vec<_>>());
            assert!(bench.content(0, 2000 * 512).chunks(512).all(|chunk| chunk == data));
        }
    }

    /// Writes that wait and lie one behind the other are one for the host, also across zeroes that may be
    /// written; each has its end, and the bytes are where they belong.
    #[test]
    fn neighbours_are_written_together() {
        for mut bench in benches() {
            let (buffer, data) = guest(&[(0x1000, 4096)]);
            let write = |offset, spare| {
                let parts = whole(&buffer).into();
                Work::Write { offset, parts, durable: false, spare }
            };
            // Two neighbours; one with a gap that may be zeroed, one with a gap that may not.
            let offsets = [0, 4096, 12288, 24576];
            let spares = [(0, 0), (0, 1024), (3072, 0), (3072, 4096)];
            for (number, (offset, spare)) in offsets.into_iter().zip(spares).enumerate() {
                bench.io.start(Token(number as u64), write(offset, spare));
            }
            assert_eq!(bench.io.waiting.len(), 2, "calls to the host");
            let mut tokens: Vec<_> = (0..4).map(|_| bench.io.wait()).collect();
            tokens.sort_unstable_by_key(|(token, _)| *token);
            let expected: Vec<_> = (0..4).map(|number| (Token(number), Ok(Done::Ok))).collect();
            assert_eq!(tokens, expected);
            for offset in offsets {
                assert_eq!(bench.content(offset, 4096), data, "at {offset}");
            }
            assert_eq!(bench.content(8192, 4096), vec![0; 4096]);
        }
    }

    /// When the host refuses several writes carried out as one, each is tried by itself: a bad sector is
    /// no error of its neighbours.
    #[test]
    fn neighbours_that_fail_together_are_tried_alone() {
        let mut bench = Bench::new(IoEngine::Threads, true);
        let (buffer, data) = guest(&[(0x1000, 4096)]);
        for (number, offset) in [(1, 8192), (2, 12288), (3, 16384)] {
            let parts = whole(&buffer).into();
            let work = Work::Write { offset, parts, durable: false, spare: (4096, 4096) };
            bench.io.start(Token(number), work);
        }
        let slot = bench.io.waiting.pop_front().expect("they wait");
        assert!(bench.io.waiting.is_empty(), "they are one");
        bench.io.transfers[slot].plan(&bench.io.file);
        bench.io.in_kernel += 1;
        bench.io.step(slot, -libc::EIO);
        assert!(bench.io.ended.is_empty(), "nobody is told of an error yet");
        assert_eq!(bench.io.waiting.len(), 3);
        let mut tokens: Vec<_> = (0..3).map(|_| bench.io.wait()).collect();
        tokens.sort_unstable_by_key(|(token, _)| *token);
        assert_eq!(tokens, [1, 2, 3].map(|number| (Token(number), Ok(Done::Ok))));
        assert_eq!(bench.content(8192, 12288), [&data[..]; 3].concat());
    }

    /// P8: however much a guest has unaligned in memory at once, the bounce memory is bounded; the engine's
    /// own data passes, and all of it gets done.
    #[test]
    fn p8_bounce_memory_is_bounded_and_shared_in_turns() {
        for engine in ENGINES {
            let mut bench = Bench::new(engine, true);
            let file = bench.io.file().clone();
            let setup = IoSetup {
                budget: Arc::new(Budget::new(1 << 20, 4096)),
                ..IoSetup::new(engine, &file).expect("set up")
            };
            let event = || Arc::new(Event::new().expect("event"));
            let mut ios =
                [(); 2].map(|()| HostIo::new(&setup, file.clone(), event()).expect("set up"));
            let (buffer, data) = guest(&[(0x1001, 32768), (0x10_0001, 32768)]);
            for (thread, io) in ios.iter_mut().enumerate() {
                for i in 0..100 {
                    let offset = (thread as u64 * 100 + i) * 65536;
                    let work = Work::Write {
                        offset,
                        parts: whole(&buffer).into(),
                        durable: false,
                        spare: (0, 0),
                    };
                    io.start(Token(i), work);
                }
                io.enter();
                assert!(setup.budget.used() <= 1 << 20, "no more than the budget");
            }
            assert!(
                ios.iter().all(|io| !io.starved.is_empty()),
                "the test means nothing otherwise"
            );
            let parts = vec![Part::Bytes(pattern(4096).into())];
            bench.io = HostIo::new(&setup, file.clone(), event()).expect("set up");
            let own = bench.run(Work::Write {
                offset: 100 << 20,
                parts: parts.into(),
                durable: true,
                spare: (0, 0),
            });
            assert_eq!(own, Ok(Done::Ok));
            // Taking turns: the first cannot hold the second up for ever, nor the other way round.
            let mut ended = [0; 2];
            while ended != [100, 100] {
                for (io, ended) in ios.iter_mut().zip(&mut ended) {
                    let mut ends = Vec::new();
                    io.reap(&mut ends);
                    io.enter();
                    assert!(ends.iter().all(|(_, end)| *end == Ok(Done::Ok)));
                    *ended += ends.len();
                }
                assert!(setup.budget.used() <= 1 << 20);
                std::thread::yield_now();
            }
            assert_eq!(setup.budget.used(), 0);
            assert!(bench.content(0, 200 << 16).chunks(65536).all(|chunk| chunk == data));
        }
    }
}
