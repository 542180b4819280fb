//! Host I/O through io_uring.
//!
//! A [`Uring`] belongs to one thread at a time. Operations are prepared by [`Uring::start`], which makes
//! no system call, so that it can be called under the image's lock; [`Uring::enter`] hands them to the
//! kernel. What direct I/O cannot take as it is (memory or pieces that are not aligned) goes through a
//! bounce buffer, in bounded chunks. Short transfers are continued here.

#![allow(unsafe_code)]

use crate::event::Event;
use crate::queue::memory::{GuestBuffer, HostRange};
use exd_file::{AlignedBuf, HostFile, storage_error};
use exd_image::{Completion, Done, StorageError, Token};
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Entries of the submission queue.
const ENTRIES: u32 = 256;
/// Entries of the completion queue, and so the most operations in the kernel; more wait in front.
const COMPLETIONS: u32 = 4 * ENTRIES;
/// Most pieces of memory in one operation (the kernel's UIO_MAXIOV).
const PIECES_MAX: usize = 1024;
/// Most bytes that go through a bounce buffer at once.
const BOUNCE_BYTES: usize = 256 << 10;
/// How often an operation is tried again that the kernel refuses with EAGAIN.
const TRIES_MAX: u32 = 10_000;

#[repr(align(65536))]
struct Zeroes([u8; 65536]);
static ZEROES: Zeroes = Zeroes([0; 65536]);

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
        parts: Vec<Part>,
        /// Durable at its end (RWF_DSYNC).
        durable: bool,
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
    /// Sets the file's length. Never by a call of our own: the file system waits for direct I/O that is
    /// under way, and the kernel may want this very thread to complete that (Linux before 6.9 has no
    /// such operation: it fails).
    SetLen {
        /// The new length in bytes.
        len: u64,
    },
    /// fdatasync.
    Sync,
    /// Carried out already; only its end is still to be told.
    Ended(Result<Done, StorageError>),
}

/// An operation under way.
#[derive(Debug)]
struct Running {
    token: Token,
    work: Work,
    /// Bytes of it that are done.
    done: u64,
    len: u64,
    tries: u32,
    /// Of the transfer in the kernel now: where it starts in the operation (less for a read that had to
    /// start earlier in the file), its pieces and what went through the bounce buffer.
    lead: u64,
    span: u64,
    pieces: Vec<libc::iovec>,
    bounce: Option<AlignedBuf>,
    bounced: Vec<Bounced>,
    /// What a read into memory of our own has brought so far.
    collected: Vec<u8>,
}

/// A part of a transfer that goes through the bounce buffer.
#[derive(Clone, Copy, Debug)]
struct Bounced {
    /// Where in the bounce buffer.
    at: usize,
    /// Where in the transfer.
    from: u64,
    len: usize,
}

// SAFETY: the pointers in `pieces` refer to memory that the value itself keeps alive and that is not
// bound to a thread: guest mappings, heap buffers, a static.
unsafe impl Send for Running {}

/// An io_uring on one file.
pub struct Uring {
    ring: IoUring,
    file: Arc<HostFile>,
    event: Arc<Event>,
    running: Vec<Option<Running>>,
    free: Vec<usize>,
    /// Not in the submission queue yet.
    waiting: VecDeque<usize>,
    /// In the submission queue or the kernel.
    submitted: usize,
    ended: VecDeque<Completion>,
}

