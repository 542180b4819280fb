//! Who has the image: the thread that takes it, gives it up and does what changes it as a whole.
//!
//! The image is ours from the start (unless the daemon waits for a migration) until the last ring stops,
//! and again from the moment a ring starts. In between it is closed and unlocked, so that the daemon of a
//! migration's target, or any other program, can have it (P9). Taking it back waits for the lock within a
//! bound; until then requests wait in their rings.

use crate::disk::gate::Gate;
use crate::disk::{Hold, Router};
use crate::event::Event;
use crate::events;
use crate::scope;
use exd_file::lock::LockError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Between attempts to lock.
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// After taking the image has failed, it is not tried again for so long.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The longest sleep of a keeper with nothing to do.
const IDLE: Duration = Duration::from_secs(3600);

/// What a keeper does with its image, in the image's format. All calls come from the keeper's thread.
pub trait Image: Send {
    /// One attempt to lock the file.
    fn lock(&mut self) -> Result<(), LockError>;

    /// Gives the lock up. Nothing of ours is under way in the file.
    fn unlock(&mut self);

    /// Opens the locked image, as it is now: its size in bytes.
    fn open(&mut self) -> Result<u64, String>;

    /// Ends everything under way and closes the open image cleanly. After an error the image is as after a
    /// crash, but nothing is under way.
    fn close(&mut self) -> Result<(), String>;

    /// Does what is due of the open image's own work, and says when to come again.
    fn turn(&mut self) -> Duration;

    /// Uses the time while nobody wants anything of the open image.
    fn tidy(&mut self) {}

    /// Changes the size of the open image: the size it has then.
    fn resize(&mut self, size: u64) -> Result<u64, String>;

    /// Writes the map of the open image out.
    fn checkpoint(&mut self) -> Result<(), String>;

    /// Makes the file of the open image stand still.
    fn freeze(&mut self) -> Result<(), String>;

    /// Ends that.
    fn thaw(&mut self);
}

/// What a keeper can be told to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Job {
    /// Change the size to so many bytes.
    Resize(u64),
    /// Write the map out.
    Checkpoint,
    /// Freeze the image for so long at most.
    Freeze(Duration),
    /// End a freeze.
    Thaw,
    /// Give the image up.
    Suspend,
    /// Take the image.
    Resume,
    /// Close the image, if it is open, and end.
    Close,
}

type Reply = Sender<Result<(), String>>;

/// The keeper's end for everybody else.
pub struct Keeper {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    gate: Arc<Gate>,
    jobs: Mutex<VecDeque<(Job, Reply)>>,
    hold: AtomicU8,
}

impl Shared {
    fn jobs(&self) -> std::sync::MutexGuard<'_, VecDeque<(Job, Reply)>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self) -> Hold {
        match self.hold.load(Ordering::Acquire) {
            0 => Hold::Held,
            1 => Hold::Frozen,
            2 => Hold::Released,
            _ => Hold::Awaited,
        }
    }

    fn set_hold(&self, hold: Hold) {
        let number = match hold {
            Hold::Held => 0,
            Hold::Frozen => 1,
            Hold::Released => 2,
            Hold::Awaited => 3,
        };
        self.hold.store(number, Ordering::Release);
        self.gate.set_open(matches!(hold, Hold::Held | Hold::Frozen));
    }
}

