//! For the fuzz target and its test: a worker on rings, descriptors, headers and an inflight region that an
//! input makes up, in front of a disk that only checks what it is asked (P8).
//!
//! An input is a list of steps. Whatever they are, nothing panics, the worker comes to an end, and what
//! reaches the disk is within the disk and within the guest's memory.

use crate::disk::gate::Gate;
use crate::disk::{Access, Finished, Port, Router, Submission};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use crate::queue::errors::RingErrors;
use crate::queue::inflight::{Inflight, Layout, Region};
use crate::queue::memory::{Memory, SharedMemory};
use crate::queue::request::Rules;
use crate::queue::worker::{Context, Vring, Worker};
use crate::stats::Monitor;
use exd_image::{Request, RequestError, StorageError};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Bytes of each of the two regions of guest memory.
const REGION: u64 = 0x10000;
const SECOND: u64 = 0x10_0000;
/// Where the rings lie unless the input says otherwise.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const QUEUE_MAX: u16 = 256;
const CAPACITY: u64 = 1 << 20;
const STEPS_MAX: usize = 1000;
/// More than a worker with one queue.
const WORKER_EVENT: usize = 1;

/// What an input has led to.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Requests that reached the disk.
    pub submitted: usize,
    /// Used entries, if their index is in memory.
    pub used: u16,
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let taken = std::array::from_fn(|i| self.0.get(i).copied().unwrap_or(0));
        self.0 = self.0.get(N..).unwrap_or_default();
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// A guest address: most are in memory, or just not.
    fn address(&mut self) -> u64 {
        match self.byte() {
            choice @ 0..=127 => HEADERS + u64::from(choice) * 16,
            choice @ 128..=199 => SECOND + u64::from(choice - 128) * 512,
            200..=219 => u64::from(self.u16()),
            220..=229 => REGION - u64::from(self.byte()),
            230..=239 => SECOND + REGION - u64::from(self.byte()),
            240..=247 => u64::MAX - u64::from(self.byte()),
            _ => self.u64(),
        }
    }

    fn length(&mut self) -> u32 {
        match self.byte() {
            0..=63 => 16,
            64..=127 => 512,
            128..=159 => 1,
            choice @ 160..=199 => u32::from(choice - 159) * 4096,
            200..=239 => u32::from(self.u16()),
            _ => self.u32(),
        }
    }
}

/// The disk: holds requests until the input lets them end.
#[derive(Default)]
struct Fake {
    held: Vec<Submission>,
    release: usize,
    fail: bool,
    submitted: usize,
    hosts: Vec<Range<usize>>,
}

impl Fake {
    /// What the worker lets through must be in order.
    fn check(&self, submission: &Submission) {
        let within = |offset: u64, len: u64| {
            assert!(
                len > 0 && offset.is_multiple_of(512) && len.is_multiple_of(512),
                "whole blocks"
            );
            assert!(offset < CAPACITY && len <= CAPACITY - offset, "within the disk");
        };
        match submission.request {
            Request::Read { offset, len }
            | Request::Write { offset, len, .. }
            | Request::WriteZeroes { offset, len, .. }
            | Request::Discard { offset, len } => within(offset, len),
            _ => {}
        }
        let Some(buffer) = &submission.buffer else { return };
        buffer.visit(0, buffer.len(), |range| {
            let end = range.addr + range.len;
            let inside = |host: &Range<usize>| host.start <= range.addr && end <= host.end;
            assert!(self.hosts.iter().any(inside), "within the guest's memory");
        });
    }

    fn end(&mut self, finished: &mut Vec<Finished>) -> bool {
        let count = self.release.min(self.held.len());
        self.release -= count;
        for submission in self.held.drain(..count) {
            if let (Request::Read { .. }, Some(buffer)) = (submission.request, &submission.buffer) {
                buffer.zero(0, buffer.len());
            }
            let failed = Err(RequestError::Storage(StorageError::Unsupported));
            finished.push((submission.id, if self.fail { failed } else { Ok(()) }));
        }
        count > 0
    }
}

