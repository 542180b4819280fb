//! A thread's share of the queues: takes requests out of the rings, passes them to the disk, and shows
//! the guest what is finished.
//!
//! The back-end library calls [`Worker::handle_event`] on the worker's thread; the control thread may
//! join in while it waits for a queue to run dry. Popping and counting happen under one lock, so that
//! a count of zero means what it says.

use crate::disk::{Access, Finished, Port, Router, Submission};
use crate::event::Event;
use crate::queue::chain::{self, Table};
use crate::queue::dirty_log::DirtyLog;
use crate::queue::errors::RingErrors;
use crate::queue::inflight::{Inflight, QueueCells, Tracker};
use crate::queue::memory::{GuestBuffer, Memory, MemoryView, Piece, SharedMemory};
use crate::queue::record::Recorder;
use crate::queue::request::{self, Command, Flaw, IOERR, OK, Parsed, Reply, Rules, UNSUPP};
use crate::queue::used::UsedRing;
use crate::scope;
use crate::stats::{Kind, Monitor, QueueStats, Start};
use exd_image::{Request, RequestError};
use exd_image::{RequestId, StorageError};
use log::Level;
use std::fmt;
use std::num::Wrapping;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{Queue as VirtQueue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

/// A queue as the back-end library keeps it.
pub type Vring = VringMutex<SharedMemory>;
type RingState = VringState<SharedMemory>;

/// Largest queue offered.
pub const QUEUE_SIZE_MAX: usize = 1024;
/// How often a queue is emptied in a row before others get their turn.
const PASSES_MAX: usize = 4;
/// How long a thread may take for one round of its event loop before it counts as gone.
const ROUND_PATIENCE: Duration = Duration::from_secs(5);
/// How long a ring that is stopped at its start waits for the image, and how often it looks.
const IMAGE_PATIENCE: Duration = Duration::from_secs(10);
const IMAGE_PAUSE: Duration = Duration::from_millis(2);
/// How long a drain waits before it looks after the work itself: the thread may be gone.
const DRAIN_PATIENCE: Duration = Duration::from_millis(100);

/// How long a thread that polls stays away from its event loop.
const POLL_MAX: Duration = Duration::from_millis(10);

/// What all workers of a connection share.
#[derive(Debug)]
pub struct Context {
    /// What requests are checked against.
    pub rules: Rules,
    /// Writes may complete before they are durable.
    pub writeback: Arc<AtomicBool>,
    /// The guest's memory.
    pub memory: SharedMemory,
    /// Finds the workers of other queues.
    pub router: Arc<Router>,
    /// Counts what happens; says by which socket.
    pub monitor: Arc<Monitor>,
    /// The region that outlives us.
    pub inflight: Arc<Inflight>,
    /// Told of rings that cannot go on.
    pub errors: Arc<RingErrors>,
    /// How long a thread looks for more before it sleeps.
    pub poll: Duration,
}

impl Context {
    /// What records the requests of the disk's own guest, if something does.
    fn recorder(&self) -> Option<&Recorder> {
        self.router.recorder().filter(|_| self.monitor.access() == Access::Main)
    }
}

/// See the module.
pub struct Worker {
    context: Arc<Context>,
    event: Arc<Event>,
    mailbox: Mutex<Vec<Finished>>,
    state: Mutex<State>,
    drained: Condvar,
    /// Distance between the numbers of neighbouring queues of this worker: the number of workers.
    stride: usize,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

struct State {
    port: Box<dyn Port>,
    queues: Vec<Queue>,
    /// Nothing new is taken any more.
    stopping: bool,
    /// How often the thread has seen the worker's event.
    rounds: u64,
    /// Threads that wait for [`Worker::drained`]: to wake nobody would cost a system call, too.
    waiting: usize,
    /// The thread polls, and needs no kicks.
    polling: bool,
    /// It polls no longer than this if nothing comes.
    quiet_at: Instant,
    batch: Vec<Submission>,
    finished: Vec<Finished>,
    /// The memory map that requests in flight hold.
    memory: Option<Arc<MemoryView>>,
    /// Kept for their memory.
    heads: Vec<u16>,
    pieces: Vec<Piece>,
}

struct Queue {
    /// Number on the device.
    index: u16,
    vring: Option<Vring>,
    phase: Phase,
    used: UsedRing,
    /// Where the front-end wants to know what is in flight.
    tracker: Option<Tracker<QueueCells>>,
    /// By the head of the chain.
    in_flight: Vec<Slot>,
    /// Slots that are not free.
    count: usize,
    /// What the guest is to be shown next: heads, and the bytes written to their chains.
    done: Vec<(u16, u32)>,
    /// More may be in the ring.
    again: bool,
    /// When requests were last looked for: the clock is read once for all that were found.
    popped: Instant,
    monitor: Arc<Monitor>,
    log: Arc<DirtyLog>,
}

/// Who does a worker's work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Thread {
    /// The worker's own thread.
    Own,
    /// One that joins in, and has other things to do.
    Other,
}

/// How far a ring has got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Nothing is known of it.
    Stopped,
    /// Requests are taken from it.
    Running,
    /// It cannot go on until it is started again. What was taken is still completed.
    Broken,
}

