//! The inflight region: which requests have been taken from a ring and not been completed, in memory that
//! the front-end keeps when this process dies (vhost-user document, "Inflight I/O tracking", split ring).
//!
//! What counts is the order of the stores: whichever was the last before a SIGKILL, the next process finds
//! every request either shown as used, or marked here, or not yet taken:
//!
//! - taking: counter, then mark, in the order of the available ring;
//! - completing a batch: link its heads (next, last head), show them by one store of the used index, clear
//!   their marks, then note the used index here.
//!
//! If the noted index differs from the ring's, the last batch was shown and its marks may still stand:
//! that many heads from the last one on are cleared. So the number of requests ever taken is the used
//! index plus the marks, and that is where the available ring goes on.
//!
//! The front-end can write here too: while the ring runs nothing is read back, and what is found at its
//! start is checked.

use crate::queue::used::UsedRing;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes before the entries of a queue.
const HEADER: usize = 16;
/// Bytes in an entry.
const ENTRY: usize = 16;
/// Each queue's part starts at a multiple of it.
const ALIGNMENT: usize = 64;
/// Behind the queues: what the front-end was told of the configuration.
const TRAILER: usize = 64;
/// In it: the size of the disk in bytes.
const TOLD_CAPACITY: usize = 0;
/// In it: whether guest and front-end believe in a volatile cache: NO or YES; 0: unknown.
const VOLATILE_CACHE: usize = 8;
const NO: u64 = 1;
const YES: u64 = 2;
/// The version this is; 0 stands for a part that was never used.
const VERSION_SPLIT: u16 = 1;

const FEATURES: usize = 0;
const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST_HEAD: usize = 12;
const USED_INDEX: usize = 14;

fn mark_of(head: u16) -> usize {
    HEADER + ENTRY * usize::from(head)
}

fn next_of(head: u16) -> usize {
    mark_of(head) + 6
}

fn counter_of(head: u16) -> usize {
    mark_of(head) + 8
}

/// Memory that outlives the process, by byte offset. Stores become visible in the order they are made.
pub trait Cells {
    /// Reads a byte.
    fn u8(&self, at: usize) -> u8;
    /// Reads two bytes.
    fn u16(&self, at: usize) -> u16;
    /// Reads eight bytes.
    fn u64(&self, at: usize) -> u64;
    /// Stores a byte.
    fn set_u8(&self, at: usize, value: u8);
    /// Stores two bytes.
    fn set_u16(&self, at: usize, value: u16);
    /// Stores eight bytes.
    fn set_u64(&self, at: usize, value: u64);
}

/// Why a queue's part of the region cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// Of another version than ours.
    Version(u16),
    /// Features nobody told us of.
    Features(u64),
    /// Made for another number of entries.
    Entries(u16),
    /// The ring is larger than the region allows.
    RingSize(u16),
    /// There is no part for this queue.
    NoQueue,
    /// The used index here has nothing to do with the ring's.
    UsedIndex {
        /// Here.
        noted: u16,
        /// In the ring.
        ring: u16,
    },
    /// The list of the last batch leaves the table or runs in a circle.
    LastBatch,
    /// A head is marked that the ring does not have.
    Head(u16),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the inflight region is unusable: ")?;
        match self {
            Unusable::Version(version) => write!(f, "version {version}"),
            Unusable::Features(features) => write!(f, "features {features:#x}"),
            Unusable::Entries(entries) => write!(f, "made for {entries} entries"),
            Unusable::RingSize(size) => write!(f, "too small for a ring of {size}"),
            Unusable::NoQueue => write!(f, "it has no part for this queue"),
            Unusable::UsedIndex { noted, ring } => {
                write!(f, "used index {noted}, but the ring's is {ring}")
            }
            Unusable::LastBatch => write!(f, "the list of its last batch is broken"),
            Unusable::Head(head) => write!(f, "head {head} is not in the ring"),
        }
    }
}

/// Keeps the part of one queue while its ring runs.
#[derive(Debug)]
pub struct Tracker<C> {
    cells: C,
    entries: u16,
    /// Of the next request taken.
    counter: u64,
    last_head: u16,
}

impl<C: Cells> Tracker<C> {
    /// For a ring that starts, with `size` entries and used index `used`. Also returns the heads that were
    /// taken and not completed, in the order in which they were taken.
    pub fn recover(
        cells: C,
        entries: u16,
        size: u16,
        used: u16,
    ) -> Result<(Tracker<C>, Vec<u16>), Unusable> {
        if size > entries {
            return Err(Unusable::RingSize(size));
        }
        let mut tracker = Tracker { cells, entries, counter: 0, last_head: 0 };
        let heads = match tracker.cells.u16(VERSION) {
            0 => {
                tracker.initialise(used);
                Vec::new()
            }
            VERSION_SPLIT => tracker.reclaim(size, used)?,
            version => return Err(Unusable::Version(version)),
        };
        Ok((tracker, heads))
    }

