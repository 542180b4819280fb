//! Growing and shrinking the virtual disk.
//!
//! A resize is alone: it begins when everything before it has ended and holds back what comes after.
//! Shrinking first gives up what is cut off and zeroes the cut tail of the last block, makes that
//! durable, and only then commits the new size, so that growing again can never show it.

use super::Disk;
use super::data::{Work, WorkKind};
use crate::bugs::{self, Bug};
use crate::request::RequestError;
use crate::storage::{RequestId, Storage};
use std::collections::VecDeque;

/// How far a resize is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Waiting for earlier requests to end.
    Drain,
    /// Clearing what is cut off.
    Clear,
    /// Cleared; a checkpoint with the new size is to come.
    Commit,
    /// That checkpoint is under way.
    Committing,
}

pub(crate) struct Resizing {
    id: RequestId,
    pub(crate) size: u64,
    phase: Phase,
}

impl Disk {
    pub(super) fn start_resize(&mut self, _st: &mut dyn Storage, id: RequestId, size: u64) {
        self.resizing = Some(Resizing { id, size, phase: Phase::Drain });
        self.set_fast_resizing(true);
    }

    /// The size that the checkpoint being started shall commit.
    pub(super) fn size_to_commit(&mut self) -> u64 {
        match &mut self.resizing {
            Some(resizing) if resizing.phase == Phase::Commit => {
                resizing.phase = Phase::Committing;
                resizing.size
            }
            _ => self.virtual_size,
        }
    }

    /// True if a checkpoint has to be started for a resize.
    pub(super) fn resize_wants_checkpoint(&self) -> bool {
        self.resizing.as_ref().is_some_and(|resizing| resizing.phase == Phase::Commit)
    }

    pub(super) fn advance_resize(&mut self, st: &mut dyn Storage) {
        let Some(resizing) = &mut self.resizing else { return };
        // The resize itself is the one active request.
        let fast_idle = self.fast.as_ref().is_none_or(|fast| fast.is_idle());
        if resizing.phase != Phase::Drain || self.active.len() > 1 || !fast_idle {
            return;
        }
        resizing.phase = Phase::Clear;
        let (id, size) = (resizing.id, resizing.size);
        if size < self.virtual_size {
            let block_end = size.next_multiple_of(self.block_size).min(self.virtual_size);
            if block_end > size && !bugs::on(Bug::KeepTailOnShrink) {
                self.piece_started(id);
                self.dispatch(
                    st,
                    Work { id, kind: WorkKind::Zero { unmap: false }, start: size, end: block_end },
                );
            }
            if block_end < self.virtual_size {
                self.piece_started(id);
                let end = self.virtual_size;
                self.dispatch(st, Work { id, kind: WorkKind::Cut, start: block_end, end });
            }
        }
        self.piece_done(id, Ok(()));
        self.issue_staged(st);
        self.advance_checkpoint(st);
    }

    /// The pieces of the resize have ended.
    pub(super) fn resize_pieces_done(&mut self) {
        let resizing = self.resizing.as_mut().expect("the request is a resize");
        let active = self.active.get_mut(&resizing.id).expect("the request is active");
        if let Some(error) = active.error {
            let id = resizing.id;
            self.end_resize(id, Err(error));
            return;
        }
        // The checkpoint's first sync, before the new size is written, covers the zeroed tail.
        resizing.phase = Phase::Commit;
    }

    /// The checkpoint that was to commit the new size has ended.
    pub(super) fn resize_committed(&mut self, result: Result<(), RequestError>) {
        let Some(resizing) = &self.resizing else { return };
        if resizing.phase == Phase::Committing {
            let id = resizing.id;
            self.end_resize(id, result);
        }
    }

    pub(super) fn end_resize(&mut self, id: RequestId, result: Result<(), RequestError>) {
        self.resizing = None;
        self.set_fast_resizing(false);
        self.finish(id, result);
    }

    /// Submits what was held back.
    pub(super) fn release_held(&mut self, st: &mut dyn Storage) {
        let mut kept = VecDeque::new();
        while self.resizing.is_none() {
            let Some((id, request)) = self.held.pop_front() else { break };
            if self.freeze.is_some() && request.waits_for_thaw() {
                kept.push_back((id, request));
            } else {
                self.submit(st, id, request);
            }
        }
        kept.append(&mut self.held);
        self.held = kept;
    }

    /// A superblock with the new size could not be written, and will be tried again: the request ends
    /// with the error. What was cut off is gone, so a smaller size holds from now on.
    pub(super) fn resize_uncertain(&mut self, size: u64, error: RequestError) {
        let committing = self.resizing.as_ref().filter(|r| r.phase == Phase::Committing);
        if let Some(id) = committing.map(|resizing| resizing.id) {
            self.virtual_size = self.virtual_size.min(size);
            self.end_resize(id, Err(error));
        }
    }

    /// The resize under way fails.
    pub(super) fn fail_resize(&mut self, error: RequestError) {
        if let Some(resizing) = &self.resizing
            && matches!(resizing.phase, Phase::Commit | Phase::Committing)
        {
            let id = resizing.id;
            self.end_resize(id, Err(error));
        }
    }
}
