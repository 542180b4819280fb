//! A full host that the guest need not know of (--on-enospc=stop).
//!
//! QEMU's own `werror=stop` does not reach a vhost-user device: it never sees the requests. Here a
//! request that ended for want of space is held instead of being answered, and tried again from time to
//! time and on demand. For the guest it is still in flight: nothing is lost, and what may run before or
//! after it is the same as for any two requests in flight together. All others go on. A drain ends what
//! is held with the error, since somebody waits for it.

use crate::clock::Clock;
use crate::disk::{Finished, Port, Submission};
use crate::event::Event;
use crate::io::lone::LoneCalls;
use exd_image::{Request, RequestError, RequestId, StorageError};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Between attempts of what is held.
const RETRY: Duration = Duration::from_secs(1);

/// Something an operator wants to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The host has no space: requests are held from now on.
    HostFull,
    /// All that was held has been done.
    SpaceAgain,
}

type Listener = Box<dyn Fn(Notice) + Send + Sync>;

/// The state of a disk whose host may be full. Shared by its threads.
pub struct FullHost {
    clock: Arc<Clock>,
    held: AtomicUsize,
    /// Grows with each demand to try again.
    demands: AtomicU64,
    ports: Mutex<Vec<Weak<Event>>>,
    listener: OnceLock<Listener>,
}

impl fmt::Debug for FullHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FullHost").field("held", &self.held()).finish_non_exhaustive()
    }
}

impl FullHost {
    /// Of a disk of which nothing is known yet.
    pub fn new(clock: Arc<Clock>) -> FullHost {
        FullHost {
            clock,
            held: AtomicUsize::new(0),
            demands: AtomicU64::new(0),
            ports: Mutex::default(),
            listener: OnceLock::new(),
        }
    }

    /// Requests held now.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Who is told; once.
    pub fn listen(&self, listener: Listener) {
        let refused = self.listener.set(listener).is_err();
        assert!(!refused, "there is one listener");
    }

    /// Tries what is held again at once.
    pub fn retry(&self) {
        self.demands.fetch_add(1, Ordering::AcqRel);
        let mut ports = self.ports();
        ports.retain(|port| port.upgrade().inspect(|event| event.signal()).is_some());
    }

    fn ports(&self) -> MutexGuard<'_, Vec<Weak<Event>>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) {
        if self.held.fetch_add(1, Ordering::AcqRel) == 0 {
            log::error!("the host has no space: requests are held until there is some");
            self.tell(Notice::HostFull);
        }
    }

    fn leave(&self) {
        if self.held.fetch_sub(1, Ordering::AcqRel) == 1 {
            log::info!("no request is held for want of space any more");
            self.tell(Notice::SpaceAgain);
        }
    }

    fn tell(&self, notice: Notice) {
        if let Some(listener) = self.listener.get() {
            listener(notice);
        }
    }
}

/// See the module.
pub struct FullHostPort {
    port: Box<dyn Port>,
    full_host: Arc<FullHost>,
    event: Arc<Event>,
    /// What would be submitted again, of all requests that may need space.
    in_flight: HashMap<RequestId, Entry>,
    /// Those that met a full host and are not being tried now.
    held: Vec<RequestId>,
    next_try: Instant,
    demands: u64,
    hurry: bool,
}

struct Entry {
    submission: Submission,
    /// It counts as held until it has ended.
    counted: bool,
}

fn copy(submission: &Submission) -> Submission {
    let Submission { id, request, buffer } = submission;
    Submission { id: *id, request: *request, buffer: buffer.clone() }
}

fn is_full(result: &Result<(), RequestError>) -> bool {
    matches!(result, Err(RequestError::Storage(StorageError::NoSpace)))
}

impl FullHostPort {
    /// Around `port`.
    pub fn new(port: Box<dyn Port>, full_host: Arc<FullHost>, event: Arc<Event>) -> FullHostPort {
        full_host.ports().push(Arc::downgrade(&event));
        FullHostPort {
            port,
            full_host,
            event,
            in_flight: HashMap::new(),
            held: Vec::new(),
            next_try: Instant::now(),
            demands: 0,
            hurry: false,
        }
    }

    /// Tries what is held again if it is time to.
    fn try_again(&mut self, finished: &mut Vec<Finished>) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let demands = self.full_host.demands.load(Ordering::Acquire);
        let now = Instant::now();
        if now < self.next_try && demands == self.demands {
            self.full_host.clock.wake_at(self.next_try, &self.event);
            return false;
        }
        self.demands = demands;
        let in_flight = &self.in_flight;
        let copies = self.held.drain(..).filter_map(|id| in_flight.get(&id));
        let mut batch: Vec<Submission> = copies.map(|entry| copy(&entry.submission)).collect();
        self.port.submit(&mut batch, finished);
        true
    }

    /// Ends what is held with the error that it met.
    fn give_up(&mut self, finished: &mut Vec<Finished>) -> bool {
        let any = !self.held.is_empty();
        for id in self.held.drain(..) {
            finished.push((id, Err(RequestError::Storage(StorageError::NoSpace))));
        }
        any
    }
}

