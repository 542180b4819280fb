//! Raw images: each request is one operation on the file.

use crate::disk::gate::Gate;
use crate::disk::{Disk, Finished, Hold, NOT_YET, Port, Properties, Submission};
use crate::event::Event;
use crate::io::{HostIo, IoSetup, Part, Work};
use exd_file::HostFile;
use exd_image::{Request, RequestError};
use exd_image::{RequestId, StorageError, Token};
use serde_json::json;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// A raw image.
pub struct RawDisk {
    shared: Arc<Shared>,
    gate: Arc<Gate>,
    read_only: bool,
}

struct Shared {
    file: Arc<HostFile>,
    setup: IoSetup,
    /// A sync failed: nothing is durable any more (P5).
    failed: AtomicBool,
    syncs: AtomicU64,
    requests: AtomicU64,
}

impl RawDisk {
    /// On an open and locked file.
    pub fn new(file: Arc<HostFile>, setup: IoSetup, read_only: bool) -> io::Result<RawDisk> {
        let len = file.len()?;
        let block = file.geometry().alignment;
        let capacity = len - len % block;
        if capacity != len {
            log::warn!(
                "the last {} bytes of the image are no whole block: not served",
                len % block
            );
        }
        let shared = Shared {
            file,
            setup,
            failed: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        };
        let gate = Arc::new(Gate::new(true, capacity)?);
        Ok(RawDisk { shared: Arc::new(shared), gate, read_only })
    }
}

impl Disk for RawDisk {
    fn properties(&self) -> Properties {
        let geometry = self.shared.file.geometry();
        let block = u32::try_from(geometry.alignment).unwrap_or(512);
        let host_block = u32::try_from(geometry.host_block).unwrap_or(block);
        Properties {
            capacity: self.gate.capacity(),
            logical_block: block,
            physical_block: host_block,
            discard_granularity: host_block,
            read_only: self.read_only,
            serial: "vhost-daemon-raw".to_owned(),
        }
    }

    fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    fn hold(&self) -> Hold {
        Hold::Held
    }

    fn resize(&self, _size: u64) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn checkpoint(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn freeze(&self, _limit: Duration) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn thaw(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn suspend(&self) -> Result<(), String> {
        Err(NOT_YET.to_owned())
    }

    fn resume(&self) -> Result<(), String> {
        Ok(())
    }

    fn port(&self, event: Arc<Event>) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(RawPort {
            io: HostIo::new(&self.shared.setup, self.shared.file.clone(), event)?,
            shared: self.shared.clone(),
            steps: HashMap::new(),
            next_token: 0,
            ends: Vec::new(),
        }))
    }

    fn statistics(&self) -> serde_json::Value {
        json!({
            "format": "raw",
            "syncs": self.shared.syncs.load(Ordering::Relaxed),
            "requests": self.shared.requests.load(Ordering::Relaxed),
        })
    }

    fn close(&self) -> Result<(), String> {
        if !self.read_only {
            self.shared.syncs.fetch_add(1, Ordering::Relaxed);
            self.shared
                .file
                .sync()
                .map_err(|error| format!("could not sync the image: {error}"))?;
        }
        Ok(())
    }
}

struct RawPort {
    io: HostIo,
    shared: Arc<Shared>,
    steps: HashMap<Token, Step>,
    next_token: u64,
    ends: Vec<exd_image::Completion>,
}

/// What an operation belongs to and what follows it.
struct Step {
    id: RequestId,
    after: After,
}

enum After {
    /// The request is finished.
    Finish,
    /// The operation made things durable; if it fails, that is final.
    FinishDurable,
    /// The range was zeroed.
    Zeroed { offset: u64, len: u64, durable: bool },
}

impl RawPort {
    fn start(&mut self, id: RequestId, work: Work, after: After) {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.steps.insert(token, Step { id, after });
        self.io.start(token, work);
    }

    fn sync(&mut self, id: RequestId) {
        self.shared.syncs.fetch_add(1, Ordering::Relaxed);
        self.start(id, Work::Sync, After::FinishDurable);
    }

    fn begin(&mut self, submission: Submission) -> Result<(), RequestError> {
        let Submission { id, request, buffer } = submission;
        let durable = matches!(
            request,
            Request::Flush
                | Request::Write { durable: true, .. }
                | Request::WriteZeroes { durable: true, .. }
        );
        if durable && self.shared.failed.load(Ordering::Acquire) {
            return Err(RequestError::Failed);
        }
        match request {
            Request::Read { offset, len } => {
                let buffer = buffer.ok_or(RequestError::OutOfRange)?;
                let work = Work::ReadGuest { offset, buffer, buffer_offset: 0, len };
                self.start(id, work, After::Finish);
            }
            Request::Write { offset, len, durable } => {
                let buffer = buffer.ok_or(RequestError::OutOfRange)?;
                let parts = vec![Part::Guest { buffer, offset: 0, len }];
                let after = if durable { After::FinishDurable } else { After::Finish };
                self.start(id, Work::Write { offset, parts, durable }, after);
            }
            Request::WriteZeroes { offset, len, unmap, durable } => {
                let work =
                    if unmap { Work::Punch { offset, len } } else { Work::Zero { offset, len } };
                self.start(id, work, After::Zeroed { offset, len, durable });
            }
            Request::Discard { offset, len } => {
                self.start(id, Work::Punch { offset, len }, After::Finish);
            }
            Request::Flush => self.sync(id),
            Request::Checkpoint
            | Request::Defragment { .. }
            | Request::Freeze
            | Request::Resize { .. } => {
                return Err(RequestError::OutOfRange);
            }
        }
        Ok(())
    }

    fn end(&mut self, step: Step, result: Result<(), StorageError>, finished: &mut Vec<Finished>) {
        match (step.after, result) {
            (After::Zeroed { offset, len, durable }, Err(StorageError::Unsupported)) => {
                let parts = vec![Part::Zero(len)];
                let after = if durable { After::FinishDurable } else { After::Finish };
                self.start(step.id, Work::Write { offset, parts, durable }, after);
            }
            (After::Zeroed { durable: true, .. }, Ok(())) => self.sync(step.id),
            (After::FinishDurable, Err(error @ StorageError::Io(_))) => {
                if !self.shared.failed.swap(true, Ordering::AcqRel) {
                    log::error!(
                        "the image could not be synced: {error}; no flush succeeds any more"
                    );
                }
                finished.push((step.id, Err(error.into())));
            }
            (_, result) => finished.push((step.id, result.map_err(RequestError::from))),
        }
    }
}

impl Port for RawPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        self.shared.requests.fetch_add(batch.len() as u64, Ordering::Relaxed);
        for submission in batch.drain(..) {
            let id = submission.id;
            if let Err(error) = self.begin(submission) {
                finished.push((id, Err(error)));
            }
        }
        self.io.enter();
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let mut ends = std::mem::take(&mut self.ends);
        self.io.reap(&mut ends);
        let progress = !ends.is_empty();
        for (token, result) in ends.drain(..) {
            let step = self.steps.remove(&token).expect("every operation has a step");
            self.end(step, result.map(|_| ()), finished);
        }
        self.ends = ends;
        self.io.enter();
        progress
    }

    fn unfinished(&self) -> usize {
        self.io.unfinished()
    }
}
