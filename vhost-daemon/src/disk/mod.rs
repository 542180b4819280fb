//! What the queue workers need of a disk, whatever its format.
//!
//! A [`Disk`] is shared; each thread that serves it has a [`Port`] of its own with its own way to the host.
//! Operations end on the thread that submitted them, but the request they belong to may be another
//! thread's: whoever learns that a request is finished passes it on to the thread of its queue.

pub mod exd;
pub mod gate;
pub mod keeper;
pub mod open;
pub mod policy;
pub mod raw;
mod slots;
mod tidy;

use crate::disk::gate::Gate;
use crate::disk::keeper::{Job, Keeper};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use crate::queue::memory::GuestBuffer;
use crate::queue::record::Recorder;
use crate::queue::worker::{Worker, access_of, queue_of};
use exd_file::HostFile;
use exd_image::RequestId;
use exd_image::{Request, RequestError};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// A request on its way to the disk.
#[derive(Debug)]
pub struct Submission {
    /// Its name; says to whom it belongs.
    pub id: RequestId,
    /// What is to be done.
    pub request: Request,
    /// The data of a read or write.
    pub buffer: Option<Arc<GuestBuffer>>,
}

/// A request that has ended.
pub type Finished = (RequestId, Result<(), RequestError>);

/// A thread's access to a disk.
pub trait Port: Send {
    /// Starts the requests of the batch, which is empty afterwards. Some may be finished at once.
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>);

    /// Takes what has ended meanwhile. False if nothing had.
    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool;

    /// Operations on this thread whose end has not been taken.
    fn unfinished(&self) -> usize;

    /// Sees the ends of requests before the guest does, wherever they became known; what it takes out is
    /// not answered yet. Ends of requests that were not submitted here pass untouched.
    fn intercept(&mut self, _finished: &mut Vec<Finished>) {}

    /// Where the thread says when it may be kept waiting for the host, if the port can do that.
    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        None
    }

    /// Somebody waits until nothing is in flight: while this is so, nothing is held back.
    fn hurry(&mut self, _hurry: bool) {}
}

/// What a disk is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Size in bytes, a multiple of the logical block.
    pub capacity: u64,
    /// Smallest unit of requests in bytes.
    pub logical_block: u32,
    /// Unit in bytes below which a write costs more.
    pub physical_block: u32,
    /// Granularity of discards in bytes.
    pub discard_granularity: u32,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Serial number, if nobody chose one.
    pub serial: String,
}

impl Properties {
    /// The same disk with a coarser logical block, for guests or firmware that want one: what does not fill
    /// the last block is not served.
    pub fn with_logical_block(self, block: u32) -> Properties {
        let block = block.max(self.logical_block);
        Properties {
            capacity: self.capacity - self.capacity % u64::from(block),
            logical_block: block,
            physical_block: self.physical_block.max(block),
            ..self
        }
    }
}

/// Who has the image now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    /// We: it is open and locked.
    Held,
    /// We, and it is frozen.
    Frozen,
    /// Nobody, or somebody else: it is closed and unlocked.
    Released,
    /// A ring runs that waits for the lock.
    Awaited,
}

/// A disk that is being served.
///
/// The calls that change its state wait for their end, from any thread but the disk's own, and answer
/// with a text for people when they fail.
pub trait Disk: Send + Sync {
    /// What it is like. The capacity is that of the moment.
    fn properties(&self) -> Properties;

    /// Where its workers see whether they may touch it, and its size.
    fn gate(&self) -> Arc<Gate>;

    /// The image's file.
    fn file(&self) -> &Arc<HostFile>;

    /// The thread that takes the image and gives it up.
    fn keeper(&self) -> &Keeper;

    /// Who has the image.
    fn hold(&self) -> Hold {
        self.keeper().hold()
    }

    /// Changes its size in bytes, a multiple of the logical block. The guest is told.
    fn resize(&self, size: u64) -> Result<(), String> {
        self.keeper().run(Job::Resize(size))
    }