impl Port for FullHostPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        for submission in batch.iter() {
            if !matches!(submission.request, Request::Read { .. }) {
                let entry = Entry { submission: copy(submission), counted: false };
                self.in_flight.insert(submission.id, entry);
            }
        }
        self.port.submit(batch, finished);
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        let mut progress = self.port.reap(finished);
        progress |= if self.hurry { self.give_up(finished) } else { self.try_again(finished) };
        progress
    }

    fn intercept(&mut self, finished: &mut Vec<Finished>) {
        self.port.intercept(finished);
        finished.retain(|(id, result)| {
            let Some(entry) = self.in_flight.get_mut(id) else { return true };
            if is_full(result) && !self.hurry {
                if !std::mem::replace(&mut entry.counted, true) {
                    self.full_host.enter();
                }
                if self.held.is_empty() {
                    self.next_try = Instant::now() + RETRY;
                    self.full_host.clock.wake_at(self.next_try, &self.event);
                }
                self.held.push(*id);
                return false;
            }
            if entry.counted {
                self.full_host.leave();
            }
            self.in_flight.remove(id);
            true
        });
    }

    fn hurry(&mut self, hurry: bool) {
        self.hurry = hurry;
        self.port.hurry(hurry);
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        self.port.lone_calls()
    }

    fn unfinished(&self) -> usize {
        self.port.unfinished() + self.held.len()
    }
}

impl Drop for FullHostPort {
    fn drop(&mut self) {
        for _ in self.in_flight.values().filter(|entry| entry.counted) {
            self.full_host.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::policy::tests::{ScriptPort, reap, submission};

    const FULL: Result<(), RequestError> = Err(RequestError::Storage(StorageError::NoSpace));

    fn write(offset: u64) -> Request {
        Request::Write { offset, len: 512, durable: false }
    }

    struct Bench {
        script: ScriptPort,
        full_host: Arc<FullHost>,
        port: FullHostPort,
        notices: Arc<Mutex<Vec<Notice>>>,
    }

    fn bench() -> Bench {
        let script = ScriptPort::default();
        let full_host = Arc::new(FullHost::new(Arc::default()));
        let notices: Arc<Mutex<Vec<Notice>>> = Arc::default();
        let told = notices.clone();
        full_host.listen(Box::new(move |notice| told.lock().expect("fine").push(notice)));
        let event = Arc::new(Event::new().expect("event"));
        let port = FullHostPort::new(Box::new(script.clone()), full_host.clone(), event);
        Bench { script, full_host, port, notices }
    }

    #[test]
    fn held_until_there_is_space() {
        let Bench { script, full_host, mut port, notices } = bench();
        let mut batch: Vec<_> = (0..3).map(|id| submission(id, write(id * 512))).collect();
        port.submit(&mut batch, &mut Vec::new());
        assert_eq!(script.take().len(), 3);
        script.end(0, FULL);
        script.end(1, Ok(()));
        script.end(2, FULL);
        assert_eq!(reap(&mut port), [(RequestId(1), Ok(()))]);
        assert_eq!((full_host.held(), port.unfinished()), (2, 2));
        assert!(script.take().is_empty(), "not tried again at once");
        // Others go on.
        port.submit(&mut vec![submission(7, Request::Flush)], &mut Vec::new());
        assert_eq!(script.take(), [(RequestId(7), Request::Flush)]);
        script.end(7, Ok(()));
        assert_eq!(reap(&mut port).len(), 1);
        // On demand; one of them meets a full host again.
        full_host.retry();
        assert!(reap(&mut port).is_empty());
        assert_eq!(script.take(), [(RequestId(0), write(0)), (RequestId(2), write(1024))]);
        script.end(0, Ok(()));
        script.end(2, FULL);
        assert_eq!(reap(&mut port), [(RequestId(0), Ok(()))]);
        assert_eq!(full_host.held(), 1);
        // By the clock.
        port.next_try = Instant::now();
        reap(&mut port);
        assert_eq!(script.take().len(), 1);
        script.end(2, Ok(()));
        assert_eq!(reap(&mut port), [(RequestId(2), Ok(()))]);
        assert_eq!(port.unfinished(), 0);
        assert_eq!(*notices.lock().expect("fine"), [Notice::HostFull, Notice::SpaceAgain]);
    }

    #[test]
    fn a_drain_ends_what_is_held() {
        let Bench { script, full_host, mut port, notices } = bench();
        port.submit(&mut vec![submission(0, write(0)), submission(1, write(0))], &mut Vec::new());
        script.end(0, FULL);
        assert!(reap(&mut port).is_empty());
        port.hurry(true);
        assert_eq!(reap(&mut port), [(RequestId(0), FULL)]);
        script.end(1, FULL);
        assert_eq!(reap(&mut port), [(RequestId(1), FULL)]);
        assert_eq!((full_host.held(), port.unfinished()), (0, 0));
        assert_eq!(*notices.lock().expect("fine"), [Notice::HostFull, Notice::SpaceAgain]);
        // And after it, requests are held again.
        port.hurry(false);
        port.submit(&mut vec![submission(0, write(0))], &mut Vec::new());
        script.end(0, FULL);
        assert!(reap(&mut port).is_empty());
        drop(port);
        assert_eq!(full_host.held(), 0, "a connection that ends takes its requests with it");
    }
}
