//! Wakes threads at points in time.

use crate::event::Event;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Signals events when their time has come. Its thread starts when it is first needed.
#[derive(Debug, Default)]
pub struct Clock(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By time and a number that tells those of the same time apart.
    alarms: BTreeMap<(Instant, u64), Arc<Event>>,
    next: u64,
    running: bool,
    stopping: bool,
}

impl Clock {
    /// Signals `event` at `time`, or soon after.
    pub fn wake_at(&self, time: Instant, event: &Arc<Event>) {
        let mut state = self.0.state();
        // One alarm per event and time is enough, and a later one is pointless before an earlier one.
        if state.alarms.iter().any(|((at, _), known)| *at <= time && Arc::ptr_eq(known, event)) {
            return;
        }
        let number = state.next;
        state.next += 1;
        state.alarms.insert((time, number), event.clone());
        if !state.running {
            let shared = self.0.clone();
            let started =
                thread::Builder::new().name("clock".to_owned()).spawn(move || shared.run());
            match started {
                Ok(_) => state.running = true,
                Err(error) => {
                    log::error!("could not start the clock: {error}");
                    event.signal();
                }
            }
        }
        self.0.changed.notify_all();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.0.state().stopping = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.stopping {
            let now = Instant::now();
            let Some(alarm) = state.alarms.first_entry() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let time = alarm.key().0;
            if time <= now {
                alarm.remove().signal();
                continue;
            }
            let waited = self.changed.wait_timeout(state, time - now);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    use std::time::Duration;

    #[test]
    fn wakes_each_at_its_time() {
        let clock = Clock::default();
        let begun = Instant::now();
        let events = [(); 2].map(|()| Arc::new(Event::new().expect("event")));
        clock.wake_at(begun + Duration::from_millis(30), &events[0]);
        clock.wake_at(begun + Duration::from_millis(10), &events[1]);
        for (event, least) in events.iter().zip([30, 10]) {
            let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::NONE), Ok(1));
            assert!(begun.elapsed() >= Duration::from_millis(least));
        }
    }
}