    /// Writes the map out, so that the next opening has nothing to recover.
    fn checkpoint(&self) -> Result<(), String> {
        self.keeper().run(Job::Checkpoint)
    }

    /// Makes the image file stand still: what was acknowledged is in it, consistently and durably, and
    /// until [`Disk::thaw`], or until `limit` is over, nothing in it changes. Reads go on, writes wait.
    fn freeze(&self, limit: Duration) -> Result<(), String> {
        self.keeper().run(Job::Freeze(limit))
    }

    /// Ends a freeze. An error if it has ended already: what was copied since then is not consistent.
    fn thaw(&self) -> Result<(), String> {
        self.keeper().run(Job::Thaw)
    }

    /// Gives the image up, for another process to take over: everything is made durable, the image
    /// closed and unlocked (P9). No ring runs. Even after an error the lock is gone, and the image as
    /// after a crash.
    fn suspend(&self) -> Result<(), String> {
        self.keeper().run(Job::Suspend)
    }

    /// Takes the image back, as [`Gate::knock`] does, and waits for it.
    fn resume(&self) -> Result<(), String> {
        self.keeper().run(Job::Resume)
    }

    /// Access for one thread, whose `event` is signalled when there is something to reap.
    fn port(&self, event: Arc<Event>) -> io::Result<Box<dyn Port>>;

    /// Figures for people and tests.
    fn statistics(&self) -> serde_json::Value;

    /// Closes the disk cleanly. All ports are gone by then.
    fn close(&self) -> Result<(), String> {
        self.keeper().run(Job::Close)
    }
}

/// By which of its sockets a disk is reached. Each has its own queues, numbered from 0, so it is a part
/// of the name of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// The guest's.
    Main,
    /// That of a second front-end, which may only read.
    ReadOnly,
}

impl Access {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Access::Main => "main",
            Access::ReadOnly => "read-only",
        }
    }
}

/// Finds the worker of a request: by the socket its front-end came in, then by its queue. A request may
/// end on a thread of the other front-end, or of none.
#[derive(Debug, Default)]
pub struct Router {
    workers: Mutex<[Vec<Arc<Worker>>; 2]>,
    recorder: OnceLock<Recorder>,
}

impl Router {
    /// Records the requests of all workers from now on. Only the first recorder is used.
    pub fn record(&self, recorder: Recorder) {
        if self.recorder.set(recorder).is_err() {
            log::warn!("requests are recorded already");
        }
    }

    /// What records requests, if something does.
    pub fn recorder(&self) -> Option<&Recorder> {
        self.recorder.get()
    }

    /// Sets the workers of the connection that begins; none when it has ended.
    pub fn set(&self, access: Access, workers: Vec<Arc<Worker>>) {
        self.workers()[access as usize] = workers;
    }

    /// Passes finished requests on to the workers of their queues, and wakes each of these once.
    pub fn deliver(&self, finished: &mut Vec<Finished>) {
        if finished.is_empty() {
            return;
        }
        let all = self.workers();
        let mut woken: Vec<&Arc<Worker>> = Vec::new();
        for (id, result) in finished.drain(..) {
            let workers = &all[access_of(id) as usize];
            let queue = usize::from(queue_of(id));
            let count = workers.len().max(1);
            let Some(worker) = workers.get(queue % count) else {
                log::error!("a request finished after its connection ended");
                continue;
            };
            worker.post((id, result));
            if !woken.iter().any(|known| Arc::ptr_eq(known, worker)) {
                woken.push(worker);
            }
        }
        for worker in woken {
            worker.event().signal();
        }
    }

    /// Makes all workers look at their queues again.
    pub fn wake_all(&self) {
        for worker in self.workers().iter().flatten() {
            worker.event().signal();
        }
    }

    fn workers(&self) -> MutexGuard<'_, [Vec<Arc<Worker>>; 2]> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
