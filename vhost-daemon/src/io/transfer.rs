//! What an operation asks of the host, call by call.
//!
//! A [`Transfer`] is an operation under way. [`Transfer::plan`] lays out its next call: what direct I/O
//! cannot take as it is (memory or pieces that are not aligned) goes through a bounce buffer, in bounded
//! chunks. [`Transfer::call`] is what the kernel gets, and [`Transfer::advance`] takes its result; short
//! transfers are continued. Which way calls reach the kernel is not known here.

#![allow(unsafe_code)]

use crate::io::bounce::{BOUNCE_BYTES, Loan};
use crate::io::{Part, Parts, Work};
use crate::queue::memory::HostRange;
use exd_file::{HostFile, storage_error};
use exd_image::{Completion, Done, StorageError, Token};
use std::collections::VecDeque;
use std::io;

/// Most pieces of memory in one call (the kernel's UIO_MAXIOV).
const PIECES_MAX: usize = 1024;
/// Most bytes of one call: below what the kernel cuts off, and a multiple of every unit.
const CALL_BYTES_MAX: u64 = 1 << 30;
/// How often an operation is tried again that the kernel refuses with EAGAIN.
const TRIES_MAX: u32 = 10_000;

/// Most bytes of several writes carried out as one: longer ones keep the host no busier, and who waits for
/// their beginning waits for their end.
const JOINED_MAX: u64 = 64 << 10;
/// The same if the first is a part of a block of the host in which the second begins.
const INSIDE_MAX: u64 = 2 << 20;
/// Host file systems allocate space in blocks of this size.
pub const HOST_BLOCK: u64 = 4096;
/// Most zeroes written between two of them.
const GAP_MAX: u64 = 4096;

#[repr(align(65536))]
struct Zeroes([u8; 65536]);
static ZEROES: Zeroes = Zeroes([0; 65536]);

/// A call to the host. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// preadv2
    Read {
        /// The memory.
        pieces: *const libc::iovec,
        /// Number of pieces.
        count: u32,
        /// Position in the file.
        offset: u64,
    },
    /// pwritev2
    Write {
        /// The memory.
        pieces: *const libc::iovec,
        /// Number of pieces.
        count: u32,
        /// Position in the file.
        offset: u64,
        /// With RWF_DSYNC.
        durable: bool,
    },
    /// fallocate
    Fallocate {
        /// FALLOC_FL_*.
        mode: i32,
        /// Position in the file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// ftruncate
    Truncate {
        /// The new length.
        len: u64,
    },
    /// fdatasync
    Sync,
}

/// An operation under way. Reused for others: its lists keep their memory.
#[derive(Debug)]
pub struct Transfer {
    token: Token,
    work: Work,
    /// Bytes of it that are done.
    done: u64,
    len: u64,
    tries: u32,
    /// Of the present call: where it starts in the operation (less for a read that had to start earlier
    /// in the file), its pieces, and what goes through the bounce buffer.
    lead: u64,
    span: u64,
    pieces: Vec<libc::iovec>,
    /// Which of the pieces lie in the bounce buffer; without it, their addresses count from its start.
    bounce_pieces: Vec<usize>,
    bounced: Vec<Bounced>,
    /// Bytes of bounce buffer that the call needs.
    need: usize,
    bounce: Option<Loan>,
    /// What a read into memory of our own has brought so far.
    collected: Vec<u8>,
    /// Our memory that a call works on.
    ranges: Vec<HostRange>,
    /// Other writes may become a part of this one.
    joins: bool,
    /// The writes that have become a part of this one, and the first, if there are any.
    joined: Vec<Joined>,
}

/// One of several writes that are carried out as one.
#[derive(Clone, Copy, Debug)]
struct Joined {
    token: Token,
    /// Where in the whole.
    from: u64,
    len: u64,
    /// Of the whole's parts: the first, and how many.
    first: usize,
    parts: usize,
}

