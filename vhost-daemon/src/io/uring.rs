//! Host I/O through io_uring.

#![allow(unsafe_code)]

use crate::event::Event;
use crate::io::transfer::Call;
use exd_file::HostFile;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Entries of the submission queue.
const ENTRIES: u32 = 256;
/// Entries of the completion queue, and so the most operations in the kernel.
pub const COMPLETIONS: usize = 4 * ENTRIES as usize;

/// An io_uring on one file.
pub struct Ring {
    ring: IoUring,
    /// Linux before 6.9 cannot set a file's length.
    truncates: bool,
    file: Arc<HostFile>,
}

/// Whether this process may use io_uring.
pub fn probe() -> io::Result<()> {
    IoUring::new(1).map(|_| ())
}

impl Ring {
    /// A ring on `file` that signals `event` at completions.
    pub fn new(file: Arc<HostFile>, event: &Event) -> io::Result<Ring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETIONS as u32);
        // Completions are taken when the thread enters the kernel anyway; by default each interrupts it.
        let mut quiet = builder.clone();
        quiet.setup_coop_taskrun().setup_taskrun_flag();
        // Linux before 5.19 does not know these.
        let ring = quiet.build(ENTRIES).or_else(|_| builder.build(ENTRIES))?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let mut probe = Probe::new();
        let truncates = ring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::Ftruncate::CODE);
        Ok(Ring { ring, truncates, file })
    }

    /// The kernel has an operation for this call.
    pub fn knows(&self, call: &Call) -> bool {
        self.truncates || !matches!(call, Call::Truncate { .. })
    }

    /// There is no room for another call until some have been submitted.
    pub fn is_full(&mut self) -> bool {
        self.ring.submission().is_full()
    }

    /// Prepares a call.
    ///
    /// # Safety
    ///
    /// What the call points to must stay valid and in place until its result has been taken.
    pub unsafe fn push(&mut self, number: usize, call: Call) {
        let file = types::Fd(self.file.as_raw_fd());
        // SAFETY: by the caller's promise; `file` keeps the descriptor open.
        unsafe {
            let entry = entry(file, call).user_data(number as u64);
            self.ring.submission().push(&entry).expect("there is room");
        }
    }

    /// Hands what was prepared to the kernel. False if it is to be tried again after completions have
    /// been taken.
    pub fn submit(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // Completions must be taken first, or the kernel is short of memory. The entries stay
                // in the queue.
                Err(_) => return false,
            }
        }
        true
    }

    /// Takes results: the number of the call, and what it returned or a negative error number.
    pub fn reap(&mut self, into: &mut Vec<(usize, i32)>) {
        if self.ring.submission().taskrun() {
            // There are completions that the kernel puts into the queue when it is entered. A thread that
            // polls does not enter it otherwise. What cannot be submitted now stays for `submit`.
            let _ = self.ring.submit();
        }
        let ends = self.ring.completion();
        into.extend(ends.map(|entry| (entry.user_data() as usize, entry.result())));
    }

    /// Submits, and blocks until there is a result.
    pub fn wait(&mut self) {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                _ => panic!("io_uring_enter: {error}"),
            },
        }
    }
}

/// # Safety
///
/// The call must have as many pieces as it says.
unsafe fn entry(file: types::Fd, call: Call) -> squeue::Entry {
    match call {
        Call::Read { pieces, count: 1, offset } => {
            // SAFETY: by the caller's promise.
            let piece = unsafe { *pieces };
            let len = piece.iov_len as u32;
            opcode::Read::new(file, piece.iov_base.cast(), len).offset(offset).build()
        }
        Call::Read { pieces, count, offset } => {
            opcode::Readv::new(file, pieces, count).offset(offset).build()
        }
        Call::Write { pieces, count: 1, offset, durable } => {
            // SAFETY: as above.
            let piece = unsafe { *pieces };
            let len = piece.iov_len as u32;
            opcode::Write::new(file, piece.iov_base.cast(), len)
                .offset(offset)
                .rw_flags(rw_flags(durable))
                .build()
        }
        Call::Write { pieces, count, offset, durable } => opcode::Writev::new(file, pieces, count)
            .offset(offset)
            .rw_flags(rw_flags(durable))
            .build(),
        Call::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(file, len).offset(offset).mode(mode).build()
        }
        Call::Truncate { len } => opcode::Ftruncate::new(file, len).build(),
        Call::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

fn rw_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}
