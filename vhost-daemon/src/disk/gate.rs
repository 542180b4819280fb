//! What everybody who serves a disk sees of it at once: whether it may be touched now, its size, and
//! whether a checkpoint is under way.

use crate::event::Event;
use crate::stats::Checkpoints;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Called with the capacity when it has changed.
type Listener = Box<dyn Fn(u64) + Send + Sync>;

/// The gate in front of a disk. It is closed while the image is not ours (P9): requests then wait in
/// their rings.
pub struct Gate {
    open: AtomicBool,
    capacity: AtomicU64,
    wanted: AtomicBool,
    /// Rings of a front-end that only reads are running.
    reader_runs: AtomicBool,
    /// It is open, or wanted open, for that one alone.
    for_reader: AtomicBool,
    checkpoints: Arc<Checkpoints>,
    /// Signalled when somebody wants it open.
    wish: Arc<Event>,
    listeners: Mutex<Vec<Listener>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("open", &self.is_open())
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate before a disk of so many bytes.
    pub fn new(open: bool, capacity: u64) -> io::Result<Gate> {
        Ok(Gate {
            open: AtomicBool::new(open),
            capacity: AtomicU64::new(capacity),
            wanted: AtomicBool::new(false),
            reader_runs: AtomicBool::new(false),
            for_reader: AtomicBool::new(false),
            checkpoints: Arc::default(),
            wish: Arc::new(Event::new()?),
            listeners: Mutex::default(),
        })
    }

    /// Requests may go to the disk.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Lets requests through, or not.
    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Release);
    }

    /// A ring has started, and the gate is closed.
    pub fn knock(&self) {
        if !self.wanted.swap(true, Ordering::AcqRel) {
            self.wish.signal();
        }
    }

    /// Rings of a front-end that only reads run from now on, or have stopped.
    pub fn set_reader_runs(&self, runs: bool) {
        self.reader_runs.store(runs, Ordering::SeqCst);
    }

    /// A front-end that only reads wants the image, and there is no other.
    pub fn knock_for_reader(&self) {
        self.for_reader.store(true, Ordering::SeqCst);
        self.knock();
    }

    /// Whether the image was taken for a front-end that only reads; false from then on.
    pub fn take_for_reader(&self) -> bool {
        self.for_reader.swap(false, Ordering::SeqCst)
    }

    /// The guest's front-end is gone: one that only reads may have waited for that.
    pub fn guest_left(&self) {
        if self.reader_runs.load(Ordering::SeqCst) && !self.is_open() {
            self.knock_for_reader();
        }
    }

    /// Somebody has knocked since the last call.
    pub fn take_knock(&self) -> bool {
        self.wanted.swap(false, Ordering::AcqRel)
    }

    /// Signalled when somebody knocks.
    pub fn wish(&self) -> &Arc<Event> {
        &self.wish
    }

    /// When the image's format makes checkpoints.
    pub fn checkpoints(&self) -> &Arc<Checkpoints> {
        &self.checkpoints
    }

    /// Size of the disk in bytes, now.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// The size has changed, or was read again: tells the guest if it is another one.
    pub fn set_capacity(&self, bytes: u64) {
        if self.capacity.swap(bytes, Ordering::AcqRel) != bytes {
            let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
            listeners.iter().for_each(|listener| listener(bytes));
        }
    }

    /// Names one more who is told of another capacity. It must not wait for the front-end.
    pub fn listen(&self, listener: Listener) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }
}