/// What is known of the chain with a certain head.
enum Slot {
    /// It is the guest's.
    Free,
    /// The disk is at work.
    Busy(InFlight),
    /// It is answered; the guest has not been shown yet.
    Done,
}

/// A request that the disk is at work on.
struct InFlight {
    reply: Reply,
    /// Keeps the guest's memory mapped until the status is stored.
    memory: Arc<MemoryView>,
    /// What the disk writes, if it writes anything.
    filled: Option<Arc<GuestBuffer>>,
    /// Parts that have not ended.
    left: usize,
    status: u8,
    start: Start,
}

/// Marks the requests of those who came in by the read-only socket.
const READ_ONLY: u64 = 1 << 63;

/// Names part `part` of the request with this head on queue `queue`.
fn request_id(access: Access, queue: u16, head: u16, part: usize) -> RequestId {
    let access = if access == Access::ReadOnly { READ_ONLY } else { 0 };
    RequestId(access | (part as u64) << 32 | u64::from(queue) << 16 | u64::from(head))
}

/// By which socket the front-end came in whose request this is.
pub fn access_of(id: RequestId) -> Access {
    if id.0 & READ_ONLY == 0 { Access::Main } else { Access::ReadOnly }
}

/// The queue a request came from.
pub fn queue_of(id: RequestId) -> u16 {
    (id.0 >> 16) as u16
}

fn head_of(id: RequestId) -> u16 {
    id.0 as u16
}

impl Worker {
    /// Worker `number` of `workers`, which has every queue whose number leaves that remainder.
    pub fn new(
        context: Arc<Context>,
        port: Box<dyn Port>,
        event: Arc<Event>,
        number: u16,
        workers: u16,
        queues: u16,
    ) -> Worker {
        let stride = usize::from(workers);
        let queues = (number..queues)
            .step_by(stride)
            .map(|index| Queue {
                index,
                vring: None,
                phase: Phase::Stopped,
                used: UsedRing::default(),
                tracker: None,
                in_flight: Vec::new(),
                count: 0,
                done: Vec::new(),
                again: false,
                popped: Instant::now(),
                monitor: context.monitor.clone(),
                log: context.rules.log.clone(),
            })
            .collect();
        let state = State {
            port,
            queues,
            stopping: false,
            rounds: 0,
            waiting: 0,
            polling: false,
            quiet_at: Instant::now(),
            batch: Vec::new(),
            finished: Vec::new(),
            memory: None,
            heads: Vec::new(),
            pieces: Vec::new(),
        };
        Worker {
            context,
            event,
            mailbox: Mutex::new(Vec::new()),
            state: Mutex::new(state),
            drained: Condvar::new(),
            stride,
        }
    }

    /// Signalled when the worker has something to do besides kicks.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Tells the worker that a request of one of its queues is finished. Its event is the caller's to
    /// signal.
    pub fn post(&self, finished: Finished) {
        self.mailbox().push(finished);
    }