impl Uring {
    /// A ring on `file` that signals `event` at completions.
    pub fn new(file: Arc<HostFile>, event: Arc<Event>) -> io::Result<Uring> {
        let ring = IoUring::builder().setup_clamp().setup_cqsize(COMPLETIONS).build(ENTRIES)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Uring {
            ring,
            file,
            event,
            running: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            submitted: 0,
            ended: VecDeque::new(),
        })
    }

    /// The file.
    #[cfg(test)]
    pub fn file(&self) -> &Arc<HostFile> {
        &self.file
    }

    /// Operations whose end has not been taken.
    pub fn unfinished(&self) -> usize {
        self.submitted + self.waiting.len() + self.ended.len()
    }

    /// Prepares an operation. Call [`Uring::enter`] afterwards.
    pub fn start(&mut self, token: Token, work: Work) {
        let len = match &work {
            Work::Ended(result) => {
                self.ended.push_back((token, result.clone()));
                return;
            }
            Work::ReadBytes { len, .. } | Work::ReadGuest { len, .. } => *len,
            Work::Write { parts, .. } => parts.iter().map(Part::len).sum(),
            Work::Punch { .. }
            | Work::Zero { .. }
            | Work::Allocate { .. }
            | Work::SetLen { .. }
            | Work::Sync => 0,
        };
        let is_transfer =
            matches!(work, Work::ReadBytes { .. } | Work::ReadGuest { .. } | Work::Write { .. });
        if is_transfer && len == 0 {
            let done = if matches!(work, Work::ReadBytes { .. }) {
                Done::Bytes(Vec::new())
            } else {
                Done::Ok
            };
            self.ended.push_back((token, Ok(done)));
            return;
        }
        let running = Running {
            token,
            work,
            done: 0,
            len,
            tries: 0,
            lead: 0,
            span: 0,
            pieces: Vec::new(),
            bounce: None,
            bounced: Vec::new(),
            collected: Vec::new(),
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.running[slot] = Some(running);
                slot
            }
            None => {
                self.running.push(Some(running));
                self.running.len() - 1
            }
        };
        self.waiting.push_back(slot);
    }

    /// Hands prepared operations to the kernel, as many as fit; the rest follows as others end.
    pub fn enter(&mut self) {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Completions must be taken first, or the kernel is short of memory. The entries stay
                // in the queue; the event brings the owner back here.
                Err(_) => {
                    self.event.signal();
                    return;
                }
            }
        }
    }

    fn fill(&mut self) {
        while let Some(slot) = self.waiting.front().copied() {
            if self.submitted >= COMPLETIONS as usize || self.ring.submission().is_full() {
                return;
            }
            self.waiting.pop_front();
            let running = self.running[slot].as_mut().expect("a waiting slot is taken");
            let entry = running.prepare(&self.file).user_data(slot as u64);
            // SAFETY: the entry refers to memory owned by the slot (`pieces`, the buffers of `work`,
            // `bounce`), which stays where it is until the operation's completion has been taken; the
            // descriptor is kept open by `file`. Dropping `self` waits for what is in the kernel.
            unsafe { self.ring.submission().push(&entry) }.expect("there is room");
            self.submitted += 1;
        }
    }

    /// Takes what has ended. Call [`Uring::enter`] afterwards: some may have to go on.
    pub fn reap(&mut self, ends: &mut Vec<Completion>) {
        let completions: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in completions {
            self.step(slot as usize, result);
        }
        ends.extend(self.ended.drain(..));
    }

    /// Deals with the end of a transfer: the operation ends or goes on.
    fn step(&mut self, slot: usize, result: i32) {
        let running = self.running[slot].as_mut().expect("a submitted slot is taken");
        self.submitted -= 1;
        let Some(end) = running.advance(result, &self.file) else {
            self.waiting.push_back(slot);
            return;
        };
        let token = running.token;
        self.running[slot] = None;
        self.free.push(slot);
        self.ended.push_back((token, end));
    }

    /// Blocks until an operation has ended; one must be under way.
    pub fn wait(&mut self) -> Completion {
        loop {
            if let Some(end) = self.ended.pop_front() {
                return end;
            }
            assert!(self.unfinished() > 0, "nothing to wait for");
            self.wait_kernel();
        }
    }

    /// Blocks until the kernel has completed something, and takes it.
    fn wait_kernel(&mut self) {
        self.fill();
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                _ => panic!("io_uring_enter: {error}"),
            },
        }
        let mut ends = Vec::new();
        self.reap(&mut ends);
        self.ended.extend(ends);
    }
}

impl Drop for Uring {
    /// The kernel must not write into memory that is gone.
    fn drop(&mut self) {
        while self.submitted + self.waiting.len() > 0 {
            self.wait_kernel();
        }
    }
}

