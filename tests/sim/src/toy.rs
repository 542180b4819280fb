//! A disk as simple as can be, with bugs to choose from: it shows that the simulator's storage, model
//! and explorer find what they are there to find, whatever the real engine does.
//!
//! Sector 0 of the file holds the size; the disk's byte `n` lies at `65536 + n`. Writes go through.

use crate::api::{
    Done, Op, Request, RequestError, RequestId, SECTOR, Segment, Storage, StorageError, Token,
};
use crate::engine::{Engine, ImageConfig, Refusal, Verdict, blocking};
use crate::storage::SimStorage;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};

const DATA: u64 = 65536;

/// A toy's bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ToyBug {
    FlushDoesNothing,
    FlushDoesNotWait,
    WritesComplete1SectorOff,
    WriteEndsBeforeItTakesEffect,
    UnalignedWriteReadsModifiesWritesWithoutLock,
    FailedSyncIsForgotten,
    DiscardIsRoundedOutwards,
    OpenForgetsTheLastBlock,
    FlushAfterOpenIsFree,
    ReadsAreOneBehind,
}

impl ToyBug {
    /// All of them.
    pub const ALL: [ToyBug; 10] = [
        ToyBug::FlushDoesNothing,
        ToyBug::FlushDoesNotWait,
        ToyBug::WritesComplete1SectorOff,
        ToyBug::WriteEndsBeforeItTakesEffect,
        ToyBug::UnalignedWriteReadsModifiesWritesWithoutLock,
        ToyBug::FailedSyncIsForgotten,
        ToyBug::DiscardIsRoundedOutwards,
        ToyBug::OpenForgetsTheLastBlock,
        ToyBug::FlushAfterOpenIsFree,
        ToyBug::ReadsAreOneBehind,
    ];
}

thread_local! {
    static BUG: Cell<Option<ToyBug>> = const { Cell::new(None) };
}

/// Switches a bug on, or all off, for this thread.
pub fn set_bug(bug: Option<ToyBug>) {
    BUG.set(bug);
}

fn bug(which: ToyBug) -> bool {
    BUG.get() == Some(which)
}

enum Step {
    End(RequestId),
    Flush(RequestId),
    Ignore,
    ModifyWrite { id: RequestId, offset: u64, len: u64, from: u64 },
    Resize { id: RequestId, size: u64 },
}

/// The toy.
pub struct Toy {
    size: u64,
    block: u64,
    next: u64,
    steps: BTreeMap<Token, Step>,
    finished: VecDeque<(RequestId, Result<(), RequestError>)>,
    failed: bool,
    dirty: bool,
}

impl Toy {
    fn start(&mut self, st: &mut SimStorage, op: Op, step: Step) {
        self.next += 1;
        self.steps.insert(Token(self.next), step);
        st.submit(Token(self.next), op);
    }

    fn end(&mut self, id: RequestId, result: Result<(), RequestError>) {
        self.finished.push_back((id, result));
    }

    fn zero(&mut self, st: &mut SimStorage, id: RequestId, start: u64, end: u64) {
        if start >= end {
            return self.end(id, Ok(()));
        }
        let op = Op::Write { offset: DATA + start, segments: vec![Segment::Zero(end - start)] };
        self.start(st, op, Step::End(id));
    }

    fn write(&mut self, st: &mut SimStorage, id: RequestId, offset: u64, len: u64) {
        self.dirty = true;
        if bug(ToyBug::UnalignedWriteReadsModifiesWritesWithoutLock) && len < self.block {
            let from = offset / self.block * self.block;
            let len_all = (offset + len).next_multiple_of(self.block) - from;
            let op = Op::ReadBytes { offset: DATA + from, len: len_all };
            return self.start(st, op, Step::ModifyWrite { id, offset, len, from });
        }
        let shift =
            if bug(ToyBug::WritesComplete1SectorOff) && offset > 65536 { SECTOR } else { 0 };
        let segments = vec![Segment::Request { request: id, offset: 0, len }];
        let op = Op::Write { offset: DATA + offset + shift, segments };
        self.start(st, op, Step::End(id));
    }
}

fn refusal(error: StorageError) -> Refusal {
    Refusal { storage: Some(error), corrupt: false, text: error.to_string() }
}

impl Engine for Toy {
    fn create(st: &mut SimStorage, config: &ImageConfig) -> Result<(), Refusal> {
        let mut header = [0; 512];
        header[..8].copy_from_slice(&config.virtual_size.to_le_bytes());
        header[8..16].copy_from_slice(&u64::from(config.block_size).to_le_bytes());
        let segments = vec![Segment::Bytes(header.to_vec().into())];
        blocking(st, Token(1), Op::Write { offset: 0, segments }).map_err(refusal)?;
        blocking(st, Token(2), Op::Sync).map_err(refusal)?;
        Ok(())
    }