    /// The version comes last: until it is there, the next process starts again.
    fn initialise(&mut self, used: u16) {
        let cells = &self.cells;
        for head in 0..self.entries {
            cells.set_u8(mark_of(head), 0);
        }
        cells.set_u64(FEATURES, 0);
        cells.set_u16(ENTRIES, self.entries);
        cells.set_u16(LAST_HEAD, 0);
        cells.set_u16(USED_INDEX, used);
        cells.set_u16(VERSION, VERSION_SPLIT);
    }

    /// Everything is checked before anything is changed.
    fn reclaim(&mut self, size: u16, used: u16) -> Result<Vec<u16>, Unusable> {
        let cells = &self.cells;
        let (features, entries) = (cells.u64(FEATURES), cells.u16(ENTRIES));
        if features != 0 {
            return Err(Unusable::Features(features));
        }
        if entries != self.entries {
            return Err(Unusable::Entries(entries));
        }
        let mut marked: Vec<bool> = (0..entries).map(|head| cells.u8(mark_of(head)) != 0).collect();
        let last_head = cells.u16(LAST_HEAD);
        // With nothing marked there is nothing to clear; a driver may have started the ring anew.
        let shown =
            if marked.contains(&true) { self.last_batch(last_head, used)? } else { Vec::new() };
        for head in &shown {
            marked[usize::from(*head)] = false;
        }
        let mut heads: Vec<u16> = (0..entries).filter(|head| marked[usize::from(*head)]).collect();
        if let Some(head) = heads.iter().find(|head| **head >= size) {
            return Err(Unusable::Head(*head));
        }
        self.order(&mut heads);
        self.last_head = if last_head < entries { last_head } else { 0 };
        for head in shown {
            self.cells.set_u8(mark_of(head), 0);
        }
        self.cells.set_u16(USED_INDEX, used);
        Ok(heads)
    }

    /// The heads of the last batch, if it was shown and the process died before it could note that.
    fn last_batch(&self, last_head: u16, used: u16) -> Result<Vec<u16>, Unusable> {
        let noted = self.cells.u16(USED_INDEX);
        let count = used.wrapping_sub(noted);
        if count > self.entries {
            return Err(Unusable::UsedIndex { noted, ring: used });
        }
        let mut heads: Vec<u16> = Vec::with_capacity(count.into());
        let mut head = last_head;
        for _ in 0..count {
            if head >= self.entries || heads.contains(&head) {
                return Err(Unusable::LastBatch);
            }
            heads.push(head);
            head = self.cells.u16(next_of(head));
        }
        Ok(heads)
    }

    /// Sorts by counter, which may wrap: all that are in flight lie close together. Goes on behind them.
    fn order(&mut self, heads: &mut [u16]) {
        let Some(first) = heads.first() else { return };
        let origin = self.cells.u64(counter_of(*first));
        // Read once each: a front-end that changes them meanwhile changes the order, and nothing else.
        let mut keyed: Vec<(i64, u16)> = heads
            .iter()
            .map(|head| {
                let distance = self.cells.u64(counter_of(*head)).wrapping_sub(origin);
                (distance.cast_signed(), *head)
            })
            .collect();
        keyed.sort_unstable();
        for (place, (_, head)) in heads.iter_mut().zip(&keyed) {
            *place = *head;
        }
        if let Some((distance, _)) = keyed.last() {
            self.counter = origin.wrapping_add(distance.cast_unsigned()).wrapping_add(1);
        }
    }

    /// Number of entries: heads are less than that.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// The request of this head has been taken. Call it for each in the order of the available ring.
    pub fn take(&mut self, head: u16) {
        assert!(head < self.entries, "a head outside the inflight region");
        self.cells.set_u64(counter_of(head), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.cells.set_u8(mark_of(head), 1);
    }

    /// Completes a batch of different heads: `show` shows it to the guest by one store and returns the new
    /// used index. If it fails, all of the batch stays marked.
    pub fn complete<E>(
        &mut self,
        heads: impl Iterator<Item = u16> + Clone,
        show: impl FnOnce() -> Result<u16, E>,
    ) -> Result<(), E> {
        for head in heads.clone() {
            self.cells.set_u16(next_of(head), self.last_head);
            self.cells.set_u16(LAST_HEAD, head);
            self.last_head = head;
        }
        let used = show()?;
        for head in heads {
            self.cells.set_u8(mark_of(head), 0);
        }
        self.cells.set_u16(USED_INDEX, used);
        Ok(())
    }
}

/// How a region is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Number of queues.
    pub queues: u16,
    /// Entries for each queue.
    pub entries: u16,
}

impl Layout {
    fn stride(self) -> usize {
        (HEADER + ENTRY * usize::from(self.entries)).next_multiple_of(ALIGNMENT)
    }

    /// Bytes in all. A region of another size is laid out in another way.
    pub fn bytes(self) -> usize {
        self.stride() * usize::from(self.queues) + TRAILER
    }
}

/// A region, mapped.
#[derive(Debug)]
pub struct Region {
    mapping: MmapRegion,
    layout: Layout,
}