#[derive(Clone, Default)]
struct FakePort {
    fake: Arc<Mutex<Fake>>,
    lone_calls: LoneCalls,
}

impl FakePort {
    fn fake(&self) -> MutexGuard<'_, Fake> {
        self.fake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port for FakePort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        if self.lone_calls.is_wanted() {
            self.lone_calls.returned(Duration::ZERO);
        }
        let mut fake = self.fake();
        for submission in batch.drain(..) {
            fake.check(&submission);
            fake.submitted += 1;
            fake.held.push(submission);
        }
        fake.end(finished);
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        self.fake().end(finished)
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        Some(&mut self.lone_calls)
    }

    fn unfinished(&self) -> usize {
        self.fake().held.len()
    }
}

/// Runs an input.
pub fn exercise(data: &[u8]) -> Outcome {
    let mut input = Input(data);
    let ranges = [(GuestAddress(0), REGION as usize), (GuestAddress(SECOND), REGION as usize)];
    let Ok(memory) = Memory::from_ranges(&ranges) else { return Outcome::default() };
    let port = FakePort::default();
    port.fake().hosts = memory
        .iter()
        .map(|region| region.as_ptr() as usize..region.as_ptr() as usize + region.len() as usize)
        .collect();
    let shared = SharedMemory::new(memory.clone());
    let flags = input.byte();
    let inflight = Arc::new(Inflight::default());
    if flags & 1 != 0 {
        inflight.set(region(&mut input));
    }
    let Some((vring, size)) = vring(&mut input, flags, &memory, &shared) else {
        return Outcome::default();
    };
    let Ok(gate) = Gate::new(true, CAPACITY) else { return Outcome::default() };
    let context = context(flags, gate, shared, inflight);
    let Ok(event) = Event::new() else { return Outcome::default() };
    let worker = Worker::new(Arc::new(context), Box::new(port.clone()), Arc::new(event), 0, 1, 1);
    steps(&mut input, &memory, size, &worker, &[vring], &port);
    Outcome {
        submitted: port.fake().submitted,
        used: memory.read_obj(GuestAddress(USED + 2)).unwrap_or(0),
    }
}

fn steps(
    input: &mut Input<'_>,
    memory: &Memory,
    size: u16,
    worker: &Worker,
    vrings: &[Vring],
    port: &FakePort,
) {
    // Outside memory nothing is written; the rings may be there as well.
    let mut avail = 0u16;
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0 => {
                let (at, value) = (input.address(), input.u64());
                let _ = memory.write_obj(value, GuestAddress(at));
            }
            1 => {
                let at = match input.byte() {
                    slot @ 0..=191 => u64::from(u16::from(slot) % size) * 16,
                    _ => input.address(),
                };
                let _ = memory.write_obj(input.address(), GuestAddress(at));
                let _ = memory.write_obj(input.length(), GuestAddress(at.wrapping_add(8)));
                let _ =
                    memory.write_obj(u16::from(input.byte()), GuestAddress(at.wrapping_add(12)));
                let _ =
                    memory.write_obj(u16::from(input.byte()), GuestAddress(at.wrapping_add(14)));
            }
            2 => {
                let at = HEADERS + u64::from(input.byte() % 128) * 16;
                let _ = memory.write_obj(u32::from(input.byte()), GuestAddress(at));
                let _ = memory.write_obj(u64::from(input.u16()), GuestAddress(at + 8));
            }
            3 => {
                let slot = AVAIL + 4 + u64::from(avail % size) * 2;
                let _ = memory.write_obj(u16::from(input.byte()), GuestAddress(slot));
                avail = avail.wrapping_add(1);
                let _ = memory.store(avail, GuestAddress(AVAIL + 2), Ordering::Release);
            }
            4 => {
                avail = input.u16();
                let _ = memory.store(avail, GuestAddress(AVAIL + 2), Ordering::Release);
            }
            5 | 6 => worker.handle_event(0, vrings),
            _ => {
                let count = input.byte();
                let mut fake = port.fake();
                fake.fail = count & 1 != 0;
                fake.release = usize::from(count >> 1);
                drop(fake);
                worker.handle_event(WORKER_EVENT, vrings);
            }
        }
    }
    port.fake().release = usize::MAX;
    // So that the drain finds everything ended and need not wait for a thread that is not there.
    worker.handle_event(WORKER_EVENT, vrings);
    worker.drain();
    assert_eq!(port.unfinished(), 0, "everything has ended");
}