    fn mailbox(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kick of the queue with this number on the thread, or, for any other number, the worker's event.
    pub fn handle_event(&self, number: usize, vrings: &[Vring]) {
        scope::enter(self.context.monitor.disk());
        let mut state = self.state();
        for (queue, vring) in state.queues.iter_mut().zip(vrings) {
            queue.vring.get_or_insert_with(|| vring.clone());
        }
        if number < vrings.len() {
            self.pop(&mut state, number);
        } else {
            self.event.clear();
            state.rounds += 1;
            for number in 0..state.queues.len() {
                if std::mem::take(&mut state.queues[number].again) {
                    self.pop(&mut state, number);
                }
            }
        }
        let found = self.turn(&mut state, Thread::Own);
        if !self.context.poll.is_zero() {
            self.poll(&mut state, found);
        }
    }

    /// Looks at the rings and for ends without sleeping, until there has been nothing for as long as the
    /// operator wants. The guest need not kick meanwhile. Other events get their turn now and then.
    fn poll(&self, state: &mut State, mut found: bool) {
        let begun = Instant::now();
        state.polling = true;
        loop {
            let now = Instant::now();
            if found {
                state.quiet_at = now + self.context.poll;
            }
            if now >= state.quiet_at || state.stopping {
                break;
            }
            if now - begun > POLL_MAX {
                self.event.signal();
                break;
            }
            for number in 0..state.queues.len() {
                self.pop(state, number);
            }
            found = self.turn(state, Thread::Own);
            std::hint::spin_loop();
        }
        state.polling = false;
        // Asks for kicks again, and takes what came without one.
        for number in 0..state.queues.len() {
            self.pop(state, number);
        }
        self.turn(state, Thread::Own);
    }

    /// Waits until no request of the queue is in flight and the thread will not look at its kick any more.
    /// The ring must not be ready, or not enabled; it is taken up anew when it is.
    pub fn drain_queue(&self, number: usize) {
        self.forget_kicks();
        self.take_up(number);
        self.wait_hurriedly(|state| state.queues.get(number).is_none_or(|queue| queue.count == 0));
        if let Some(queue) = self.state().queues.get_mut(number) {
            queue.stop();
        }
    }

    /// The same for all queues of the worker.
    pub fn drain_queues(&self) {
        self.forget_kicks();
        self.wait_hurriedly(|state| state.queues.iter().all(|queue| queue.count == 0));
        self.state().queues.iter_mut().for_each(Queue::stop);
    }

    /// Takes nothing new and waits until nothing is under way.
    pub fn drain(&self) {
        self.state().stopping = true;
        self.wait_hurriedly(|state| {
            state.queues.iter().all(|queue| queue.count == 0) && state.port.unfinished() == 0
        });
    }

    /// Waits until the thread has dealt with all events it has fetched so far. A kick among them would be
    /// read from the queue's next kick descriptor, and if there is nothing to read the library ends the
    /// thread. An event is fetched at most once in a round, so two of them have a round's end between.
    fn forget_kicks(&self) {
        for _ in 0..2 {
            let mut state = self.state();
            let seen = state.rounds;
            self.event.signal();
            let deadline = Instant::now() + ROUND_PATIENCE;
            while state.rounds == seen {
                let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                    log::error!("a queue thread does not answer");
                    return;
                };
                state = self.wait(state, left).0;
            }
        }
    }

    /// Waits, and lets nothing be held back meanwhile.
    fn wait_hurriedly(&self, done: impl Fn(&State) -> bool) {
        self.state().port.hurry(true);
        self.event.signal();
        self.wait_until(done);
        self.state().port.hurry(false);
    }

    fn wait_until(&self, done: impl Fn(&State) -> bool) {
        let mut state = self.state();
        while !done(&state) {
            let in_vain;
            (state, in_vain) = self.wait(state, DRAIN_PATIENCE);
            if in_vain {
                self.turn(&mut state, Thread::Other);
            }
        }
    }