impl Running {
    /// The next transfer of the operation.
    fn prepare(&mut self, file: &HostFile) -> squeue::Entry {
        let fd = types::Fd(file.as_raw_fd());
        let (mode, offset, len) = match self.work {
            Work::Punch { offset, len } => (libc::FALLOC_FL_PUNCH_HOLE, offset, len),
            Work::Zero { offset, len } => (libc::FALLOC_FL_ZERO_RANGE, offset, len),
            Work::Allocate { offset, len } => (0, offset, len),
            Work::SetLen { len } => return opcode::Ftruncate::new(fd, len).build(),
            Work::Sync => {
                return opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
            }
            Work::Ended(_) => unreachable!("it never gets a slot"),
            Work::ReadBytes { .. } | Work::ReadGuest { .. } => return self.prepare_read(file),
            Work::Write { .. } => return self.prepare_write(file),
        };
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
    }

    fn prepare_read(&mut self, file: &HostFile) -> squeue::Entry {
        let (offset, source) = match &self.work {
            Work::ReadBytes { offset, .. } => (*offset, None),
            Work::ReadGuest { offset, buffer, buffer_offset, .. } => {
                (*offset, Some((buffer.clone(), *buffer_offset)))
            }
            _ => unreachable!("only reads come here"),
        };
        let position = offset + self.done;
        let left = self.len - self.done;
        let unit = unit(file);
        let aligned = position.is_multiple_of(unit) && left.is_multiple_of(unit);
        self.clear_transfer();
        match source {
            Some((buffer, at)) if aligned => {
                let mut ranges = Vec::new();
                buffer.visit(at + self.done, left, |range| ranges.push(range));
                self.gather(file, &ranges);
            }
            _ => {
                self.lead = position % unit;
                let room = BOUNCE_BYTES as u64 - self.lead;
                let take = left.min(room);
                self.span = (self.lead + take).next_multiple_of(unit);
                let at = self.reserve(file, 0, self.span as usize);
                self.bounced.push(Bounced { at, from: 0, len: self.span as usize });
                self.push_bounce(at, self.span as usize);
            }
        }
        let fd = types::Fd(file.as_raw_fd());
        opcode::Readv::new(fd, self.pieces.as_ptr(), self.pieces.len() as u32)
            .offset(position - self.lead)
            .build()
    }

    fn prepare_write(&mut self, file: &HostFile) -> squeue::Entry {
        let Work::Write { offset, parts, durable } = &self.work else {
            unreachable!("only writes come here")
        };
        let (position, durable) = (offset + self.done, *durable);
        let ranges = ranges_of(parts, self.done);
        self.clear_transfer();
        self.gather(file, &ranges);
        for bounced in std::mem::take(&mut self.bounced) {
            self.fill_bounce(bounced);
            self.bounced.push(bounced);
        }
        let fd = types::Fd(file.as_raw_fd());
        opcode::Writev::new(fd, self.pieces.as_ptr(), self.pieces.len() as u32)
            .offset(position)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build()
    }

    fn clear_transfer(&mut self) {
        self.lead = 0;
        self.span = 0;
        self.pieces.clear();
        self.bounced.clear();
    }

    /// Makes a transfer of the ranges, as far as it goes: what direct I/O takes as it is, and the bounce
    /// buffer for the rest.
    fn gather(&mut self, file: &HostFile, ranges: &[HostRange]) {
        let unit = unit(file);
        let memory = if file.is_direct() { file.memory_alignment() as usize } else { 1 };
        let whole = ranges.iter().all(|range| (range.len as u64).is_multiple_of(unit));
        let fits = |range: &HostRange| whole && range.addr.is_multiple_of(memory);
        let mut used = 0;
        for range in ranges {
            if self.pieces.len() == PIECES_MAX {
                break;
            }
            if fits(range) {
                self.pieces.push(libc::iovec {
                    iov_base: range.addr as *mut libc::c_void,
                    iov_len: range.len,
                });
                self.span += range.len as u64;
                continue;
            }
            let extends = self.bounced.last().is_some_and(|last| {
                last.from + last.len as u64 == self.span && last.at + last.len == used
            });
            let at = if extends { used } else { used.next_multiple_of(memory) };
            let take = range.len.min(BOUNCE_BYTES.saturating_sub(at));
            if take == 0 {
                break;
            }
            self.reserve(file, at, take);
            self.bounced.push(Bounced { at, from: self.span, len: take });
            self.push_bounce(at, take);
            used = at + take;
            self.span += take as u64;
            if take < range.len {
                break;
            }
        }
        self.trim(unit);
    }

