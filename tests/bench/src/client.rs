//! A vhost-user-blk client without a virtual machine, on the blkio crate: the front-end that is the same
//! for every back-end measured.

#![allow(unsafe_code)]

use crate::Result;
use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

/// Most ends taken at once.
const ENDS: usize = 64;
/// How long a back-end may stay silent. Far beyond any request; it only ends hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a back-end may take from its socket's name to listening.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Descriptors that a request takes.
const DESCRIPTORS: usize = 3;

/// A request of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read so many bytes at an offset.
    Read(u64, usize),
    /// Write the slot's buffer.
    Write(u64, usize),
    /// Write zeroes; their space may be given back if the flag says so.
    Zero(u64, u64, bool),
    /// Discard.
    Discard(u64, u64),
    /// Flush.
    Flush,
}

/// A connection. Its queues borrow nothing of it, but end before it.
pub struct Connection {
    /// The queues, each for one thread.
    pub queues: Vec<Queue>,
    // Keeps the shared memory; dropped after the queues.
    _device: Blkio,
}

/// A queue with `depth` slots; each slot has a buffer and at most one request in flight.
pub struct Queue {
    queue: Blkioq,
    /// Address of the first slot's buffer.
    buffers: usize,
    slot_size: usize,
    depth: usize,
    in_flight: usize,
}

impl Connection {
    /// Connects with `queues` queues of `depth` slots, whose buffers have `slot_size` bytes.
    pub fn open(socket: &Path, queues: usize, depth: usize, slot_size: usize) -> Result<Self> {
        let mut device = connect(socket)?;
        device.set_i32("num-queues", queues as i32)?;
        let entries = (depth * DESCRIPTORS).next_power_of_two().max(128);
        device.set_i32("queue-size", entries as i32)?;
        let started = device.start()?.queues;
        let share = (depth * slot_size).next_multiple_of(4096);
        let memory = device.alloc_mem_region(share * started.len())?;
        device.map_mem_region(&memory)?;
        let queues = started
            .into_iter()
            .enumerate()
            .map(|(index, queue)| Queue {
                queue,
                buffers: memory.addr + index * share,
                slot_size,
                depth,
                in_flight: 0,
            })
            .collect();
        Ok(Connection { queues, _device: device })
    }
}

/// Connects. A socket has its name before it listens.
fn connect(socket: &Path) -> Result<Blkio> {
    let name = socket.to_str().ok_or("the socket's name is not UTF-8")?;
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", name)?;
        match device.connect() {
            Ok(()) => return Ok(device),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl Queue {
    /// Number of slots.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Bytes of each slot's buffer.
    pub fn slot_size(&self) -> usize {
        self.slot_size
    }

    /// Requests that have not been seen to end.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The first `len` bytes of a slot's buffer.
    pub fn buffer(&mut self, slot: usize, len: usize) -> &mut [u8] {
        assert!(slot < self.depth && len <= self.slot_size);
        let address = self.buffers + slot * self.slot_size;
        // SAFETY: the range is this queue's share of the region, which the connection keeps mapped; the
        // back-end writes to it only while a read of this slot is in flight.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
    }

    /// Starts a request in a free slot. `flush_queue` sends what was started.
    pub fn start(&mut self, slot: usize, op: Op) {
        let address = |len: usize| {
            assert!(slot < self.depth && len <= self.slot_size);
            (self.buffers + slot * self.slot_size) as *mut u8
        };
        let none = ReqFlags::empty();
        match op {
            Op::Read(at, len) => self.queue.read(at, address(len), len, slot, none),
            Op::Write(at, len) => self.queue.write(at, address(len), len, slot, none),
            Op::Zero(at, len, true) => self.queue.write_zeroes(at, len, slot, none),
            Op::Zero(at, len, false) => {
                self.queue.write_zeroes(at, len, slot, ReqFlags::NO_UNMAP);
            }
            Op::Discard(at, len) => self.queue.discard(at, len, slot, none),
            Op::Flush => self.queue.flush(slot, none),
        }
        self.in_flight += 1;
    }

    /// Sends what was started and waits until at least one request has ended; the ends go to `ends` as
    /// (slot, 0 or a negative error number).
    pub fn wait(&mut self, ends: &mut Vec<(usize, i32)>) -> Result<()> {
        ends.clear();
        if self.in_flight == 0 {
            return Ok(());
        }
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; ENDS];
        let deadline = Instant::now() + PATIENCE;
        let mut left = PATIENCE;
        // Interrupted waits return nothing.
        while ends.is_empty() {
            let count = self.queue.do_io(&mut completions, 1, Some(&mut left), None).unwrap_or(0);
            for completion in &completions[..count] {
                // SAFETY: `do_io` has filled so many.
                let completion = unsafe { completion.assume_init_ref() };
                ends.push((completion.user_data, completion.ret));
            }
            left = deadline.saturating_duration_since(Instant::now());
            if ends.is_empty() && left.is_zero() {
                return Err("the back-end does not answer".into());
            }
        }
        self.in_flight -= ends.len();
        Ok(())
    }

    /// Carries out one request alone.
    pub fn carry_out(&mut self, slot: usize, op: Op) -> Result<()> {
        assert_eq!(self.in_flight, 0, "nothing else is in flight");
        self.start(slot, op);
        let mut ends = Vec::new();
        self.wait(&mut ends)?;
        match ends[..] {
            [(_, 0)] => Ok(()),
            _ => Err(format!("{op:?} failed: {ends:?}").into()),
        }
    }
}