    /// Lets the thread work until it has done something; true if it has not for so long.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        patience: Duration,
    ) -> (MutexGuard<'a, State>, bool) {
        state.waiting += 1;
        let waited = self.drained.wait_timeout(state, patience);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        (state, timeout.timed_out())
    }

    /// Waits until the thread has stored what it is about to store in guest memory.
    pub fn finish_round(&self) {
        drop(self.state());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ring may be stopped before its start was noticed. What a process before us had taken from it is
    /// completed all the same: the front-end goes on from what it is told now, maybe elsewhere.
    fn take_up(&self, number: usize) {
        let index = self.state().queues.get(number).map(|queue| queue.index);
        let is_left = |index| self.context.inflight.has_left(index);
        if !index.is_some_and(is_left) {
            return;
        }
        let gate = &self.context.rules.gate;
        let deadline = Instant::now() + IMAGE_PATIENCE;
        // Asked for already, when the ring was started. Nothing may be done without it (P9).
        while !gate.is_open() && Instant::now() < deadline {
            thread::sleep(IMAGE_PAUSE);
        }
        let mut state = self.state();
        let State { queues, batch, pieces, memory, .. } = &mut *state;
        let Some(queue) = queues.get_mut(number) else { return };
        let Some(vring) = queue.vring.clone() else { return };
        let mut ring = vring.get_mut();
        if queue.phase != Phase::Stopped || ring.get_kick().is_none() {
            return;
        }
        if !gate.is_open() {
            log::error!(
                "queue {}: stopped with requests in flight, and the image is not ours to complete them",
                queue.index
            );
            return;
        }
        queue.popped = Instant::now();
        let memory = memory.insert(MemoryView::present(&self.context.memory, memory.as_ref()));
        Taking { context: &self.context, memory, batch, pieces }.start(queue, &mut ring);
        drop(ring);
        self.turn(&mut state, Thread::Other);
    }

    /// Takes what is in the ring.
    fn pop(&self, state: &mut State, number: usize) {
        let State { queues, batch, stopping, polling, heads, pieces, memory, .. } = state;
        let Some(queue) = queues.get_mut(number) else { return };
        let Some(vring) = queue.vring.clone() else { return };
        let mut ring = vring.get_mut();
        if *stopping || !ring.get_queue().ready() || !ring.is_enabled() {
            return;
        }
        if !self.context.rules.gate.is_open() {
            // The image is not ours (P9). What is in the ring waits until it is.
            queue.again = true;
            // Whoever only reads must not take it from those it was left to.
            if self.context.monitor.access() == Access::Main {
                self.context.rules.gate.knock();
            }
            return;
        }
        queue.popped = Instant::now();
        let memory = memory.insert(MemoryView::present(&self.context.memory, memory.as_ref()));
        let mut taking = Taking { context: &self.context, memory, batch, pieces };
        if queue.phase == Phase::Stopped {
            taking.start(queue, &mut ring);
        }
        for _ in 0..PASSES_MAX {
            if queue.phase != Phase::Running {
                return;
            }
            // Only a hint to the guest.
            let _ = ring.disable_notification();
            queue.log.mark_hint(ring.get_queue());
            let first = ring.get_queue().next_avail();
            heads.clear();
            match ring.get_queue_mut().iter(&***taking.memory) {
                Ok(chains) => heads.extend(chains.map(|chain| chain.head_index())),
                Err(error) => return taking.stop(queue, &error),
            }
            taking.renew_memory();
            for (position, head) in heads.iter().enumerate() {
                if let Err(flaw) = taking.take(queue, &ring, *head) {
                    // What comes behind it has not been taken.
                    let next = first.wrapping_add(position as u16);
                    ring.get_queue_mut().set_next_avail(next);
                    return taking.stop(queue, &flaw);
                }
            }
            if *polling {
                return;
            }
            let more = ring.enable_notification();
            queue.log.mark_hint(ring.get_queue());
            match more {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return taking.stop(queue, &error),
            }
        }
        queue.again = true;
        self.event.signal();
    }

    /// Submits, takes ends and shows them to the guest until nothing more is there. False if nothing was.
    fn turn(&self, state: &mut State, thread: Thread) -> bool {
        let may_block = thread == Thread::Own && self.context.poll.is_zero();
        let mut found = false;
        loop {
            let in_hand: usize = state.queues.iter().map(|queue| queue.count).sum();
            let alone = may_block && in_hand == 1;
            let State { port, queues, batch, finished, .. } = state;
            if let Some(lone) = port.lone_calls() {
                // Not if the request has not been submitted, or has ended.
                lone.set_alone(alone && batch.is_empty() && finished.is_empty());
            }
            let mut progress = port.reap(finished);
            if !batch.is_empty() {
                if let Some(lone) = port.lone_calls() {
                    lone.set_alone(alone);
                }
                port.submit(batch, finished);
                progress = true;
            }
            if let Some(lone) = port.lone_calls() {
                lone.judge(|| {
                    let memory = self.context.memory.memory();
                    !self.mailbox().is_empty() || queues.iter().any(|queue| queue.has_more(&memory))
                });
            }
            port.intercept(finished);
            let mut others = self.finish(state);
            self.context.router.deliver(&mut others);
            state.finished.append(&mut self.mailbox());
            // Each time around: the guest need not wait for what ends later.
            for queue in &mut state.queues {
                queue.show(&self.context);
            }
            if !progress && state.finished.is_empty() {
                break;
            }
            found = true;
        }
        if !state.polling && state.queues.iter().all(|queue| queue.count == 0) {
            // Memory that the guest has given up meanwhile must not stay mapped.
            state.memory = None;
        }
        if state.waiting > 0 {
            self.drained.notify_all();
        }
        found
    }

    /// Completes the finished requests of our queues; the rest is returned.
    fn finish(&self, state: &mut State) -> Vec<Finished> {
        let State { queues, finished, .. } = state;
        let mut others = Vec::new();
        if finished.is_empty() {
            return others;
        }
        let now = Instant::now();
        let access = self.context.monitor.access();
        for (id, result) in finished.drain(..) {
            let number = queue_of(id);
            match queues.get_mut(usize::from(number) / self.stride) {
                Some(queue) if queue.index == number && access_of(id) == access => {
                    let ended = queue.finish(head_of(id), result, now);
                    if ended && let Some(recorder) = self.context.recorder() {
                        recorder.end(number, head_of(id));
                    }
                }
                _ => others.push((id, result)),
            }
        }
        others
    }
}