impl Region {
    /// Makes a region, empty, and the descriptor by which the front-end keeps it.
    pub fn create(layout: Layout) -> io::Result<(Region, OwnedFd)> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"vhost-inflight", flags)?;
        let len = i64::try_from(layout.bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
        fallocate(&fd, FallocateFlags::empty(), 0, len)?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        let region = Region::map(fd.try_clone()?, 0, layout)?;
        Ok((region, fd))
    }

    /// Maps a region that the front-end has kept, `offset` bytes into its file.
    pub fn map(fd: OwnedFd, offset: u64, layout: Layout) -> io::Result<Region> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        if !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            // Whoever cuts it short would kill the daemon.
            return Err(io::Error::other("it is not sealed against shrinking"));
        }
        let file = File::from(fd);
        let end = offset.checked_add(layout.bytes() as u64);
        if end.is_none_or(|end| i64::try_from(end).is_err()) || end > Some(file.metadata()?.len()) {
            return Err(io::Error::other("it is longer than its file"));
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), layout.bytes())
            .map_err(|error| io::Error::other(format!("it cannot be mapped: {error}")))?;
        Ok(Region { mapping, layout })
    }

    fn trailer(&self, at: usize) -> &AtomicU64 {
        let trailer = self.layout.bytes() - TRAILER;
        self.mapping.get_atomic_ref(trailer + at).expect("inside the region")
    }

    /// The size of the disk in bytes that the front-end was told, if a process before us noted it.
    pub fn told_capacity(&self) -> Option<u64> {
        match self.trailer(TOLD_CAPACITY).load(Ordering::Relaxed) {
            0 => None,
            capacity => Some(capacity),
        }
    }

    /// Guest and front-end are sure to believe in a volatile cache, or may not, if a process before us noted
    /// it.
    pub fn volatile_cache(&self) -> Option<bool> {
        match self.trailer(VOLATILE_CACHE).load(Ordering::Acquire) {
            NO => Some(false),
            YES => Some(true),
            _ => None,
        }
    }

    /// Notes it for a process after us.
    pub fn set_volatile_cache(&self, volatile: bool) {
        self.trailer(VOLATILE_CACHE).store(if volatile { YES } else { NO }, Ordering::Release);
    }

    /// Notes it for a process after us.
    pub fn set_told_capacity(&self, capacity: u64) {
        self.trailer(TOLD_CAPACITY).store(capacity, Ordering::Relaxed);
    }
}

/// A queue's part of a region.
#[derive(Debug)]
pub struct QueueCells {
    region: Arc<Region>,
    start: usize,
}

impl QueueCells {
    fn cell<T: vm_memory::AtomicInteger>(&self, at: usize) -> &T {
        // Offsets are ours, the mapping is page-aligned and as long as its layout says.
        self.region.mapping.get_atomic_ref(self.start + at).expect("inside the region")
    }
}

impl Cells for QueueCells {
    fn u8(&self, at: usize) -> u8 {
        self.cell::<AtomicU8>(at).load(Ordering::Acquire)
    }
    fn u16(&self, at: usize) -> u16 {
        self.cell::<AtomicU16>(at).load(Ordering::Acquire)
    }
    fn u64(&self, at: usize) -> u64 {
        self.cell::<AtomicU64>(at).load(Ordering::Acquire)
    }
    fn set_u8(&self, at: usize, value: u8) {
        self.cell::<AtomicU8>(at).store(value, Ordering::Release);
    }
    fn set_u16(&self, at: usize, value: u16) {
        self.cell::<AtomicU16>(at).store(value, Ordering::Release);
    }
    fn set_u64(&self, at: usize, value: u64) {
        self.cell::<AtomicU64>(at).store(value, Ordering::Release);
    }
}

/// The region that the front-end has chosen; rings that start from then on use it.
#[derive(Debug, Default)]
pub struct Inflight(Mutex<Option<Arc<Region>>>);

impl Inflight {
    /// The front-end has chosen a region, or none.
    pub fn set(&self, region: Option<Arc<Region>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = region;
    }

    /// What it has chosen.
    pub fn region(&self) -> Option<Arc<Region>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests of the queue are marked.
    pub fn has_left(&self, queue: u16) -> bool {
        let region = self.region();
        let Some(region) = region.filter(|region| queue < region.layout.queues) else {
            return false;
        };
        let layout = region.layout;
        let cells = QueueCells { start: layout.stride() * usize::from(queue), region };
        cells.u16(VERSION) == VERSION_SPLIT
            && (0..layout.entries).any(|head| cells.u8(mark_of(head)) != 0)
    }

    /// For the ring of queue `queue` that starts: its tracker, and the heads to be submitted again. `None`
    /// without a region.
    #[expect(clippy::type_complexity, reason = "a pair, if there is one, or an error")]
    pub fn attach(
        &self,
        queue: u16,
        size: u16,
        used: UsedRing,
    ) -> Result<Option<(Tracker<QueueCells>, Vec<u16>)>, Unusable> {
        let region = self.region();
        let Some(region) = region else { return Ok(None) };
        let layout = region.layout;
        if queue >= layout.queues {
            return Err(Unusable::NoQueue);
        }
        let cells = QueueCells { start: layout.stride() * usize::from(queue), region };
        Tracker::recover(cells, layout.entries, size, used.next()).map(Some)
    }
}

#[cfg(test)]
mod model;