/// A part of a call that goes through the bounce buffer.
#[derive(Clone, Copy, Debug)]
struct Bounced {
    /// Where in the bounce buffer.
    at: usize,
    /// Where in the call.
    from: u64,
    len: usize,
}

// SAFETY: the pointers in `pieces` refer to memory that the value itself keeps alive and that is not
// bound to a thread: guest mappings, heap buffers, a static.
unsafe impl Send for Transfer {}

impl Transfer {
    /// One that has no operation.
    pub fn empty() -> Transfer {
        Transfer {
            token: Token(0),
            work: Work::Sync,
            done: 0,
            len: 0,
            tries: 0,
            lead: 0,
            span: 0,
            pieces: Vec::new(),
            bounce_pieces: Vec::new(),
            bounced: Vec::new(),
            need: 0,
            bounce: None,
            collected: Vec::new(),
            ranges: Vec::new(),
            joins: false,
            joined: Vec::new(),
        }
    }

    /// Begins an operation of `len` bytes.
    pub fn begin(&mut self, token: Token, work: Work, len: u64, joins: bool) {
        self.token = token;
        self.work = work;
        self.len = len;
        self.done = 0;
        self.tries = 0;
        self.collected.clear();
        self.joins = joins && matches!(self.work, Work::Write { durable: false, .. });
        self.joined.clear();
    }

    /// Makes a write a part of this one if it begins where this one ends. Returns it if not.
    pub fn join(&mut self, token: Token, work: Work) -> Option<Work> {
        if !self.joins || self.done > 0 || self.tries > 0 {
            return Some(work);
        }
        let Work::Write { offset: start, parts: before, spare: room, .. } = &mut self.work else {
            return Some(work);
        };
        let Work::Write { offset, ref parts, spare, .. } = work else { return Some(work) };
        let end = *start + self.len;
        let len: u64 = parts.iter().map(Part::len).sum();
        let gap = offset.wrapping_sub(end);
        let apart = gap > GAP_MAX.min(room.1 + spare.0);
        // The engine's own data must not have to wait for bounce memory.
        let unlike = hold_guests_data(before) != hold_guests_data(parts);
        // A few sectors, and what goes on behind them in the same block: better off as a write of whole blocks.
        let inside = gap == 0 && self.len < HOST_BLOCK && !end.is_multiple_of(HOST_BLOCK);
        let most = if inside { INSIDE_MAX } else { JOINED_MAX };
        if apart || unlike || self.len + gap + len > most {
            return Some(work);
        }
        let Work::Write { parts, .. } = work else { unreachable!("seen to be a write") };
        let mut all = match std::mem::replace(before, Parts::Many(Vec::new())) {
            Parts::One(part) => vec![part],
            Parts::Many(parts) => parts,
        };
        if self.joined.is_empty() {
            let (from, first) = (0, 0);
            let parts = all.len();
            self.joined.push(Joined { token: self.token, from, len: self.len, first, parts });
        }
        if gap > 0 {
            all.push(Part::Zero(gap));
        }
        let first = all.len();
        match parts {
            Parts::One(part) => all.push(part),
            Parts::Many(parts) => all.extend(parts),
        }
        let parts = all.len() - first;
        let from = self.len + gap;
        self.joined.push(Joined { token, from, len, first, parts });
        self.len = from + len;
        room.1 = spare.1;
        *before = Parts::Many(all);
        None
    }

    /// It is several writes carried out as one.
    pub fn has_joined(&self) -> bool {
        !self.joined.is_empty()
    }

    /// The writes that it was made of.
    pub fn take_apart(&mut self) -> Vec<(Token, Work, u64)> {
        let work = std::mem::replace(&mut self.work, Work::Sync);
        let Work::Write { offset, parts, .. } = work else { return Vec::new() };
        let Parts::Many(mut parts) = parts else { return Vec::new() };
        let mut apart = Vec::new();
        for joined in self.joined.drain(..).rev() {
            let own: Vec<_> = parts.drain(joined.first..).take(joined.parts).collect();
            let offset = offset + joined.from;
            let work = Work::Write { offset, parts: own.into(), durable: false, spare: (0, 0) };
            apart.push((joined.token, work, joined.len));
        }
        apart
    }