/// A ring, mostly where it belongs; `None` if the library would refuse it.
fn vring(
    input: &mut Input<'_>,
    flags: u8,
    memory: &Memory,
    shared: &SharedMemory,
) -> Option<(Vring, u16)> {
    let size = 1u16 << (input.byte() % 9);
    let vring = Vring::new(shared.clone(), QUEUE_MAX).ok()?;
    vring.set_queue_size(size);
    let [mut desc, mut avail, mut used] = [0, AVAIL, USED];
    if flags & 4 != 0 {
        [desc, avail, used] = [input.address(), input.address(), input.address()];
    }
    vring.set_queue_info(desc, avail, used).ok()?;
    // As the library does at SET_VRING_ADDR.
    let next_used = memory.load(GuestAddress(used.checked_add(2)?), Ordering::Relaxed).ok()?;
    vring.set_queue_next_used(next_used);
    vring.set_queue_event_idx(flags & 8 != 0);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    Some((vring, size))
}

/// An inflight region with what the input has for it.
fn region(input: &mut Input<'_>) -> Option<Arc<Region>> {
    let entries = 1u16 << (input.byte() % 9);
    let layout = Layout { queues: 1, entries };
    let (_, fd) = Region::create(layout).ok()?;
    let file = File::from(fd);
    let len = usize::from(input.byte()) * 2;
    let bytes = &input.0[..len.min(input.0.len()).min(layout.bytes())];
    file.write_all_at(bytes, 0).ok()?;
    input.0 = &input.0[bytes.len()..];
    Region::map(file.into(), 0, layout).ok().map(Arc::new)
}

fn context(flags: u8, gate: Gate, memory: SharedMemory, inflight: Arc<Inflight>) -> Context {
    Context {
        rules: rules(flags, gate),
        writeback: Arc::new(AtomicBool::new(flags & 2 != 0)),
        memory,
        router: Arc::new(Router::default()),
        monitor: Arc::new(Monitor::new("fuzz", Access::Main, 1, Arc::default())),
        inflight,
        errors: Arc::new(RingErrors::default()),
        poll: Duration::ZERO,
    }
}

