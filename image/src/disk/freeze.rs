//! Standing still, so that the image file can be copied or given up.
//!
//! A freeze waits for the changes before it and holds back those after it. What was acknowledged is
//! journaled and durable then, nothing is under way that changes the file, and until
//! [`Disk::thaw`] nothing begins: no window, no punch, no checkpoint, no record. A copy of the file is an
//! image that was not closed, with nothing missing. Reads go on, and so do flushes, which have nothing to
//! do.

use super::{Disk, Pending};
use crate::request::{Request, RequestError};
use crate::storage::{RequestId, Storage, StorageError};

/// How far a freeze is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Freeze {
    /// Waiting for earlier requests to end.
    Drain(RequestId),
    /// Making everything durable, ending what is under way in the background.
    Settle(RequestId),
    /// Nothing changes.
    Frozen,
}

/// The errno of a request that was called off, as Linux numbers it.
const ECANCELED: i32 = 125;

impl Request {
    /// It waits while the image is frozen.
    pub(super) fn waits_for_thaw(&self) -> bool {
        !matches!(self, Request::Read { .. } | Request::Flush)
    }
}

impl Disk {
    /// The image file stands still.
    pub fn is_frozen(&self) -> bool {
        self.freeze == Some(Freeze::Frozen)
    }

    /// Ends a freeze, or calls it off.
    pub fn thaw(&mut self, st: &mut dyn Storage) {
        self.fail_freeze(StorageError::Io(ECANCELED).into());
        self.freeze = None;
        self.freeze_fast(false);
        self.run(st);
    }

    /// Background work begins nothing new.
    pub(super) fn is_settling(&self) -> bool {
        matches!(self.freeze, Some(Freeze::Settle(_) | Freeze::Frozen))
    }

    pub(super) fn advance_freeze(&mut self) {
        match self.freeze {
            Some(Freeze::Drain(_) | Freeze::Settle(_)) if self.failed => {
                self.fail_freeze(RequestError::Failed);
            }
            Some(Freeze::Drain(id)) => {
                let changes = |(other, active): (&RequestId, &super::Active)| {
                    *other != id && active.request.waits_for_thaw()
                };
                if !self.active.iter().any(changes) && self.fast_is_frozen() {
                    self.freeze = Some(Freeze::Settle(id));
                    self.sync_due = true;
                }
            }
            Some(Freeze::Settle(id)) => {
                if let Some(checkpoint) = &mut self.checkpoint {
                    checkpoint.urgent = true;
                }
                if self.has_settled() {
                    self.freeze = Some(Freeze::Frozen);
                    self.finish(id, Ok(()));
                } else {
                    self.sync_due = true;
                }
            }
            None | Some(Freeze::Frozen) => {}
        }
    }

    /// Everything acknowledged is in the file for good, and nothing that changes it is under way.
    fn has_settled(&self) -> bool {
        let reads =
            |pending: &Pending| matches!(pending, Pending::Read { .. } | Pending::Nodes { .. });
        self.checkpoint.is_none()
            && self.backlog.is_empty()
            && self.durable_through >= self.cseq
            && self.synced >= self.landed
            && self.pending.values().all(reads)
    }

    /// The freeze under way does not come about; what it held back goes on.
    pub(super) fn fail_freeze(&mut self, error: RequestError) {
        if let Some(Freeze::Drain(id) | Freeze::Settle(id)) = self.freeze {
            self.freeze = None;
            self.freeze_fast(false);
            self.finish(id, Err(error));
        }
    }
}