    fn open(st: &mut SimStorage, _config: &ImageConfig) -> Result<Self, Refusal> {
        let read = blocking(st, Token(1), Op::ReadBytes { offset: 0, len: 512 });
        let Done::Bytes(header) = read.map_err(refusal)? else { unreachable!("reads yield bytes") };
        let number = |at: usize| {
            let mut raw = [0; 8];
            raw.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(raw)
        };
        let size = number(0);
        let mut dirty = true;
        if bug(ToyBug::OpenForgetsTheLastBlock) {
            let segments = vec![Segment::Zero(512)];
            let op = Op::Write { offset: DATA + size - 512, segments };
            blocking(st, Token(2), op).map_err(refusal)?;
        }
        if bug(ToyBug::FlushAfterOpenIsFree) {
            dirty = false;
        }
        Ok(Toy {
            size,
            block: number(8),
            next: 10,
            steps: BTreeMap::new(),
            finished: VecDeque::new(),
            failed: false,
            dirty,
        })
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn submit(&mut self, st: &mut SimStorage, id: RequestId, request: Request) {
        match request {
            Request::Read { offset, len } => {
                let offset = match bug(ToyBug::ReadsAreOneBehind) && offset > 0 {
                    true => offset - SECTOR,
                    false => offset,
                };
                let op =
                    Op::ReadRequest { offset: DATA + offset, request: id, buffer_offset: 0, len };
                self.start(st, op, Step::End(id));
            }
            Request::Write { offset, len, .. } => {
                self.write(st, id, offset, len);
                if bug(ToyBug::WriteEndsBeforeItTakesEffect) {
                    let token = Token(self.next);
                    self.steps.insert(token, Step::Ignore);
                    self.end(id, Ok(()));
                }
            }
            Request::WriteZeroes { offset, len, .. } => self.zero(st, id, offset, offset + len),
            Request::Discard { offset, len } => {
                let end = (offset + len) / self.block * self.block;
                let mut start = offset.next_multiple_of(self.block);
                if bug(ToyBug::DiscardIsRoundedOutwards) {
                    start = offset / self.block * self.block;
                }
                self.zero(st, id, start, end);
            }
            // The toy has no background work to hold back, and nothing is scattered.
            Request::Freeze | Request::Defragment { .. } => self.end(id, Ok(())),
            Request::Flush | Request::Checkpoint => {
                if self.failed && !bug(ToyBug::FailedSyncIsForgotten) {
                    return self.end(id, Err(RequestError::Failed));
                }
                if bug(ToyBug::FlushDoesNothing) || !self.dirty {
                    return self.end(id, Ok(()));
                }
                self.start(st, Op::Sync, Step::Flush(id));
                if bug(ToyBug::FlushDoesNotWait) {
                    self.steps.insert(Token(self.next), Step::Ignore);
                    self.end(id, Ok(()));
                }
            }
            Request::Resize { size } => {
                let cut = size.min(self.size);
                let segments = vec![Segment::Zero(self.size.max(size) - cut + SECTOR)];
                let op = Op::Write { offset: DATA + cut, segments };
                self.start(st, op, Step::Resize { id, size });
            }
        }
    }

    fn kick(&mut self, _st: &mut SimStorage) {}

    fn complete(&mut self, st: &mut SimStorage, token: Token, result: Result<Done, StorageError>) {
        let Some(step) = self.steps.remove(&token) else { return };
        match (step, result) {
            (Step::Ignore, _) => {}
            (Step::Flush(id), Ok(_)) if self.failed && !bug(ToyBug::FailedSyncIsForgotten) => {
                self.end(id, Err(RequestError::Failed));
            }
            (Step::End(id) | Step::Flush(id), result) => {
                // Only syncs and writes matter; a failed read hurts nobody else.
                self.failed |= result.is_err();
                self.end(id, result.map(|_| ()).map_err(RequestError::Storage));
            }
            (Step::ModifyWrite { id, offset, len, from }, Ok(Done::Bytes(old))) => {
                let head = (offset - from) as usize;
                let tail = head + len as usize;
                let mut segments = vec![Segment::Request { request: id, offset: 0, len }];
                if head > 0 {
                    segments.insert(0, Segment::Bytes(old[..head].into()));
                }
                if tail < old.len() {
                    segments.push(Segment::Bytes(old[tail..].into()));
                }
                self.start(st, Op::Write { offset: DATA + from, segments }, Step::End(id));
            }
            (Step::Resize { id, size }, Ok(_)) => {
                self.size = size;
                let mut header = [0; 512];
                header[..8].copy_from_slice(&size.to_le_bytes());
                header[8..16].copy_from_slice(&self.block.to_le_bytes());
                let segments = vec![Segment::Bytes(header.to_vec().into())];
                self.dirty = true;
                self.start(st, Op::Write { offset: 0, segments }, Step::End(id));
            }
            (Step::ModifyWrite { id, .. } | Step::Resize { id, .. }, result) => {
                let error = result.err().unwrap_or(StorageError::Io(5));
                self.end(id, Err(RequestError::Storage(error)));
            }
        }
    }

    fn tick(&mut self, _st: &mut SimStorage, _now_ms: u64) {}

    fn pop_finished(&mut self) -> Option<(RequestId, Result<(), RequestError>)> {
        self.finished.pop_front()
    }

    fn close(&mut self, st: &mut SimStorage) -> Result<(), Refusal> {
        self.next += 1;
        blocking(st, Token(self.next), Op::Sync).map(|_| ()).map_err(refusal)
    }

    fn check(_st: &mut SimStorage) -> Result<Verdict, Refusal> {
        Ok(Verdict::default())
    }
}
