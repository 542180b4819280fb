//! Linux asynchronous writes (io_submit) to a file opened with O_DIRECT.
//!
//! io_submit and not io_uring, because the data corruption these tests are about was found with it, and
//! because the guest's block layer then gets the requests of one call together.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// One memory page: what O_DIRECT buffers are aligned to.
pub const PAGE: usize = 4096;

const IOCB_CMD_PWRITE: u16 = 1;

/// A page-aligned buffer.
pub struct Buffer {
    pages: Vec<Page>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

impl Buffer {
    /// A zeroed buffer of `len` bytes.
    pub fn new(len: usize) -> Self {
        Buffer { pages: vec![Page([0; PAGE]); len.div_ceil(PAGE)], len }
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `pages` owns at least `len` initialised bytes, is borrowed mutably, and Page has no padding.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.len) }
    }
}

/// `struct iocb` of linux/aio_abi.h on a little-endian machine.
#[derive(Clone, Copy)]
#[repr(C)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

struct InFlight {
    iocb: Box<Iocb>,
    buffer: Buffer,
}

/// One AIO context and the requests in it.
///
/// The context owns the buffers of its requests until they are complete, so that the kernel never writes
/// to memory that was given back.
pub struct Context {
    id: libc::c_ulong,
    slots: Vec<Option<InFlight>>,
}

/// A finished request.
pub struct Finished {
    pub tag: usize,
    pub result: io::Result<usize>,
}

impl Context {
    /// A context for up to `depth` requests.
    pub fn new(depth: usize) -> io::Result<Self> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: io_setup writes the context's id to `id`, which lives through the call.
        let code = unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_long, &raw mut id) };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Context { id, slots: Vec::new() })
    }

    /// Number of requests not yet finished.
    pub fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Submits writes in one system call: (tag, buffer, byte offset). Tags are small and unused.
    pub fn write(&mut self, file: &File, requests: Vec<(usize, Buffer, u64)>) -> io::Result<()> {
        let mut list = Vec::new();
        for (tag, buffer, offset) in requests {
            let iocb = Box::new(Iocb {
                data: tag as u64,
                key: 0,
                rw_flags: 0,
                opcode: IOCB_CMD_PWRITE,
                priority: 0,
                file: file.as_raw_fd() as u32,
                buffer: buffer.pages.as_ptr() as u64,
                bytes: buffer.len as u64,
                offset: offset as i64,
                reserved: 0,
                flags: 0,
                result_fd: 0,
            });
            list.push(&raw const *iocb);
            if self.slots.len() <= tag {
                self.slots.resize_with(tag + 1, || None);
            }
            assert!(self.slots[tag].is_none(), "the tag is in flight");
            self.slots[tag] = Some(InFlight { iocb, buffer });
        }
        let mut sent = 0;
        while sent < list.len() {
            // SAFETY: `list` points at iocbs boxed in `slots`, whose buffers stay there until completion.
            let code = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.id,
                    list.len() - sent,
                    list[sent..].as_ptr(),
                )
            };
            if code < 0 {
                return Err(io::Error::last_os_error());
            }
            sent += code as usize;
        }
        Ok(())
    }

    /// Waits for at least one request and returns those that are finished.
    pub fn wait(&mut self) -> io::Result<Vec<Finished>> {
        let mut events = [Event::default(); 64];
        let null = std::ptr::null_mut::<libc::timespec>();
        // SAFETY: the kernel writes at most 64 events into `events`.
        let code = unsafe {
            libc::syscall(libc::SYS_io_getevents, self.id, 1, 64, events.as_mut_ptr(), null)
        };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut finished = Vec::new();
        for event in events.iter().take(code as usize) {
            let tag = event.data as usize;
            let request = self.slots[tag].take().expect("the kernel finishes what was submitted");
            debug_assert_eq!(request.iocb.data, event.data);
            let result = if event.result < 0 {
                Err(io::Error::from_raw_os_error(-event.result as i32))
            } else if event.result as usize != request.buffer.len {
                Err(io::Error::other(format!("short transfer of {} bytes", event.result)))
            } else {
                Ok(event.result as usize)
            };
            finished.push(Finished { tag, result });
        }
        Ok(finished)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: io_destroy waits for what is in flight, so the buffers are free to go afterwards.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}
