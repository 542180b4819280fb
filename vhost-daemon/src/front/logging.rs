//! The front-end's side of the dirty log: LOG_SHMFD and LOG_ALL, which the back-end library keeps on after a
//! failed migration and leaves out for memory that is plugged in later.

use crate::front::message::{Message, request};
use crate::front::relay::{Part, Refusal, Verdict};
use crate::queue::dirty_log::DirtyLog;
use crate::queue::worker::Worker;
use std::sync::Arc;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

/// The relay's part of it.
pub struct LogPart {
    log: Arc<DirtyLog>,
    workers: Vec<Arc<Worker>>,
    /// The protocol feature was agreed on.
    agreed: bool,
}

impl LogPart {
    /// For a connection with these workers, which mark their pages in `log`.
    pub fn new(log: Arc<DirtyLog>, workers: Vec<Arc<Worker>>) -> LogPart {
        LogPart { log, workers, agreed: false }
    }

    fn turn(&self, on: bool) {
        if self.log.is_on() == on {
            return;
        }
        self.log.set_on(on);
        // Whoever has looked already may write a page unmarked; when this is over nobody does.
        for worker in &self.workers {
            worker.finish_round();
        }
        log::debug!("dirty pages are {}logged", if on { "" } else { "not " });
    }
}

impl Part for LogPart {
    fn features(&self) -> u64 {
        VhostUserVirtioFeatures::LOG_ALL.bits()
    }

    fn protocol_features(&self) -> u64 {
        VhostUserProtocolFeatures::LOG_SHMFD.bits()
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.agreed = features & self.protocol_features() != 0;
        Ok(())
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.turn(features & self.features() != 0);
        Ok(())
    }

    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        match message.request {
            request::SET_LOG_BASE if !self.agreed => {
                Err("SET_LOG_BASE without its protocol feature".to_owned())
            }
            request::SET_LOG_BASE => {
                let (Some(size), Some(offset)) = (message.u64_at(0), message.u64_at(8)) else {
                    return Err("SET_LOG_BASE is too short".to_owned());
                };
                let (Some(fd), true) = (message.fds.pop(), message.fds.is_empty()) else {
                    return Err("SET_LOG_BASE without its one descriptor".to_owned());
                };
                self.log.set_base(fd, size, offset)?;
                // It has an answer of its own; what is in it nobody looks at.
                Ok(Verdict::Answer(Message::reply(message.request, message.body.clone())))
            }
            request::RESET_DEVICE => {
                self.turn(false);
                Ok(Verdict::Forward)
            }
            _ => Ok(Verdict::Forward),
        }
    }
}
