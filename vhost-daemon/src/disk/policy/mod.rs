//! What an operator asks for beyond the disk itself, whatever its format: each is a [`Port`] around the
//! port of the disk, and unknown to both the queues and the disk.

pub mod full_host;
pub mod limits;
pub mod transform;

use crate::clock::Clock;
use crate::disk::Port;
use crate::event::Event;
use clap::ValueEnum;
use full_host::{FullHost, FullHostPort};
use limits::{LimitPort, Limiter, Limits};
use std::sync::Arc;
use transform::TransformPort;

/// What to do with a request for which the host has no space.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnEnospc {
    /// The guest gets an error
    #[default]
    Report,
    /// The request is held until there is space; others go on
    Stop,
}

/// What to do with the guest's discards.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Discard {
    /// Give the space back to the host
    #[default]
    Unmap,
    /// Nothing: the disk keeps its space
    Ignore,
}

/// What to do with writes of nothing but zeroes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// Write them like all others
    #[default]
    Off,
    /// Zero the range, which keeps its space where it has some
    On,
    /// Zero the range and give its space back to the host; needs --discard=unmap
    Unmap,
}

/// What an operator may choose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// When the host has no space for a request.
    pub on_enospc: OnEnospc,
    /// What becomes of the guest's discards.
    pub discard: Discard,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// I/O limits.
    pub limits: Limits,
}

/// The policies of one disk. Shared by its threads, and kept from one connection to the next.
#[derive(Debug, Default)]
pub struct Policy {
    discard: Discard,
    detect_zeroes: DetectZeroes,
    full_host: Option<Arc<FullHost>>,
    limiter: Arc<Limiter>,
}

impl Policy {
    /// As the operator chose.
    pub fn new(choice: Choice) -> Result<Policy, String> {
        if choice.detect_zeroes == DetectZeroes::Unmap && choice.discard == Discard::Ignore {
            return Err("--detect-zeroes=unmap needs --discard=unmap".to_owned());
        }
        let clock = Arc::new(Clock::default());
        let stop = choice.on_enospc == OnEnospc::Stop;
        let limiter = Arc::new(Limiter::new(clock.clone()));
        limiter.set(choice.limits);
        Ok(Policy {
            discard: choice.discard,
            detect_zeroes: choice.detect_zeroes,
            full_host: stop.then(|| Arc::new(FullHost::new(clock))),
            limiter,
        })
    }

    /// A thread's port as the policies want it; `event` wakes the thread.
    pub fn apply(&self, port: Box<dyn Port>, event: &Arc<Event>) -> Box<dyn Port> {
        let mut port = port;
        if let Some(full_host) = &self.full_host {
            port = Box::new(FullHostPort::new(port, full_host.clone(), event.clone()));
        }
        if self.discard == Discard::Ignore || self.detect_zeroes != DetectZeroes::Off {
            port = Box::new(TransformPort::new(port, self.discard, self.detect_zeroes));
        }
        Box::new(LimitPort::new(port, self.limiter.clone(), event.clone()))
    }

    /// The limits, which can be changed at run time.
    pub fn limiter(&self) -> &Arc<Limiter> {
        &self.limiter
    }

    /// Requests held for want of space; `None` unless --on-enospc=stop.
    pub fn full_host(&self) -> Option<&Arc<FullHost>> {
        self.full_host.as_ref()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::disk::{Finished, Submission};
    use exd_image::{Request, RequestError, RequestId};
    use std::sync::Mutex;

    /// A port that notes what it is given and ends it as it is told to.
    #[derive(Debug, Default)]
    pub struct Script {
        /// What has been submitted.
        pub seen: Vec<(RequestId, Request)>,
        /// What `reap` will say.
        pub ends: Vec<Finished>,
    }

    /// Shared with the test.
    #[derive(Clone, Debug, Default)]
    pub struct ScriptPort(pub Arc<Mutex<Script>>);

    impl ScriptPort {
        /// Takes what has been submitted since the last call.
        pub fn take(&self) -> Vec<(RequestId, Request)> {
            std::mem::take(&mut self.0.lock().expect("not poisoned").seen)
        }

        /// Ends a request.
        pub fn end(&self, id: u64, result: Result<(), RequestError>) {
            self.0.lock().expect("not poisoned").ends.push((RequestId(id), result));
        }
    }

    impl Port for ScriptPort {
        fn submit(&mut self, batch: &mut Vec<Submission>, _: &mut Vec<Finished>) {
            let requests = batch.drain(..).map(|submission| (submission.id, submission.request));
            self.0.lock().expect("not poisoned").seen.extend(requests);
        }

        fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
            let mut script = self.0.lock().expect("not poisoned");
            let progress = !script.ends.is_empty();
            finished.append(&mut script.ends);
            progress
        }

        fn unfinished(&self) -> usize {
            0
        }
    }

    /// What a worker does with what its port says.
    pub fn reap(port: &mut dyn Port) -> Vec<Finished> {
        let mut finished = Vec::new();
        port.reap(&mut finished);
        port.intercept(&mut finished);
        finished
    }

    /// A request without data.
    pub fn submission(id: u64, request: Request) -> Submission {
        Submission { id: RequestId(id), request, buffer: None }
    }

    #[test]
    fn contradictions_are_refused() {
        let choice = Choice {
            detect_zeroes: DetectZeroes::Unmap,
            discard: Discard::Ignore,
            ..Choice::default()
        };
        assert!(Policy::new(choice).is_err());
    }
}