impl Keeper {
    /// A keeper of an image that is open now if the gate is. It waits for the lock as long as `patience`.
    pub fn start(
        image: Box<dyn Image>,
        gate: Arc<Gate>,
        router: Arc<Router>,
        patience: Duration,
    ) -> io::Result<Keeper> {
        let hold = if gate.is_open() { Hold::Held } else { Hold::Released };
        let shared =
            Arc::new(Shared { gate, jobs: Mutex::new(VecDeque::new()), hold: AtomicU8::new(0) });
        shared.set_hold(hold);
        let routine = Routine {
            image,
            shared: shared.clone(),
            router,
            patience,
            awaited: None,
            not_before: Instant::now(),
            thaw_at: None,
            waiting: Vec::new(),
        };
        let disk = scope::disk();
        let thread = thread::Builder::new().name("background".to_owned()).spawn(move || {
            disk.into_iter().for_each(scope::enter);
            routine.run();
        })?;
        Ok(Keeper { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Who has the image.
    pub fn hold(&self) -> Hold {
        self.shared.hold()
    }

    /// Has a job done and waits for its end.
    pub fn run(&self, job: Job) -> Result<(), String> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            return Err("the image is closed".to_owned());
        }
        let (reply, answer) = channel();
        self.shared.jobs().push_back((job, reply));
        self.shared.gate.wish().signal();
        let closing = if job == Job::Close { thread.take() } else { None };
        // Others may ask meanwhile.
        drop(thread);
        let answer = answer.recv().unwrap_or_else(|_| Err("the image is closed".to_owned()));
        if let Some(thread) = closing {
            thread.join().map_err(|_| "the background thread has failed")?;
        }
        answer
    }
}

/// The keeper's thread.
struct Routine {
    image: Box<dyn Image>,
    shared: Arc<Shared>,
    router: Arc<Router>,
    patience: Duration,
    /// The lock is waited for until then.
    awaited: Option<Instant>,
    /// After a failure: knocks are not heard before.
    not_before: Instant,
    thaw_at: Option<Instant>,
    /// Who waits for the image besides the rings.
    waiting: Vec<Reply>,
}

impl Routine {
    fn run(mut self) {
        let event = self.shared.gate.wish().clone();
        loop {
            let next = self.shared.jobs().pop_front();
            if let Some((job, reply)) = next {
                if job == Job::Close {
                    let closed = self.close();
                    // Nobody waits for it if the caller is gone.
                    let _ = reply.send(closed);
                    return;
                }
                self.carry_out(job, reply);
                continue;
            }
            let pause = self.turn();
            wait(&event, pause);
        }
    }

    /// Does what is due; how long to sleep then.
    fn turn(&mut self) -> Duration {
        match self.shared.hold() {
            Hold::Held => {
                self.shared.gate.take_knock();
                self.image.tidy();
                self.image.turn()
            }
            Hold::Frozen => {
                let left = self
                    .thaw_at
                    .map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    log::warn!("the freeze has ended by itself, its time is over");
                    self.thaw();
                }
                left.min(self.image.turn())
            }
            Hold::Released => {
                let quiet = self.not_before.saturating_duration_since(Instant::now());
                if !quiet.is_zero() {
                    return quiet;
                }
                if self.shared.gate.take_knock() {
                    self.await_lock();
                    return Duration::ZERO;
                }
                IDLE
            }
            Hold::Awaited => {
                self.try_take();
                LOCK_PAUSE
            }
        }
    }

    fn carry_out(&mut self, job: Job, reply: Reply) {
        let answer = match job {
            Job::Suspend => self.suspend(),
            Job::Resume if self.is_open() => Ok(()),
            Job::Resume => {
                self.waiting.push(reply);
                self.await_lock();
                return;
            }
            Job::Thaw if self.shared.hold() == Hold::Frozen => {
                self.thaw();
                Ok(())
            }
            Job::Thaw => Err("the image is not frozen (any more)".to_owned()),
            _ if !self.is_open() => {
                Err("the image is not open here: no ring of a guest is running".to_owned())
            }
            Job::Freeze(limit) => self.freeze(limit),
            _ if self.shared.hold() == Hold::Frozen => Err("the image is frozen".to_owned()),
            Job::Resize(size) => self.image.resize(size).map(|size| {
                log::info!("the disk has {size} bytes now");
                events::publish("resized", json!({ "capacity": size }));
                self.shared.gate.set_capacity(size);
            }),
            Job::Checkpoint => self.image.checkpoint(),
            Job::Close => unreachable!("dealt with by the loop"),
        };
        // Nobody waits for it if the caller is gone.
        let _ = reply.send(answer);
    }

    fn is_open(&self) -> bool {
        matches!(self.shared.hold(), Hold::Held | Hold::Frozen)
    }