    /// Tells whoever asked how it ended.
    pub fn tell(&self, end: &Result<Done, StorageError>, ended: &mut VecDeque<Completion>) {
        if self.joined.is_empty() {
            ended.push_back((self.token, end.clone()));
        }
        ended.extend(self.joined.iter().map(|joined| (joined.token, end.clone())));
    }

    /// Lets go of the operation's memory.
    pub fn clear(&mut self) {
        self.work = Work::Sync;
        self.clear_call();
        assert!(self.bounce.is_none(), "the bounce buffer has been taken back");
    }

    /// Bytes of bounce buffer that the planned call needs.
    pub fn need(&self) -> usize {
        self.need
    }

    /// The operation moves data of guests, which the bounce budget is for.
    pub fn is_guests(&self) -> bool {
        match &self.work {
            Work::ReadGuest { .. } => true,
            Work::Write { parts, .. } => hold_guests_data(parts),
            _ => false,
        }
    }

    /// Lays out the next call.
    pub fn plan(&mut self, file: &HostFile) {
        match self.work {
            Work::ReadBytes { .. } | Work::ReadGuest { .. } => self.plan_read(file),
            Work::Write { .. } => self.plan_write(file),
            _ => self.clear_call(),
        }
    }

    /// Gives the planned call its bounce buffer.
    pub fn lend(&mut self, mut loan: Loan) {
        let base = loan.memory().as_mut_ptr() as usize;
        for number in &self.bounce_pieces {
            let piece = &mut self.pieces[*number];
            piece.iov_base = (base + piece.iov_base as usize) as *mut libc::c_void;
        }
        if let Work::Write { parts, .. } = &self.work {
            for bounced in &self.bounced {
                let target = &mut loan.memory()[bounced.at..bounced.at + bounced.len];
                copy_parts(parts, self.done + bounced.from, target);
            }
        }
        self.bounce = Some(loan);
    }

    /// Takes the bounce buffer back.
    pub fn take_loan(&mut self) -> Option<Loan> {
        self.bounce.take()
    }