fn rules(flags: u8, gate: Gate) -> Rules {
    Rules {
        gate: Arc::new(gate),
        log: Arc::default(),
        read_only: flags & 16 != 0,
        block_size: 512,
        max_range_sectors: 1024,
        max_ranges: 8,
        serial: [7; 20],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestRegionMmap, MmapRegion};

    /// A descriptor step.
    fn desc(slot: u8, address: u8, length: u8, flags: u8, next: u8) -> [u8; 6] {
        [1, slot, address, length, flags, next]
    }

    /// Steps that read or write a sector.
    fn request(kind: u8) -> Vec<u8> {
        let data_flags = if kind == 0 { 3 } else { 1 };
        let mut steps = vec![0, 4];
        steps.extend([2, 0, kind, 3, 0]);
        steps.extend(desc(0, 0, 0, 1, 1));
        steps.extend(desc(1, 140, 64, data_flags, 2));
        steps.extend(desc(2, 5, 128, 2, 0));
        steps.extend([3, 0, 5]);
        steps
    }

    #[test]
    fn a_plain_request_reaches_the_disk_and_is_answered() {
        for kind in [0, 1] {
            let held = request(kind);
            assert_eq!(exercise(&held), Outcome { submitted: 1, used: 1 });
        }
        // Refused: an unknown kind.
        assert_eq!(exercise(&request(77)), Outcome { submitted: 0, used: 1 });
    }

    /// A front-end adds memory and the guest uses it at once, all between the moments in which the worker looks
    /// at the memory map and at the ring. The log of dirty pages keeps the worker there.
    #[test]
    fn memory_added_while_a_ring_is_looked_at_counts_for_what_is_found_there() {
        const STATUS: u64 = HEADERS + 16;
        let first = Memory::from_ranges(&[(GuestAddress(0), REGION as usize)]).expect("memory");
        let mapped = MmapRegion::new(REGION as usize).expect("mapped");
        let more = GuestRegionMmap::new(mapped, GuestAddress(SECOND)).expect("in range");
        let both = first.insert_region(Arc::new(more)).expect("apart");
        let shared = SharedMemory::new(first.clone());
        let (vring, _) = vring(&mut Input(&[4]), 0, &first, &shared).expect("a ring");
        let gate = Gate::new(true, CAPACITY).expect("a gate");
        let context = context(0, gate, shared.clone(), Arc::default());
        let log = context.rules.log.clone();
        log.set_on(true);
        let port = FakePort::default();
        port.fake().release = 1;
        port.fake().hosts = both
            .iter()
            .map(|region| region.as_ptr() as usize)
            .map(|start| start..start + REGION as usize)
            .collect();
        let event = Arc::new(Event::new().expect("an event"));
        let worker = Worker::new(Arc::new(context), Box::new(port.clone()), event, 0, 1, 1);

        let held = log.hold();
        std::thread::scope(|scope| {
            let kicked = scope.spawn(|| worker.handle_event(0, &[vring]));
            // It wants no kicks any more: the next it does is to mark that, and to look at the ring.
            while first.load::<u16>(GuestAddress(USED), Ordering::Acquire).expect("in memory") == 0
            {
                assert!(!kicked.is_finished(), "the log keeps it waiting");
                std::thread::yield_now();
            }
            shared.lock().expect("nobody has failed").replace(both.clone());
            both.write_obj(1u32, GuestAddress(HEADERS)).expect("in memory");
            both.write_obj(0xffu8, GuestAddress(STATUS)).expect("in memory");
            let chain = [(HEADERS, 16u32, 1u16), (SECOND, 512, 1), (STATUS, 1, 2)];
            for (slot, (addr, len, flags)) in (0u16..).zip(chain) {
                let at = u64::from(slot) * 16;
                both.write_obj(addr, GuestAddress(at)).expect("in memory");
                both.write_obj(len, GuestAddress(at + 8)).expect("in memory");
                both.write_obj(flags, GuestAddress(at + 12)).expect("in memory");
                both.write_obj(slot + 1, GuestAddress(at + 14)).expect("in memory");
            }
            both.store(1u16, GuestAddress(AVAIL + 2), Ordering::Release).expect("in memory");
            drop(held);
        });
        assert_eq!(both.read_obj::<u8>(GuestAddress(STATUS)).expect("in memory"), 0);
        assert_eq!(port.fake().submitted, 1);
    }

    /// Makes flush `number` available: a header and a status byte, in descriptors of their own.
    fn offer_flush(memory: &Memory, number: u16) {
        let head = number * 2;
        let status = HEADERS + 16;
        memory.write_obj(4u32, GuestAddress(HEADERS)).expect("in memory");
        for (slot, addr, len, flags) in [(head, HEADERS, 16u32, 1u16), (head + 1, status, 1, 2)] {
            let at = u64::from(slot) * 16;
            memory.write_obj(addr, GuestAddress(at)).expect("in memory");
            memory.write_obj(len, GuestAddress(at + 8)).expect("in memory");
            memory.write_obj(flags, GuestAddress(at + 12)).expect("in memory");
            memory.write_obj(slot + 1, GuestAddress(at + 14)).expect("in memory");
        }
        let slot = AVAIL + 4 + u64::from(number) * 2;
        memory.write_obj(head, GuestAddress(slot)).expect("in memory");
        memory.store(number + 1, GuestAddress(AVAIL + 2), Ordering::Release).expect("in memory");
    }

    /// A port whose calls return at once. During each the guest may ask for more.
    struct LonePort {
        lone: LoneCalls,
        memory: Memory,
        meanwhile: bool,
        offered: u16,
        here: Arc<Mutex<Vec<bool>>>,
    }

    impl Port for LonePort {
        fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
            for submission in batch.drain(..) {
                let here = self.lone.is_wanted();
                self.here.lock().expect("nobody has failed").push(here);
                if here {
                    self.lone.returned(Duration::ZERO);
                }
                if self.meanwhile && self.offered < 64 {
                    offer_flush(&self.memory, self.offered);
                    self.offered += 1;
                }
                finished.push((submission.id, Ok(())));
            }
        }

        fn reap(&mut self, _: &mut Vec<Finished>) -> bool {
            false
        }

        fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
            Some(&mut self.lone)
        }

        fn unfinished(&self) -> usize {
            0
        }
    }

    /// How many of 64 flushes the thread of a queue may make its calls for. The guest asks for so many at once,
    /// and maybe for another during each.
    fn lone_calls_of_a_guest(at_once: u16, meanwhile: bool, poll: Duration) -> usize {
        let memory = Memory::from_ranges(&[(GuestAddress(0), REGION as usize)]).expect("memory");
        let shared = SharedMemory::new(memory.clone());
        let (vring, _) = vring(&mut Input(&[7]), 0, &memory, &shared).expect("a ring");
        let gate = Gate::new(true, CAPACITY).expect("a gate");
        let context = Arc::new(Context { poll, ..context(0, gate, shared, Arc::default()) });
        let here = Arc::new(Mutex::new(Vec::new()));
        let port = LonePort {
            lone: LoneCalls::default(),
            memory: memory.clone(),
            meanwhile,
            offered: at_once,
            here: here.clone(),
        };
        let event = Arc::new(Event::new().expect("an event"));
        let worker = Worker::new(context, Box::new(port), event, 0, 1, 1);
        for number in 0..64 {
            if number % at_once == 0 && !(meanwhile && number > 0) {
                (number..number + at_once).for_each(|number| offer_flush(&memory, number));
            }
            worker.handle_event(0, std::slice::from_ref(&vring));
        }
        let here = here.lock().expect("nobody has failed");
        assert_eq!(here.len(), 64);
        here.iter().filter(|here| **here).count()
    }

    /// The thread of a queue may be kept waiting for the one thing that its guest waits for as well, and not
    /// often if requests turn out to come meanwhile.
    #[test]
    fn who_asks_for_more_is_not_kept_waiting() {
        assert_eq!(lone_calls_of_a_guest(1, false, Duration::ZERO), 64);
        assert_eq!(lone_calls_of_a_guest(1, true, Duration::ZERO), 4);
        assert_eq!(lone_calls_of_a_guest(2, false, Duration::ZERO), 0);
        // A thread that polls is not to sleep.
        assert_eq!(lone_calls_of_a_guest(1, false, Duration::from_micros(1)), 0);
    }

    /// The fuzz target, without the fuzzer.
    #[test]
    fn p8_random_steps() {
        let mut state = 1u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut submitted = 0;
        for _ in 0..5000 {
            let kind = [0, 0, 1, 1, 4, 8, 11, 13][random() as usize % 8];
            let mut data = request(kind);
            for _ in 0..random() % 4 {
                // Behind the flags and the size of the ring.
                let at = 2 + random() as usize % (data.len() - 2);
                data[at] = random() as u8;
            }
            let again = data[2..].to_vec();
            data.extend(again);
            data[0] = random() as u8;
            if random() % 8 != 0 {
                // The rings are where they belong.
                data[0] &= !4;
            }
            if data[0] & 1 != 0 {
                // Half of the regions are fresh.
                let fresh = random() % 2 == 0;
                let region: Vec<u8> =
                    (0..16).map(|_| if fresh { 0 } else { random() as u8 }).collect();
                data.splice(1..1, [4, 8].into_iter().chain(region));
            }
            submitted += exercise(&data).submitted;
        }
        assert!(submitted > 500, "most inputs come to nothing: {submitted}");
    }
}
