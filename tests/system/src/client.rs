//! A vhost-user-blk client without a virtual machine, on the blkio crate.

#![allow(unsafe_code)]

use crate::daemon::PATIENCE;
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use std::fmt;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

/// Most completions taken at once.
const COMPLETIONS: usize = 64;

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of queues.
    pub queues: usize,
    /// Entries of each queue; a request takes three.
    pub queue_size: usize,
    /// Bytes of memory shared with the daemon.
    pub memory: usize,
    /// The disk may be read-only.
    pub read_only: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { queues: 1, queue_size: 128, memory: 4 << 20, read_only: false }
    }
}

/// How a request ended: its tag, and 0 or a negative error number.
pub type End = (usize, i32);

/// A request that was answered with an error.
#[derive(PartialEq, Eq)]
pub struct Failed {
    what: &'static str,
    offset: u64,
    len: u64,
    /// As blkio tells it, negative.
    error: i32,
}

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failed { what, offset, len, error } = self;
        let error = std::io::Error::from_raw_os_error(-error);
        write!(f, "{what} of {len} bytes at {offset} failed: {error}")
    }
}

/// A connection.
pub struct Client {
    // Dropped in this order: the queues before the device that owns their memory.
    queues: Vec<Blkioq>,
    memory: MemoryRegion,
    device: Blkio,
    in_flight: Vec<usize>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path, options: Options) -> blkio::Result<Client> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", socket.to_str().expect("a UTF-8 name"))?;
        device.set_bool("read-only", options.read_only)?;
        device.connect()?;
        device.set_i32("num-queues", options.queues as i32)?;
        device.set_i32("queue-size", options.queue_size as i32)?;
        let queues = device.start()?.queues;
        let memory = device.alloc_mem_region(options.memory)?;
        device.map_mem_region(&memory)?;
        Ok(Client { in_flight: vec![0; queues.len()], queues, memory, device })
    }

    /// Connects with the default options; the daemon must be there.
    pub fn new(socket: &Path) -> Client {
        Client::connect(socket, Options::default()).expect("connected")
    }

    /// A property of the device that is a number.
    pub fn number(&self, property: &str) -> u64 {
        let wide = self.device.get_u64(property);
        wide.unwrap_or_else(|_| self.device.get_i32(property).expect("a number") as u64)
    }

    /// Bytes `at .. at + len` of the shared memory.
    pub fn memory(&mut self, at: usize, len: usize) -> &mut [u8] {
        assert!(at + len <= self.memory.len);
        // SAFETY: the region is mapped for as long as `self` lives and the range lies inside. The daemon
        // writes to it only while a read is in flight that the test has not taken the end of.
        unsafe { std::slice::from_raw_parts_mut((self.memory.addr + at) as *mut u8, len) }
    }

    fn address(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at + len <= self.memory.len);
        (self.memory.addr + at) as *mut u8
    }

    fn queue(&mut self, queue: usize) -> &mut Blkioq {
        self.in_flight[queue] += 1;
        &mut self.queues[queue]
    }

    /// Starts a read into the shared memory at `at`.
    pub fn start_read(&mut self, queue: usize, offset: u64, at: usize, len: usize, tag: usize) {
        let address = self.address(at, len);
        self.queue(queue).read(offset, address, len, tag, ReqFlags::empty());
    }

    /// Starts a write from the shared memory at `at`.
    pub fn start_write(&mut self, queue: usize, offset: u64, at: usize, len: usize, tag: usize) {
        let address = self.address(at, len);
        self.queue(queue).write(offset, address, len, tag, ReqFlags::empty());
    }

    /// Starts a flush.
    pub fn start_flush(&mut self, queue: usize, tag: usize) {
        self.queue(queue).flush(tag, ReqFlags::empty());
    }

    /// Starts a discard.
    pub fn start_discard(&mut self, queue: usize, offset: u64, len: u64, tag: usize) {
        self.queue(queue).discard(offset, len, tag, ReqFlags::empty());
    }

    /// Starts a write of zeroes.
    pub fn start_zeroes(&mut self, queue: usize, offset: u64, len: u64, unmap: bool, tag: usize) {
        let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
        self.queue(queue).write_zeroes(offset, len, tag, flags);
    }

    /// Requests of the queue that have not been seen to end.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.in_flight[queue]
    }

    /// Tells the daemon what was started, and takes ends: at least one if `wait` is given and one comes
    /// in that time.
    pub fn ends(&mut self, queue: usize, wait: Option<Duration>) -> Vec<End> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; COMPLETIONS];
        let least = usize::from(wait.is_some() && self.in_flight[queue] > 0);
        let mut timeout = wait.unwrap_or(Duration::ZERO);
        let result = self.queues[queue].do_io(&mut completions, least, Some(&mut timeout), None);
        // What had ended before the time was out is kept by blkio for the next call.
        let count = result.unwrap_or(0);
        self.in_flight[queue] -= count;
        completions[..count]
            .iter()
            // SAFETY: `do_io` has filled so many.
            .map(|completion| unsafe { completion.assume_init_ref() })
            .map(|completion| (completion.user_data, completion.ret))
            .collect()
    }

    /// Waits for the end of the only request in flight on queue 0.
    fn only_end(&mut self, what: &'static str, offset: u64, len: u64) -> Result<(), Failed> {
        let ends = self.ends(0, Some(PATIENCE));
        assert_eq!(ends.len(), 1, "the daemon answers a {what} of {len} bytes at {offset}");
        match ends[0].1 {
            0 => Ok(()),
            error => Err(Failed { what, offset, len, error }),
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, Failed> {
        self.start_read(0, offset, 0, len, 0);
        self.only_end("read", offset, len as u64)?;
        Ok(self.memory(0, len).to_vec())
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Failed> {
        self.memory(0, data.len()).copy_from_slice(data);
        self.start_write(0, offset, 0, data.len(), 0);
        self.only_end("write", offset, data.len() as u64)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<(), Failed> {
        self.start_flush(0, 0);
        self.only_end("flush", 0, 0)
    }

    /// Discards.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), Failed> {
        self.start_discard(0, offset, len, 0);
        self.only_end("discard", offset, len)
    }

    /// Writes zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), Failed> {
        self.start_zeroes(0, offset, len, unmap, 0);
        self.only_end("write of zeroes", offset, len)
    }
}