/// What is needed to take requests from a ring.
struct Taking<'a> {
    context: &'a Context,
    memory: &'a mut Arc<MemoryView>,
    batch: &'a mut Vec<Submission>,
    pieces: &'a mut Vec<Piece>,
}

/// An available entry that names no request: where the ring stands is not known any more.
#[derive(Clone, Copy, Debug)]
enum NoRequest {
    /// The ring has no such descriptor.
    Outside(u16),
    /// The guest offers what it has not got back.
    InFlight(u16),
}

impl fmt::Display for NoRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoRequest::Outside(head) => write!(f, "head {head} is outside the queue"),
            NoRequest::InFlight(head) => write!(f, "head {head} is in flight already"),
        }
    }
}

impl Taking<'_> {
    /// Takes up a ring that has been started: goes on where it stands, and begins with what a process
    /// before us had taken and not completed.
    fn start(&mut self, queue: &mut Queue, ring: &mut RingState) {
        let Some(used) = self.read_used(queue, ring) else { return };
        let size = ring.get_queue().size();
        let heads = match self.context.inflight.attach(queue.index, size, used) {
            Ok(None) => Vec::new(),
            Ok(Some((tracker, heads))) => {
                let next = used.next().wrapping_add(heads.len() as u16);
                ring.get_queue_mut().set_next_avail(next);
                queue.tracker = Some(tracker);
                heads
            }
            Err(unusable) => return self.stop(queue, &unusable),
        };
        queue.phase = Phase::Running;
        queue.used = used;
        if !heads.is_empty() {
            log::info!("queue {}: {} requests are submitted again", queue.index, heads.len());
        }
        for head in heads {
            self.submit(queue, ring, head);
        }
        // Whoever died may not have told the guest of what it had completed.
        if used.next() != 0
            && let Err(error) = ring.signal_used_queue()
        {
            log::error!(target: "guest", "queue {}: could not notify: {error}", queue.index);
        }
    }

    /// Memory may have been added after the map was looked at, and used by requests that were found in the
    /// ring since.
    fn renew_memory(&mut self) {
        *self.memory = MemoryView::present(&self.context.memory, Some(self.memory));
    }

    fn read_used(&self, queue: &mut Queue, ring: &RingState) -> Option<UsedRing> {
        match UsedRing::load(self.memory, ring.get_queue()) {
            Ok(used) => Some(used),
            Err(error) => {
                self.stop(queue, &error);
                None
            }
        }
    }

    /// The ring cannot go on.
    fn stop(&self, queue: &mut Queue, why: &dyn fmt::Display) {
        queue.fail(why, &self.context.errors);
    }

    /// Takes the next request from the ring.
    fn take(&mut self, queue: &mut Queue, ring: &RingState, head: u16) -> Result<(), NoRequest> {
        let entries = queue.tracker.as_ref().map_or(u16::MAX, Tracker::entries);
        if head >= ring.get_queue().size().min(entries) {
            return Err(NoRequest::Outside(head));
        }
        if !queue.is_free(head) {
            return Err(NoRequest::InFlight(head));
        }
        if let Some(tracker) = &mut queue.tracker {
            tracker.take(head);
        }
        self.submit(queue, ring, head);
        Ok(())
    }

    /// Answers a request or makes it part of the batch.
    fn submit(&mut self, queue: &mut Queue, ring: &RingState, head: u16) {
        let table = Table {
            addr: GuestAddress(ring.get_queue().desc_table()),
            len: ring.get_queue().size().into(),
        };
        let walked = chain::walk(self.memory, table, head, QUEUE_SIZE_MAX, self.pieces);
        match walked {
            Ok(()) => match request::parse(self.memory, self.pieces, &self.context.rules) {
                Parsed::Command(command, reply) => self.begin(queue, head, command, reply),
                Parsed::Answer(status, reply) => {
                    if status != OK {
                        // What it asks for is not offered: a question, and no fault.
                        let level = if status == UNSUPP { Level::Debug } else { Level::Warn };
                        log::log!(
                            target: "guest",
                            level,
                            "queue {}: request refused: malformed, or not within disk and memory",
                            queue.index
                        );
                        queue.stats().refused.add(1);
                    }
                    store_status(self.memory, &queue.log, reply, status);
                    queue.answer(head, reply.len);
                }
                Parsed::Broken(flaw) => refuse(queue, head, flaw),
            },
            Err(flaw) => refuse(queue, head, flaw),
        }
    }

    fn begin(&mut self, queue: &mut Queue, head: u16, command: Command, reply: Reply) {
        if let Some(recorder) = self.context.recorder() {
            recorder.begin(queue.index, head, &command);
        }
        let batch = &mut *self.batch;
        let durable = !self.context.writeback.load(Ordering::Acquire);
        let before = batch.len();
        let access = self.context.monitor.access();
        let start = start_of(&command, queue.popped);
        let mut push = |request, buffer| {
            let id = request_id(access, queue.index, head, batch.len() - before);
            batch.push(Submission { id, request, buffer });
        };
        let mut filled = None;
        match command {
            Command::Read { offset, buffer } => {
                filled = Some(buffer.clone());
                push(Request::Read { offset, len: buffer.len() }, Some(buffer));
            }
            Command::Write { offset, buffer } => {
                push(Request::Write { offset, len: buffer.len(), durable }, Some(buffer));
            }
            Command::Flush => push(Request::Flush, None),
            Command::Discard(ranges) => {
                for range in ranges {
                    push(Request::Discard { offset: range.offset, len: range.len }, None);
                }
            }
            Command::WriteZeroes(ranges) => {
                for range in ranges {
                    let request::Range { offset, len, unmap } = range;
                    push(Request::WriteZeroes { offset, len, unmap, durable }, None);
                }
            }
        }
        let left = batch.len() - before;
        assert!(left > 0, "a command has at least one part");
        let memory = self.memory.clone();
        let request = InFlight { reply, memory, filled, left, status: OK, start };
        queue.occupy(head, Slot::Busy(request));
    }
}