    fn freeze(&mut self, limit: Duration) -> Result<(), String> {
        if self.shared.hold() == Hold::Frozen {
            return Err("the image is frozen already".to_owned());
        }
        let begun = Instant::now();
        self.image.freeze()?;
        log::info!("the image is frozen for {limit:?} at most; it took {:?}", begun.elapsed());
        self.thaw_at = Some(Instant::now() + limit);
        self.shared.set_hold(Hold::Frozen);
        events::publish("frozen", json!({ "seconds": limit.as_secs() }));
        Ok(())
    }

    fn thaw(&mut self) {
        self.thaw_at = None;
        self.shared.set_hold(Hold::Held);
        self.image.thaw();
        self.router.wake_all();
        log::info!("the image is not frozen any more");
        events::publish("thawed", Value::Null);
    }

    fn suspend(&mut self) -> Result<(), String> {
        self.shared.gate.take_knock();
        self.awaited = None;
        self.tell_waiting(Err("called off".to_owned()));
        if !self.is_open() {
            self.shared.set_hold(Hold::Released);
            return Ok(());
        }
        if self.thaw_at.take().is_some() {
            log::warn!("the freeze has ended, the image is given up");
            events::publish("thawed", Value::Null);
        }
        let begun = Instant::now();
        self.shared.set_hold(Hold::Released);
        let closed = self.image.close();
        self.image.unlock();
        match &closed {
            Ok(()) => log::debug!("the image is closed and unlocked, in {:?}", begun.elapsed()),
            Err(error) => log::error!("the image is unlocked as after a crash: {error}"),
        }
        closed
    }

    fn close(&mut self) -> Result<(), String> {
        self.tell_waiting(Err("the daemon ends".to_owned()));
        if self.is_open() { self.suspend() } else { Ok(()) }
    }

    fn await_lock(&mut self) {
        if self.shared.hold() == Hold::Released {
            self.awaited = None;
            self.shared.set_hold(Hold::Awaited);
        }
    }

    /// One attempt to take the image.
    fn try_take(&mut self) {
        match self.image.lock() {
            Ok(()) => self.take(),
            Err(LockError::Locked(locked)) => match self.awaited {
                None => {
                    log::warn!("waiting up to {:?} for the image: {locked}", self.patience);
                    self.awaited = Some(Instant::now() + self.patience);
                }
                Some(deadline) if Instant::now() >= deadline => {
                    self.give_up(&format!("could not get the image: {locked}"));
                }
                Some(_) => {}
            },
            Err(error) => self.give_up(&error.to_string()),
        }
    }

    fn take(&mut self) {
        self.awaited = None;
        let begun = Instant::now();
        match self.image.open() {
            Ok(capacity) => {
                log::debug!("the image is locked and open, in {:?}", begun.elapsed());
                self.shared.gate.set_capacity(capacity);
                self.shared.set_hold(Hold::Held);
                self.tell_waiting(Ok(()));
                self.router.wake_all();
            }
            Err(error) => {
                self.image.unlock();
                self.give_up(&format!("could not open the image: {error}"));
            }
        }
    }

    /// Rings stay stopped until one is started or kicked again.
    fn give_up(&mut self, error: &str) {
        log::error!("{error}\nNothing is served; the guest's requests wait.");
        self.awaited = None;
        self.not_before = Instant::now() + RETRY_PAUSE;
        self.shared.gate.take_knock();
        self.shared.set_hold(Hold::Released);
        self.tell_waiting(Err(error.to_owned()));
    }

    fn tell_waiting(&mut self, answer: Result<(), String>) {
        for reply in self.waiting.drain(..) {
            // Nobody waits for it if the caller is gone.
            let _ = reply.send(answer.clone());
        }
    }
}

/// Sleeps until `event` or so long.
pub fn wait(event: &Event, pause: Duration) {
    let timeout = PollTimeout::try_from(pause.as_millis() + u128::from(!pause.is_zero()));
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    // Interrupted or not: the caller looks at everything anyway.
    let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::MAX));
    event.clear();
}
