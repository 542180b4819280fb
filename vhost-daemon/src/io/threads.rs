//! Host I/O by blocking calls on a pool of threads, where io_uring is forbidden or lacks an operation.
//!
//! Threads start when there is work that no idle one can take, up to a bound, and end after some idle
//! time. A thread of the pool has no I/O of its own in flight besides its call, so that even a change
//! of the file's length, for which a file system may wait until direct I/O is complete, can wait here.

#![allow(unsafe_code)]

use crate::event::Event;
use crate::io::transfer::Call;
use exd_file::HostFile;
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Most threads of a pool, and so most calls at once (QEMU's thread-pool-max).
const THREADS_MAX: usize = 64;
/// After so much time without work a thread ends.
const IDLE: Duration = Duration::from_secs(10);

/// The threads of a disk.
#[derive(Debug, Default)]
pub struct ThreadPool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

#[derive(Debug)]
struct Job {
    number: usize,
    call: Call,
    file: Arc<HostFile>,
    results: Arc<Results>,
}

// SAFETY: the pointers of `call` refer to memory that its submitter keeps alive and in place until it has
// taken the result, and that is not bound to a thread.
unsafe impl Send for Job {}

#[derive(Debug)]
struct Results {
    list: Mutex<Vec<(usize, i32)>>,
    any: Condvar,
    event: Arc<Event>,
}

impl Results {
    fn list(&self) -> MutexGuard<'_, Vec<(usize, i32)>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, number: usize, result: i32) {
        self.list().push((number, result));
        self.any.notify_all();
        self.event.signal();
    }
}

impl ThreadPool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the jobs and sees to it that somebody does them.
    fn accept(self: &Arc<Self>, jobs: &mut Vec<Job>) {
        let mut state = self.state();
        state.jobs.extend(jobs.drain(..));
        let wanted = state.jobs.len().saturating_sub(state.idle);
        let more = wanted.min(THREADS_MAX - state.threads);
        for _ in 0..more {
            let pool = self.clone();
            let builder = thread::Builder::new().name("io".to_owned());
            if let Err(error) = builder.spawn(move || pool.run()) {
                log::error!("could not start an I/O thread: {error}");
                break;
            }
            state.threads += 1;
        }
        if state.threads == 0 {
            // Better late than never.
            let jobs = std::mem::take(&mut state.jobs);
            drop(state);
            jobs.into_iter().for_each(Job::run);
            return;
        }
        for _ in 0..state.jobs.len().min(state.idle) {
            self.work.notify_one();
        }
    }

    /// What a thread does.
    fn run(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job.run();
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (guard, waited) =
                self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

impl Job {
    fn run(self) {
        // SAFETY: see `Send` above.
        let result = unsafe { perform(&self.call, &self.file, 0) };
        self.results.put(self.number, result);
    }
}

/// Carries out a call, a read or write with these RWF_* flags besides its own; its result or a negative
/// error number.
///
/// # Safety
///
/// The pieces of the call must be valid for the transfer.
pub unsafe fn perform(call: &Call, file: &HostFile, more_flags: i32) -> i32 {
    let fd = file.as_raw_fd();
    let signed = |value: u64| libc::off_t::try_from(value).unwrap_or(libc::off_t::MAX);
    // SAFETY: `fd` is open; the pieces are valid by the caller's promise. The rest are numbers.
    let result = unsafe {
        match *call {
            Call::Read { pieces, count, offset } => {
                libc::preadv2(fd, pieces, count as libc::c_int, signed(offset), more_flags)
            }
            Call::Write { pieces, count, offset, durable } => {
                let flags = more_flags | if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, pieces, count as libc::c_int, signed(offset), flags)
            }
            Call::Fallocate { mode, offset, len } => {
                libc::fallocate(fd, mode, signed(offset), signed(len)) as isize
            }
            Call::Truncate { len } => libc::ftruncate(fd, signed(len)) as isize,
            Call::Sync => libc::fdatasync(fd) as isize,
        }
    };
    if result < 0 {
        // Always set after a failed call.
        return -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    i32::try_from(result).unwrap_or(i32::MAX)
}

/// A thread's access to a pool.
#[derive(Debug)]
pub struct Threads {
    pool: Arc<ThreadPool>,
    file: Arc<HostFile>,
    results: Arc<Results>,
    prepared: Vec<Job>,
}

impl Threads {
    /// Access for the thread that `event` wakes.
    pub fn new(pool: Arc<ThreadPool>, file: Arc<HostFile>, event: Arc<Event>) -> Threads {
        let results = Results { list: Mutex::default(), any: Condvar::new(), event };
        Threads { pool, file, results: Arc::new(results), prepared: Vec::new() }
    }

    /// Prepares a call.
    ///
    /// # Safety
    ///
    /// What the call points to must stay valid and in place until its result has been taken.
    pub unsafe fn push(&mut self, number: usize, call: Call) {
        let (file, results) = (self.file.clone(), self.results.clone());
        self.prepared.push(Job { number, call, file, results });
    }

    /// Hands what was prepared to the pool.
    pub fn submit(&mut self) {
        if !self.prepared.is_empty() {
            self.pool.accept(&mut self.prepared);
        }
    }

    /// Takes results: the number of the call, and what it returned or a negative error number.
    pub fn reap(&mut self, into: &mut Vec<(usize, i32)>) {
        into.append(&mut self.results.list());
    }

    /// Waits until there is a result, at most for `patience`.
    pub fn wait(&mut self, patience: Duration) {
        let list = self.results.list();
        let _ = self.results.any.wait_timeout_while(list, patience, |list| list.is_empty());
    }
}