/// Gives a chain back that cannot be answered.
fn refuse(queue: &mut Queue, head: u16, flaw: Flaw) {
    log::error!(target: "guest", "queue {}: head {head}: {flaw}", queue.index);
    queue.stats().refused.add(1);
    queue.answer(head, 0);
}

impl Queue {
    fn stats(&self) -> &QueueStats {
        &self.monitor.queues()[usize::from(self.index)]
    }

    fn set_count(&mut self, count: usize) {
        self.count = count;
        self.stats().in_flight.store(count as u64, Ordering::Relaxed);
    }

    /// A part of a request has ended; with the last one, which returns true, the guest gets its status.
    fn finish(&mut self, head: u16, result: Result<(), RequestError>, now: Instant) -> bool {
        let Some(slot) = self.in_flight.get_mut(usize::from(head)) else { return false };
        let Slot::Busy(request) = slot else { return false };
        request.left -= 1;
        if let Err(error) = result {
            log::error!(target: "guest", "queue {}: request failed: {error}", self.index);
            request.status = status_of(error);
        }
        if request.left > 0 {
            return false;
        }
        let queue = usize::from(self.index);
        self.monitor.ended(queue, &request.start, now, request.status != OK);
        let len = request.reply.len;
        if let Some(buffer) = &request.filled {
            self.log.mark_buffer(buffer);
        }
        store_status(&request.memory, &self.log, request.reply, request.status);
        *slot = Slot::Done;
        self.done.push((head, len));
        true
    }