    /// The planned call. What it points to stays valid and in place until the next call of `plan` or
    /// `clear`.
    pub fn call(&self) -> Call {
        let pieces = self.pieces.as_ptr();
        let count = self.pieces.len() as u32;
        let (mode, offset, len) = match self.work {
            Work::ReadBytes { offset, .. } | Work::ReadGuest { offset, .. } => {
                return Call::Read { pieces, count, offset: offset + self.done - self.lead };
            }
            Work::Write { offset, durable, .. } => {
                return Call::Write { pieces, count, offset: offset + self.done, durable };
            }
            Work::Punch { offset, len } => (libc::FALLOC_FL_PUNCH_HOLE, offset, len),
            Work::Zero { offset, len } => (libc::FALLOC_FL_ZERO_RANGE, offset, len),
            Work::Allocate { offset, len } => (0, offset, len),
            Work::SetLen { len } => return Call::Truncate { len },
            Work::Sync | Work::Ended(_) => return Call::Sync,
        };
        Call::Fallocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset, len }
    }

    fn plan_read(&mut self, file: &HostFile) {
        self.clear_call();
        let unit = unit(file);
        let left = self.len - self.done;
        let mut ranges = std::mem::take(&mut self.ranges);
        let position = match &self.work {
            Work::ReadBytes { offset, .. } => offset + self.done,
            Work::ReadGuest { offset, buffer, buffer_offset, .. } => {
                let position = offset + self.done;
                if position.is_multiple_of(unit) && left.is_multiple_of(unit) {
                    let at = buffer_offset + self.done;
                    buffer.visit(at, left, |range| ranges.push(range));
                }
                position
            }
            _ => unreachable!("only reads come here"),
        };
        if ranges.is_empty() {
            self.lead = position % unit;
            let take = left.min(BOUNCE_BYTES as u64 - self.lead);
            self.span = (self.lead + take).next_multiple_of(unit);
            self.bounce_at(0, 0, self.span as usize);
        } else {
            self.gather(file, &mut ranges);
        }
        ranges.clear();
        self.ranges = ranges;
    }

    fn plan_write(&mut self, file: &HostFile) {
        self.clear_call();
        let mut ranges = std::mem::take(&mut self.ranges);
        let Work::Write { parts, .. } = &self.work else { unreachable!("only writes come here") };
        ranges_of(parts, self.done, &mut ranges);
        self.gather(file, &mut ranges);
        ranges.clear();
        self.ranges = ranges;
    }

    /// A write of whole blocks whose pieces of memory are none, as with padding before the data. ext4 takes it
    /// for one of a part of a block: into a hole, that waits until all other I/O on the file has ended.
    fn is_ragged(&self, ranges: &[HostRange]) -> bool {
        let Work::Write { offset, .. } = &self.work else { return false };
        let whole = (offset + self.done) | (self.len - self.done);
        let block = HOST_BLOCK as usize;
        whole.is_multiple_of(HOST_BLOCK)
            && ranges.iter().any(|range| !(range.addr | range.len).is_multiple_of(block))
    }

    fn clear_call(&mut self) {
        self.lead = 0;
        self.span = 0;
        self.need = 0;
        self.pieces.clear();
        self.bounce_pieces.clear();
        self.bounced.clear();
    }

    /// Makes a call of the ranges, as far as it goes: what direct I/O takes as it is, and the bounce
    /// buffer for the rest.
    fn gather(&mut self, file: &HostFile, ranges: &mut Vec<HostRange>) {
        let direct = file.memory_alignment() as usize;
        let (unit, memory, whole) = match file.is_direct() {
            // Only the blocks that are ragged are copied, whole.
            true if self.is_ragged(ranges) => {
                split_at_blocks(ranges);
                (HOST_BLOCK, HOST_BLOCK as usize, true)
            }
            true => {
                let sectors = |range: &HostRange| (range.len as u64).is_multiple_of(unit(file));
                (unit(file), direct, ranges.iter().all(sectors))
            }
            false => (1, 1, true),
        };
        let fits = |range: &HostRange| {
            whole && range.addr.is_multiple_of(memory) && (range.len as u64).is_multiple_of(unit)
        };
        let mut used = 0;
        for range in ranges.iter() {
            if self.pieces.len() == PIECES_MAX {
                break;
            }
            let room = CALL_BYTES_MAX - self.span;
            let len = range.len.min(room as usize);
            if fits(range) {
                let base = range.addr as *mut libc::c_void;
                self.pieces.push(libc::iovec { iov_base: base, iov_len: len });
                self.span += len as u64;
            } else {
                let extends = self.bounced.last().is_some_and(|last| {
                    last.from + last.len as u64 == self.span && last.at + last.len == used
                });
                let at = if extends { used } else { used.next_multiple_of(memory) };
                let take = len.min(BOUNCE_BYTES.saturating_sub(at));
                if take == 0 {
                    break;
                }
                self.bounce_at(at, self.span, take);
                used = at + take;
                self.span += take as u64;
                if take < range.len {
                    break;
                }
            }
            if self.span == CALL_BYTES_MAX {
                break;
            }
        }
        self.trim(unit);
    }

    /// Ends the call at a multiple of the unit.
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
        let (span, count) = (self.span, self.pieces.len());
        self.bounce_pieces.retain(|number| *number < count);
        self.bounced.retain_mut(|bounced| {
            let room = span.saturating_sub(bounced.from);
            bounced.len = bounced.len.min(room as usize);
            bounced.len > 0
        });
    }

    /// Lets the next `len` bytes of the call, `from` bytes into it, go through byte `at` and following of
    /// the bounce buffer.
    fn bounce_at(&mut self, at: usize, from: u64, len: usize) {
        self.bounced.push(Bounced { at, from, len });
        self.need = self.need.max(at + len);
        let number = self.pieces.len().wrapping_sub(1);
        if self.bounce_pieces.last() == Some(&number) {
            let last = &mut self.pieces[number];
            if last.iov_base as usize + last.iov_len == at {
                last.iov_len += len;
                return;
            }
        }
        self.bounce_pieces.push(self.pieces.len());
        self.pieces.push(libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len });
    }

    /// Takes the result of the call. The operation's end, or `None` if it goes on.
    pub fn advance(&mut self, result: i32, file: &HostFile) -> Option<Result<Done, StorageError>> {
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
                let bounce = self.bounce.as_ref().expect("lent before the call").bytes();
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
        let bounce = self.bounce.as_ref().expect("lent before the call").bytes();
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

fn hold_guests_data(parts: &[Part]) -> bool {
    parts.iter().any(|part| matches!(part, Part::Guest { .. }))
}

/// What offsets and lengths must be multiples of.
fn unit(file: &HostFile) -> u64 {
    if file.is_direct() { file.geometry().alignment } else { 1 }
}

/// So many bytes are listed however small the pieces are: what file systems work in, and more than any unit.
const LISTED_MIN: u64 = 64 << 10;

/// Lists our memory that holds the parts from byte `skip` on; as much of it as one call can use.
fn ranges_of(parts: &[Part], mut skip: u64, ranges: &mut Vec<HostRange>) {
    let mut listed = 0;
    for part in parts {
        let len = part.len();
        if skip >= len {
            skip -= len;
            continue;
        }
        match part {
            Part::Zero(_) => {
                // Zeroes that are not all listed are the last.
                if push_zeroes(ranges, len - skip) < len - skip {
                    break;
                }
            }
            Part::Guest { buffer, offset, .. } => {
                buffer.visit(offset + skip, len - skip, |range| push(ranges, range));
            }
            Part::Bytes(bytes) => ranges.push(HostRange {
                addr: bytes.as_ptr() as usize + skip as usize,
                len: (len - skip) as usize,
            }),
        }
        listed += len - skip;
        if ranges.len() > PIECES_MAX && listed >= LISTED_MIN {
            break;
        }
        skip = 0;
    }
}

/// Parts of a request that follow each other in its memory are one piece of it again.
fn push(ranges: &mut Vec<HostRange>, range: HostRange) {
    match ranges.last_mut() {
        Some(last) if last.addr + last.len == range.addr => last.len += range.len,
        _ => ranges.push(range),
    }
}

/// Parts the memory of whole blocks of the host into pieces that hold whole blocks, and others. The first
/// begins with a block.
fn split_at_blocks(ranges: &mut Vec<HostRange>) {
    let block = HOST_BLOCK as usize;
    let mut split = Vec::with_capacity(ranges.len() + 4);
    // Bytes into a block.
    let mut into = 0;
    for HostRange { addr, len } in ranges.drain(..) {
        let head = ((block - into) % block).min(len);
        let middle = (len - head) / block * block;
        let mut at = addr;
        for len in [head, middle, len - head - middle].into_iter().filter(|len| *len > 0) {
            split.push(HostRange { addr: at, len });
            at += len;
        }
        into = (into + len) % block;
    }
    *ranges = split;
}

/// Lists memory full of zeroes; of how many bytes, which is one piece at least.
fn push_zeroes(ranges: &mut Vec<HostRange>, len: u64) -> u64 {
    let mut left = len;
    while left > 0 {
        let take = left.min(ZEROES.0.len() as u64);
        ranges.push(HostRange { addr: ZEROES.0.as_ptr() as usize, len: take as usize });
        left -= take;
        if ranges.len() > PIECES_MAX {
            break;
        }
    }
    len - left
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