    /// Ends the transfer at a multiple of the unit.
    fn trim(&mut self, unit: u64) {
        let mut excess = self.span % unit;
        assert!(excess < self.span, "a transfer holds at least one unit");
        self.span -= excess;
        while excess > 0 {
            let last = self.pieces.last_mut().expect("the excess is a part of the pieces");
            let cut = (excess as usize).min(last.iov_len);
            last.iov_len -= cut;
            excess -= cut as u64;
            if last.iov_len == 0 {
                self.pieces.pop();
            }
        }
        let span = self.span;
        self.bounced.retain_mut(|bounced| {
            let room = span.saturating_sub(bounced.from);
            bounced.len = bounced.len.min(room as usize);
            bounced.len > 0
        });
    }

    /// Makes sure of `len` bytes at `at` of the bounce buffer.
    fn reserve(&mut self, file: &HostFile, at: usize, len: usize) -> usize {
        let alignment = file.memory_alignment().max(file.geometry().alignment) as usize;
        // Whole at once, since pieces point into it; most operations need little.
        let want = match self.len {
            small if small <= 16384 => 32768,
            _ => BOUNCE_BYTES + alignment,
        };
        let bounce = self.bounce.get_or_insert_with(|| AlignedBuf::new(want, alignment));
        if bounce.len() < at + len {
            let mut larger = AlignedBuf::new(BOUNCE_BYTES + alignment, alignment);
            let (old, new) = (bounce.as_ptr() as usize, larger.as_mut_ptr() as usize);
            let end = old + bounce.len();
            for piece in &mut self.pieces {
                let addr = piece.iov_base as usize;
                if (old..end).contains(&addr) {
                    piece.iov_base = (new + (addr - old)) as *mut libc::c_void;
                }
            }
            *bounce = larger;
        }
        at
    }

    /// Appends a part of the bounce buffer to the pieces.
    fn push_bounce(&mut self, at: usize, len: usize) {
        let bounce = self.bounce.as_mut().expect("reserved before");
        let base = bounce.as_mut_ptr() as usize + at;
        if let Some(last) = self.pieces.last_mut()
            && last.iov_base as usize + last.iov_len == base
        {
            last.iov_len += len;
            return;
        }
        self.pieces.push(libc::iovec { iov_base: base as *mut libc::c_void, iov_len: len });
    }

    /// Copies the data of a write into the bounce buffer.
    fn fill_bounce(&mut self, bounced: Bounced) {
        let Work::Write { parts, .. } = &self.work else { return };
        let bounce = self.bounce.as_mut().expect("reserved before");
        let target = &mut bounce[bounced.at..bounced.at + bounced.len];
        copy_parts(parts, self.done + bounced.from, target);
    }

    /// Takes the result of a transfer. The operation's end, or `None` if it goes on.
    fn advance(&mut self, result: i32, file: &HostFile) -> Option<Result<Done, StorageError>> {
        let count = match u64::try_from(result) {
            Ok(count) => count,
            Err(_) if [libc::EINTR, libc::EAGAIN].contains(&-result) && self.tries < TRIES_MAX => {
                self.tries += 1;
                return None;
            }
            Err(_) => {
                return Some(Err(storage_error(&io::Error::from_raw_os_error(-result))));
            }
        };
        match self.work {
            Work::ReadBytes { .. } | Work::ReadGuest { .. } => self.advance_read(count, file),
            Work::Write { .. } if count == 0 => Some(Err(StorageError::Io(libc::EIO))),
            Work::Write { .. } => {
                self.done += count;
                (self.done >= self.len).then_some(Ok(Done::Ok))
            }
            _ => Some(Ok(Done::Ok)),
        }
    }

    fn advance_read(&mut self, count: u64, file: &HostFile) -> Option<Result<Done, StorageError>> {
        // A read that ends inside a unit has met the end of the file.
        let ended = count == 0 || !count.is_multiple_of(unit(file));
        let useful = count.saturating_sub(self.lead).min(self.len - self.done);
        for bounced in std::mem::take(&mut self.bounced) {
            let len = bounced.len.min(count.saturating_sub(bounced.from) as usize);
            self.deliver(Bounced { len, ..bounced });
        }
        self.done += useful;
        if ended || self.done == self.len {
            return Some(Ok(self.finish_read()));
        }
        // An aligned read of nothing useful cannot make progress any more.
        if useful == 0 {
            return Some(Ok(self.finish_read()));
        }
        None
    }