    /// There are requests in the ring that have not been taken.
    fn has_more(&self, memory: &Memory) -> bool {
        let Some(vring) = &self.vring else { return false };
        let ring = vring.get_ref();
        let queue = ring.get_queue();
        let more = |end: Wrapping<u16>| end.0 != queue.next_avail();
        self.phase == Phase::Running && queue.avail_idx(memory, Ordering::Acquire).is_ok_and(more)
    }

    /// A request that was taken is answered at once; `len` bytes of its chain were written.
    fn answer(&mut self, head: u16, len: u32) {
        self.occupy(head, Slot::Done);
        self.done.push((head, len));
    }

    fn is_free(&self, head: u16) -> bool {
        self.in_flight.get(usize::from(head)).is_none_or(|slot| matches!(slot, Slot::Free))
    }

    fn occupy(&mut self, head: u16, slot: Slot) {
        let place = usize::from(head);
        if self.in_flight.len() <= place {
            self.in_flight.resize_with(place + 1, || Slot::Free);
        }
        self.in_flight[place] = slot;
        self.set_count(self.count + 1);
    }

    /// Shows the guest what is done, and interrupts it if it wants that.
    fn show(&mut self, context: &Context) {
        if self.done.is_empty() {
            return;
        }
        let Some(vring) = self.vring.clone() else { return };
        let ring = vring.get_mut();
        let memory = context.memory.memory();
        match self.show_in(&memory, ring.get_queue()) {
            Ok(()) => self.signal(&memory, &ring),
            // What is marked as in flight stays so: whoever starts the ring again submits it again.
            Err(error) => self.fail(&error, &context.errors),
        }
        for (head, _) in &self.done {
            self.in_flight[usize::from(*head)] = Slot::Free;
        }
        self.set_count(self.count - self.done.len());
        self.done.clear();
    }

    fn show_in(&mut self, memory: &Memory, queue: &VirtQueue) -> Result<(), GuestMemoryError> {
        let Queue { used, done, tracker, log, .. } = self;
        for (position, (head, len)) in done.iter().enumerate() {
            used.write(memory, queue, position as u16, *head, *len)?;
        }
        let count = done.len() as u16;
        let mut show = || used.show(memory, queue, count).map(|()| used.next());
        let shown = match tracker {
            Some(tracker) => tracker.complete(done.iter().map(|(head, _)| *head), show),
            None => show().map(drop),
        };
        log.mark_used(queue, used.next(), count);
        shown
    }

    fn signal(&mut self, memory: &Memory, ring: &RingState) {
        if !self.used.wants_signal(memory, ring.get_queue()) {
            return;
        }
        self.stats().interrupts.add(1);
        if let Err(error) = ring.signal_used_queue() {
            log::error!(target: "guest", "queue {}: could not notify: {error}", self.index);
        }
    }

    /// The ring cannot go on until it is started again.
    fn fail(&mut self, why: &dyn fmt::Display, errors: &RingErrors) {
        if self.phase != Phase::Broken {
            log::error!(target: "guest", "queue {}: ring unusable: {why}", self.index);
            errors.signal(self.index);
        }
        self.phase = Phase::Broken;
    }

    /// The ring has been stopped, with nothing in flight.
    fn stop(&mut self) {
        self.phase = Phase::Stopped;
        self.tracker = None;
    }
}

/// What the statistics need to know of a request from its beginning.
fn start_of(command: &Command, at: Instant) -> Start {
    let sum = |ranges: &[request::Range]| ranges.iter().map(|range| range.len).sum();
    let (kind, bytes) = match command {
        Command::Read { buffer, .. } => (Kind::Read, buffer.len()),
        Command::Write { buffer, .. } => (Kind::Write, buffer.len()),
        Command::Flush => (Kind::Flush, 0),
        Command::Discard(ranges) => (Kind::Discard, sum(ranges)),
        Command::WriteZeroes(ranges) => (Kind::WriteZeroes, sum(ranges)),
    };
    Start { kind, bytes, at }
}

fn store_status(memory: &Memory, log: &DirtyLog, reply: Reply, status: u8) {
    match memory.write_obj(status, reply.status) {
        Ok(()) => log.mark(reply.status, 1),
        Err(error) => log::error!(target: "guest", "status byte not in guest memory: {error}"),
    }
}

fn status_of(error: RequestError) -> u8 {
    match error {
        RequestError::Storage(StorageError::Unsupported) => UNSUPP,
        _ => IOERR,
    }
}
