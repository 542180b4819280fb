//! The device's side of a used ring (virtio 1.2, 2.7.8).
//!
//! Entries are written first and shown together by one store of the index, which the inflight region
//! needs: a process that dies shows all of a batch or nothing. The index is our own: what is in the
//! guest's memory is read only when a ring starts.

use crate::queue::memory::Memory;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Bytes of flags and index, before the entries of either ring.
const HEADER: u64 = 4;
/// Bytes in an entry of the used ring.
const ENTRY: u64 = 8;
/// Bytes in an entry of the available ring.
const AVAIL_ENTRY: u64 = 2;

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsedRing {
    /// The index: entries shown so far, modulo 2^16.
    next: u16,
    /// The index when the guest was last told, or not to be told.
    signalled: u16,
}

/// A guest address in a ring. One that wraps is outside memory, where it is found.
fn at(ring: u64, offset: u64) -> GuestAddress {
    GuestAddress(ring.wrapping_add(offset))
}

impl UsedRing {
    /// The ring as it is in the guest's memory.
    pub fn load(memory: &Memory, queue: &Queue) -> Result<UsedRing, GuestMemoryError> {
        let next: u16 = memory.load(at(queue.used_ring(), 2), Ordering::Acquire)?;
        let next = u16::from_le(next);
        Ok(UsedRing { next, signalled: next })
    }

    /// The index.
    pub fn next(&self) -> u16 {
        self.next
    }

    /// Writes entry `position` of the batch to come: the chain's head, and how many bytes were written.
    pub fn write(
        &self,
        memory: &Memory,
        queue: &Queue,
        position: u16,
        head: u16,
        len: u32,
    ) -> Result<(), GuestMemoryError> {
        let slot = u64::from(self.next.wrapping_add(position) % queue.size());
        // Two words of four bytes: the head, the length.
        let entry = u64::from(head) | u64::from(len) << 32;
        memory.write_obj(entry.to_le(), at(queue.used_ring(), HEADER + slot * ENTRY))
    }

    /// Shows the batch of so many entries.
    pub fn show(
        &mut self,
        memory: &Memory,
        queue: &Queue,
        count: u16,
    ) -> Result<(), GuestMemoryError> {
        let next = self.next.wrapping_add(count);
        memory.store(next.to_le(), at(queue.used_ring(), 2), Ordering::Release)?;
        self.next = next;
        Ok(())
    }

    /// The guest wants to be told of what has been shown since this was last asked.
    pub fn wants_signal(&mut self, memory: &Memory, queue: &Queue) -> bool {
        // The index must be in memory before the guest's wish is read: 2.7.10.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.signalled, self.next);
        let load = |offset| {
            let value = memory.load::<u16>(at(queue.avail_ring(), offset), Ordering::Relaxed);
            value.map(u16::from_le)
        };
        if queue.event_idx_enabled() {
            let event = load(HEADER + u64::from(queue.size()) * AVAIL_ENTRY);
            event.map_or(true, |event| passed(event, old, self.next))
        } else {
            load(0).map_or(true, |flags| flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
        }
    }
}

/// The index has gone past `event` on its way from `old` to `new` (2.7.7.2).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::memory;

    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;

    fn queue(event_idx: bool) -> Queue {
        let mut queue = Queue::new(8).expect("a queue");
        queue.set_size(4);
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
        queue.set_event_idx(event_idx);
        queue
    }

    #[test]
    fn a_batch_shows_at_once_and_wraps() {
        let (memory, queue) = (memory(), queue(false));
        memory.write_obj(65534u16, GuestAddress(USED + 2)).expect("write");
        let mut used = UsedRing::load(&memory, &queue).expect("load");
        for position in 0..3 {
            used.write(&memory, &queue, position, 10 + position, 100).expect("write");
            let index: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("read");
            assert_eq!(index, 65534);
        }
        used.show(&memory, &queue, 3).expect("show");
        let index: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("read");
        assert_eq!((index, used.next()), (1, 1));
        for (slot, head) in [(2, 10u32), (3, 11), (0, 12)] {
            let found: u32 = memory.read_obj(GuestAddress(USED + 4 + slot * 8)).expect("read");
            assert_eq!(found, head);
        }
    }

    #[test]
    fn the_guest_is_told_when_it_wants_to_be() {
        let (memory, queue) = (memory(), queue(false));
        let mut used = UsedRing::load(&memory, &queue).expect("load");
        for (flags, wanted) in [(0u16, true), (1, false)] {
            memory.write_obj(flags, GuestAddress(AVAIL)).expect("write");
            used.show(&memory, &queue, 1).expect("show");
            assert_eq!(used.wants_signal(&memory, &queue), wanted);
        }
    }

    #[test]
    fn the_guest_is_told_when_its_event_is_passed() {
        let (memory, queue) = (memory(), queue(true));
        let mut used = UsedRing::load(&memory, &queue).expect("load");
        for (event, shown, wanted) in
            [(0u16, 1, true), (0, 1, false), (3, 1, false), (3, 1, true), (65535, 4, false)]
        {
            memory.write_obj(event, GuestAddress(AVAIL + 4 + 8)).expect("write");
            used.show(&memory, &queue, shown).expect("show");
            assert_eq!(used.wants_signal(&memory, &queue), wanted, "event {event}");
        }
        assert!(passed(65535, 65535, 0) && passed(65534, 65533, 1) && !passed(2, 65535, 1));
    }
}
