//! The log of guest pages that we write, for live migration (vhost-user document, "Migration").
//!
//! A bit per page of 4096 bytes of the guest's address space, in memory that the front-end shares and
//! clears. A page is marked after it was written: marked before, the front-end could copy it between the
//! two. What must not be missed when logging begins is the business of whoever turns it on: see
//! [`crate::front::logging`].

use crate::queue::memory::GuestBuffer;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{PoisonError, RwLock};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, MmapRegion, VolatileMemory};

/// Bytes of a page of the log, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// The used ring (virtio 1.2, 2.7.8): flags, index at this offset, entries at this one, ...
const USED_INDEX: u64 = 2;
const USED_RING: u64 = 4;
/// ... each of so many bytes.
const USED_ENTRY: u64 = 8;

/// The log, and whether it is kept.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    /// Marks hold it shared: when another log is set, nobody marks in the old one any more.
    log: RwLock<Option<MmapRegion<()>>>,
}

impl DirtyLog {
    /// Pages are to be marked.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Turns marking on or off.
    pub fn set_on(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }

    /// Uses a log of `size` bytes at `offset` of the descriptor. An error is the front-end's fault.
    pub fn set_base(&self, fd: OwnedFd, size: u64, offset: u64) -> Result<(), String> {
        let refused = |error: &dyn std::fmt::Display| format!("the dirty log: {error}");
        let size = usize::try_from(size).map_err(|error| refused(&error))?;
        if size == 0 {
            return Err(refused(&"no bytes"));
        }
        let file = File::from(fd);
        // Memory behind the end of a file is there, but to touch it is a fatal signal (P8).
        let length = file.metadata().map_err(|error| refused(&error))?.len();
        if offset.checked_add(size as u64).is_none_or(|end| end > length) {
            return Err(refused(&format_args!("behind the end of its file of {length} bytes")));
        }
        let place = FileOffset::new(file, offset);
        let log = MmapRegion::from_file(place, size).map_err(|error| refused(&error))?;
        *self.log.write().unwrap_or_else(PoisonError::into_inner) = Some(log);
        Ok(())
    }

    /// Keeps everybody who marks pages waiting.
    #[cfg(test)]
    pub fn hold(&self) -> impl Sized + '_ {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` bytes of guest memory have been written.
    pub fn mark(&self, addr: GuestAddress, len: u64) {
        if self.is_on() {
            self.mark_pages(addr.0, len);
        }
    }

    /// All of a buffer may have been written.
    pub fn mark_buffer(&self, buffer: &GuestBuffer) {
        if self.is_on() {
            buffer.visit_guest(|addr, len| self.mark_pages(addr.0, len));
        }
    }

    /// The `count` entries of a used ring before index `next` have been written, and the index.
    pub fn mark_used(&self, queue: &Queue, next: u16, count: u16) {
        if !self.is_on() {
            return;
        }
        let (ring, size) = (queue.used_ring(), u64::from(queue.size()).max(1));
        for back in 1..=count {
            let slot = u64::from(next.wrapping_sub(back)) % size;
            self.mark_pages(ring.wrapping_add(USED_RING + slot * USED_ENTRY), USED_ENTRY);
        }
        self.mark_pages(ring.wrapping_add(USED_INDEX), 2);
    }

    /// The hint has been written whether and when the guest should kick: the available event behind the
    /// used ring's entries or, without EVENT_IDX, its flags.
    pub fn mark_hint(&self, queue: &Queue) {
        if self.is_on() {
            let event = USED_RING + u64::from(queue.size()) * USED_ENTRY;
            let offset = if queue.event_idx_enabled() { event } else { 0 };
            self.mark_pages(queue.used_ring().wrapping_add(offset), 2);
        }
    }

    #[cold]
    fn mark_pages(&self, addr: u64, len: u64) {
        let log = self.log.read().unwrap_or_else(PoisonError::into_inner);
        let (Some(log), Some(last)) = (&*log, addr.checked_add(len.saturating_sub(1))) else {
            return;
        };
        if len == 0 {
            return;
        }
        for page in addr / PAGE..=last / PAGE {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            match log.get_atomic_ref::<AtomicU8>(byte) {
                Ok(bits) => drop(bits.fetch_or(1 << (page % 8), Ordering::SeqCst)),
                Err(_) => {
                    log::error!(target: "guest", "the dirty log does not reach page {page:#x}");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::{memory, piece};
    use std::os::unix::fs::FileExt;

    fn log(bytes: u64) -> (DirtyLog, File) {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(bytes).expect("grow");
        let log = DirtyLog::default();
        log.set_base(file.try_clone().expect("duplicate").into(), bytes, 0).expect("set");
        log.set_on(true);
        (log, file)
    }

    fn pages(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; file.metadata().expect("length").len() as usize];
        file.read_exact_at(&mut bytes, 0).expect("read");
        (0..bytes.len() as u64 * 8).filter(|p| bytes[*p as usize / 8] >> (p % 8) & 1 == 1).collect()
    }

    #[test]
    fn exactly_the_pages_that_were_written() {
        let (log, file) = log(8);
        log.mark(GuestAddress(4095), 1);
        log.mark(GuestAddress(3 * 4096 - 1), 2);
        log.mark(GuestAddress(9 * 4096), 4096);
        log.mark(GuestAddress(20 * 4096), 0);
        assert_eq!(pages(&file), [0, 2, 3, 9]);
        log.set_on(false);
        log.mark(GuestAddress(5 * 4096), 1);
        assert_eq!(pages(&file), [0, 2, 3, 9], "off");
    }

    #[test]
    fn what_the_log_does_not_cover_is_left_alone() {
        let (log, file) = log(2);
        for addr in [16 * 4096, 1 << 40, u64::MAX - 10, u64::MAX] {
            log.mark(GuestAddress(addr), 4096);
        }
        assert_eq!(pages(&file), [0; 0]);
        log.mark(GuestAddress(15 * 4096), 8192);
        assert_eq!(pages(&file), [15], "the part that it covers");
    }

    #[test]
    fn buffers_by_their_guest_addresses() {
        let (log, file) = log(64);
        let pieces = [piece(0x1ff0, 32, true), piece(0x10_3000, 1, true), piece(0xffff, 1, true)];
        log.mark_buffer(&GuestBuffer::new(memory(), &pieces).expect("in memory"));
        assert_eq!(pages(&file), [1, 2, 15, 0x103]);
    }

    #[test]
    fn bad_logs_are_refused() {
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(4096).expect("grow");
        let log = DirtyLog::default();
        let fd = || file.try_clone().expect("duplicate").into();
        for (size, offset) in [(0, 0), (4097, 0), (4096, 4096), (u64::MAX, 0), (8, u64::MAX)] {
            assert!(log.set_base(fd(), size, offset).is_err(), "{size} {offset}");
        }
        let null = File::open("/dev/null").expect("open");
        assert!(log.set_base(null.into(), 4096, 0).is_err());
        // Without a log, marks go nowhere.
        log.set_on(true);
        log.mark(GuestAddress(0), 1);
        log.set_base(fd(), 4096, 0).expect("a good one");
    }
}