    /// Copies what a read put into the bounce buffer to where it belongs.
    fn deliver(&mut self, bounced: Bounced) {
        match &self.work {
            Work::ReadGuest { buffer, buffer_offset, len, .. } => {
                let bounce = self.bounce.as_ref().expect("reserved before");
                let skip = self.lead.saturating_sub(bounced.from).min(bounced.len as u64) as usize;
                let from = self.done + bounced.from + skip as u64 - self.lead;
                let data = &bounce[bounced.at + skip..bounced.at + bounced.len];
                let data = &data[..data.len().min((*len - from.min(*len)) as usize)];
                buffer.copy_from(buffer_offset + from, data);
            }
            _ => self.collect(bounced),
        }
    }

    fn collect(&mut self, bounced: Bounced) {
        let bounce = self.bounce.as_ref().expect("reserved before");
        let skip = (self.lead as usize).min(bounced.len);
        let left = (self.len - self.done) as usize;
        let data = &bounce[bounced.at + skip..bounced.at + bounced.len];
        self.collected.extend_from_slice(&data[..data.len().min(left)]);
    }

    /// Zeroes what lies past the end of the file.
    fn finish_read(&mut self) -> Done {
        match &self.work {
            Work::ReadGuest { buffer, buffer_offset, .. } => {
                buffer.zero(buffer_offset + self.done, self.len - self.done);
                Done::Ok
            }
            _ => {
                let len = self.len as usize;
                let mut bytes = std::mem::take(&mut self.collected);
                bytes.resize(len, 0);
                Done::Bytes(bytes)
            }
        }
    }
}

/// What offsets and lengths must be multiples of.
fn unit(file: &HostFile) -> u64 {
    if file.is_direct() { file.geometry().alignment } else { 1 }
}

/// Our memory that holds the parts from byte `skip` on; as much of it as one transfer can use.
fn ranges_of(parts: &[Part], skip: u64) -> Vec<HostRange> {
    let mut ranges = Vec::with_capacity(parts.len());
    let mut skip = skip;
    for part in parts {
        let len = part.len();
        if skip >= len {
            skip -= len;
            continue;
        }
        match part {
            Part::Zero(_) => push_zeroes(&mut ranges, len - skip),
            Part::Guest { buffer, offset, .. } => {
                buffer.visit(offset + skip, len - skip, |range| ranges.push(range));
            }
            Part::Bytes(bytes) => ranges.push(HostRange {
                addr: bytes.as_ptr() as usize + skip as usize,
                len: (len - skip) as usize,
            }),
        }
        if ranges.len() > PIECES_MAX {
            break;
        }
        skip = 0;
    }
    ranges
}

fn push_zeroes(ranges: &mut Vec<HostRange>, len: u64) {
    let mut left = len;
    while left > 0 && ranges.len() <= PIECES_MAX {
        let take = left.min(ZEROES.0.len() as u64);
        ranges.push(HostRange { addr: ZEROES.0.as_ptr() as usize, len: take as usize });
        left -= take;
    }
}

