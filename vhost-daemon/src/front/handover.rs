//! Gives the image up when the last ring has stopped, and asks for it when one starts.
//!
//! A front-end that stops its device may go on itself, or another one on this host may, after a live
//! migration: nobody tells the back-end. So the image is closed and unlocked before the answer to the last
//! GET_VRING_BASE, and whoever starts a ring next takes it.

use crate::disk::{Disk, Hold};
use crate::front::message::{Message, request};
use crate::front::relay::{Part, Refusal, Verdict};
use crate::stats::Monitor;
use std::sync::Arc;

/// The relay's part of it.
pub struct HandoverPart {
    disk: Arc<dyn Disk>,
}

impl HandoverPart {
    /// For a connection to this disk.
    pub fn new(disk: Arc<dyn Disk>) -> HandoverPart {
        HandoverPart { disk }
    }
}

impl Part for HandoverPart {
    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        if matches!(message.request, request::GET_VRING_BASE | request::RESET_DEVICE) {
            end_freeze(&*self.disk);
        }
        Ok(Verdict::Forward)
    }

    fn first_ring_starts(&mut self) -> Result<(), Refusal> {
        // Until it is ours, requests wait in the ring: the front-end must not.
        let gate = self.disk.gate();
        // It is the guest's now, whoever had it taken.
        gate.take_for_reader();
        if !gate.is_open() {
            gate.knock();
        }
        Ok(())
    }

    fn last_ring_stopped(&mut self) -> Result<(), Refusal> {
        // What went wrong is in the log; the image is unlocked all the same.
        let _ = self.disk.suspend();
        Ok(())
    }
}

/// The same for a front-end that only reads beside the guest's. It never takes the image from those it was
/// left to: while the guest's front-end is there and its rings are stopped, reads wait. Without one, or when it
/// leaves, the image is taken for the reader, and given up again.
pub struct ReaderPart {
    disk: Arc<dyn Disk>,
    guest: Option<Arc<Monitor>>,
}

impl ReaderPart {
    /// For a connection to this disk, beside that of `guest`.
    pub fn new(disk: Arc<dyn Disk>, guest: Option<Arc<Monitor>>) -> ReaderPart {
        ReaderPart { disk, guest }
    }

    fn is_alone(&self) -> bool {
        !self.guest.as_ref().is_some_and(|guest| guest.is_connected())
    }

    fn give_up(&mut self) {
        let gate = self.disk.gate();
        gate.set_reader_runs(false);
        if gate.take_for_reader() && self.is_alone() {
            // What went wrong is in the log; the image is unlocked all the same.
            let _ = self.disk.suspend();
        }
    }
}

impl Part for ReaderPart {
    fn first_ring_starts(&mut self) -> Result<(), Refusal> {
        let gate = self.disk.gate();
        // Said before the guest is looked for: if it leaves just now, it finds this or is not found.
        gate.set_reader_runs(true);
        if !gate.is_open() && self.is_alone() {
            gate.knock_for_reader();
        }
        Ok(())
    }

    fn last_ring_stopped(&mut self) -> Result<(), Refusal> {
        self.give_up();
        Ok(())
    }
}

impl Drop for ReaderPart {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Ends a freeze, if there is one: the front-end wants the writes to end that it holds back, and must not
/// hang.
pub fn end_freeze(disk: &dyn Disk) {
    match disk.hold() {
        Hold::Released | Hold::Awaited => {}
        Hold::Frozen => {
            log::warn!("the freeze ends early: the front-end stops the device");
            // It may have ended by itself meanwhile.
            let _ = disk.thaw();
        }
        // One may be coming about just now. If not, that is an error nobody needs.
        Hold::Held => drop(disk.thaw()),
    }
}