/// Copies bytes `from ..` of the parts.
fn copy_parts(parts: &[Part], from: u64, target: &mut [u8]) {
    let mut skip = from;
    let mut rest = target;
    for part in parts {
        let len = part.len();
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = (rest.len() as u64).min(len - skip) as usize;
        let (now, later) = rest.split_at_mut(take);
        match part {
            Part::Zero(_) => now.fill(0),
            Part::Guest { buffer, offset, .. } => buffer.copy_to(offset + skip, now),
            Part::Bytes(bytes) => now.copy_from_slice(&bytes[skip as usize..skip as usize + take]),
        }
        rest = later;
        skip = 0;
        if rest.is_empty() {
            return;
        }
    }
    assert!(rest.is_empty(), "a transfer lies inside its parts");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::{memory, piece};
    use exd_file::OpenMode;
    use std::path::Path;

    struct Bench {
        _dir: tempfile::TempDir,
        ring: Uring,
        next: u64,
    }

    impl Bench {
        fn new(direct: bool) -> Bench {
            // The current directory, since direct I/O does not work everywhere.
            let dir = tempfile::tempdir_in(".").expect("temporary directory");
            let file = HostFile::create_new(&dir.path().join("f"), direct).expect("create");
            let event = Arc::new(Event::new().expect("event"));
            let ring = Uring::new(Arc::new(file), event).expect("io_uring");
            Bench { _dir: dir, ring, next: 0 }
        }

        fn run(&mut self, work: Work) -> Result<Done, StorageError> {
            self.next += 1;
            self.ring.start(Token(self.next), work);
            let (token, end) = self.ring.wait();
            assert_eq!(token, Token(self.next));
            end
        }

        fn content(&self, offset: u64, len: usize) -> Vec<u8> {
            let path: &Path = self.ring.file().path();
            let file = HostFile::open(path, OpenMode::default()).expect("open");
            let mut bytes = vec![0xaa; len];
            file.read_at(offset, &mut bytes).expect("read");
            bytes
        }
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

    #[test]
    fn writes_and_reads_of_any_layout() {
        for direct in [true, false] {
            let mut bench = Bench::new(direct);
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
                let done = bench.run(Work::Write { offset: 8192, parts, durable: false });
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
        let mut bench = Bench::new(true);
        let (buffer, data) = guest(&[(0x1001, 512)]);
        // 3000 unaligned parts, then zeroes beyond what 1024 pieces of 64 KiB hold.
        let mut parts: Vec<Part> = (0..3000).map(|_| whole(&buffer)).collect();
        parts.push(Part::Zero(80 << 20));
        parts.push(whole(&buffer));
        assert_eq!(bench.run(Work::Write { offset: 0, parts, durable: true }), Ok(Done::Ok));
        let content = bench.content(0, 3000 * 512);
        assert!(content.chunks(512).all(|chunk| chunk == data));
        let end = 3000 * 512 + (80 << 20);
        assert_eq!(bench.content(end, 512), data);
        assert_eq!(bench.ring.file().len().expect("length"), end + 512);
        let long = bench.run(Work::ReadBytes { offset: 0, len: 3000 * 512 });
        assert_eq!(long, Ok(Done::Bytes(content)));
    }

    #[test]
    fn reads_past_the_end_are_zeroes() {
        for direct in [true, false] {
            let mut bench = Bench::new(direct);
            bench.ring.file().set_len(1000).expect("grow");
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
        let mut bench = Bench::new(true);
        let (buffer, _) = guest(&[(0x1000, 8192)]);
        let parts = vec![whole(&buffer)];
        bench.run(Work::Write { offset: 0, parts, durable: false }).expect("write");
        bench.run(Work::Punch { offset: 0, len: 4096 }).expect("punch");
        assert!(bench.content(0, 4096).iter().all(|byte| *byte == 0));
        bench.run(Work::Allocate { offset: 0, len: 1 << 20 }).expect("allocate");
        assert_eq!(bench.ring.file().len().expect("length"), 8192);
        bench.run(Work::Sync).expect("sync");
        let ended = bench.run(Work::Ended(Err(StorageError::NoSpace)));
        assert_eq!(ended, Err(StorageError::NoSpace));
        assert_eq!(
            bench.run(Work::Write { offset: 0, parts: Vec::new(), durable: false }),
            Ok(Done::Ok)
        );
    }

    #[test]
    fn many_at_once() {
        let mut bench = Bench::new(true);
        let (buffer, data) = guest(&[(0x1000, 512)]);
        for i in 0..2000 {
            let parts = vec![whole(&buffer)];
            bench.ring.start(Token(i), Work::Write { offset: i * 512, parts, durable: false });
        }
        bench.ring.enter();
        let mut seen: Vec<u64> = Vec::new();
        while bench.ring.unfinished() > 0 {
            let (token, end) = bench.ring.wait();
            assert_eq!(end, Ok(Done::Ok));
            seen.push(token.0);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
        assert!(bench.content(0, 2000 * 512).chunks(512).all(|chunk| chunk == data));
    }
}
