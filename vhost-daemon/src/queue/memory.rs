//! Guest memory as the rest of the daemon sees it: pieces of descriptor chains on the guest's side,
//! ranges of this process's memory on ours.

#![allow(unsafe_code)]

use std::ops::Deref;
use std::sync::Arc;
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap,
    GuestMemoryRegion, Permissions, VolatileSlice,
};

/// The library's dirty tracking of guest memory: none. See [`crate::queue::dirty_log`].
pub type Bitmap = ();
/// One state of the guest's memory map.
pub type Memory = GuestMemoryMmap<Bitmap>;
/// The guest's memory map, which the front-end replaces at run time.
pub type SharedMemory = GuestMemoryAtomic<Memory>;

/// A state of the guest's memory map, held once for many requests of a thread. If each held the map itself, the
/// count of its holders would wander between the processors of all threads.
#[derive(Debug)]
pub struct MemoryView(Arc<Memory>);

impl MemoryView {
    /// The present state of the map: `known`, if it still is.
    pub fn present(map: &SharedMemory, known: Option<&Arc<MemoryView>>) -> Arc<MemoryView> {
        let now = map.memory();
        match known {
            Some(known) if std::ptr::eq::<Memory>(&*now, &*known.0) => known.clone(),
            _ => Arc::new(MemoryView(now.into_inner())),
        }
    }
}

impl Deref for MemoryView {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.0
    }
}

/// A part of a descriptor chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Guest address of the first byte.
    pub addr: GuestAddress,
    /// Number of bytes.
    pub len: u32,
    /// The device may write it (else it may only read it).
    pub writable: bool,
}

/// A range of this process's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRange {
    /// Address of the first byte.
    pub addr: usize,
    /// Number of bytes.
    pub len: usize,
}

/// The data buffer of a request: guest memory, mapped here for as long as this value lives. The guest
/// may change its content at any time.
#[derive(Debug)]
pub struct GuestBuffer {
    ranges: Vec<HostRange>,
    len: u64,
    /// Keeps the mapping: the front-end may replace the memory map while the kernel works on it.
    memory: Arc<MemoryView>,
}

impl GuestBuffer {
    /// The buffer made of `pieces`; `None` if a part of it is not in the guest's memory.
    pub fn new(memory: Arc<MemoryView>, pieces: &[Piece]) -> Option<GuestBuffer> {
        let mut ranges: Vec<HostRange> = Vec::with_capacity(pieces.len());
        let mut len = 0u64;
        for piece in pieces {
            let access = if piece.writable { Permissions::Write } else { Permissions::Read };
            for slice in memory.get_slices(piece.addr, piece.len as usize, access).ok()? {
                let slice = slice.ok()?;
                let addr = slice.ptr_guard().as_ptr() as usize;
                len = len.checked_add(slice.len() as u64)?;
                match ranges.last_mut() {
                    Some(last) if last.addr + last.len == addr => last.len += slice.len(),
                    _ => ranges.push(HostRange { addr, len: slice.len() }),
                }
            }
        }
        Some(GuestBuffer { ranges, len, memory })
    }

    /// Number of bytes.
    #[expect(clippy::len_without_is_empty, reason = "requests without data have no buffer")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Visits the host ranges of bytes `offset .. offset + len` in order.
    pub fn visit(&self, offset: u64, len: u64, mut visit: impl FnMut(HostRange)) {
        let (mut skip, mut left) = (offset, len);
        for range in &self.ranges {
            if left == 0 {
                break;
            }
            let size = range.len as u64;
            if skip >= size {
                skip -= size;
                continue;
            }
            let take = left.min(size - skip);
            visit(HostRange { addr: range.addr + skip as usize, len: take as usize });
            left -= take;
            skip = 0;
        }
        assert!(left == 0, "a part of a request lies outside its buffer");
    }

    /// Visits the guest addresses of the buffer, in no order. Slow: for rare occasions.
    pub fn visit_guest(&self, mut visit: impl FnMut(GuestAddress, u64)) {
        // Elsewhere its `get_slices` would be the other trait's.
        use vm_memory::GuestMemoryBackend;
        for range in &self.ranges {
            // Neighbours here may be far apart in the guest.
            for region in self.memory.iter() {
                let start = region.as_ptr() as usize;
                let (from, to) = (start.max(range.addr), range.addr + range.len);
                let to = to.min(start + region.len() as usize);
                if from < to {
                    let addr = region.start_addr().unchecked_add((from - start) as u64);
                    visit(addr, (to - from) as u64);
                }
            }
        }
    }

    /// Copies bytes `offset ..` out of the buffer.
    pub fn copy_to(&self, offset: u64, target: &mut [u8]) {
        let mut rest = target;
        self.visit(offset, rest.len() as u64, |range| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(range.len);
            self.volatile(range).copy_to(now);
            rest = later;
        });
    }

    /// Copies `source` into the buffer at `offset`.
    pub fn copy_from(&self, offset: u64, source: &[u8]) {
        let mut rest = source;
        self.visit(offset, rest.len() as u64, |range| {
            let (now, later) = rest.split_at(range.len);
            self.volatile(range).copy_from(now);
            rest = later;
        });
    }

    /// Fills a part of the buffer with zeroes.
    pub fn zero(&self, offset: u64, len: u64) {
        const ZEROES: [u8; 4096] = [0; 4096];
        self.visit(offset, len, |range| {
            let slice = self.volatile(range);
            for at in (0..range.len).step_by(ZEROES.len()) {
                let take = ZEROES.len().min(range.len - at);
                if let Ok(part) = slice.subslice(at, take) {
                    part.copy_from(&ZEROES[..take]);
                }
            }
        });
    }

    /// It holds nothing but zeroes, at the moment of looking.
    pub fn is_zero(&self) -> bool {
        let mut window = [0; 4096];
        self.ranges.iter().all(|range| {
            // A look at the first bytes settles it for most data.
            let first = range.len.min(16);
            let mut windows = (0..first).step_by(16).chain((first..range.len).step_by(4096));
            windows.all(|at| {
                let end = if at < first { first } else { range.len.min(at + 4096) };
                let part = &mut window[..end - at];
                self.volatile(HostRange { addr: range.addr + at, len: end - at }).copy_to(part);
                part.iter().all(|byte| *byte == 0)
            })
        })
    }

    fn volatile(&self, range: HostRange) -> VolatileSlice<'_> {
        // SAFETY: the range is a part of a slice of guest memory that `memory` keeps mapped for as
        // long as `self` lives, and the guest's concurrent changes are what volatile access is for.
        unsafe { VolatileSlice::new(range.addr as *mut u8, range.len) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// 64 KiB at 0 and 64 KiB at 1 MiB.
    pub fn memory() -> Arc<MemoryView> {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10_0000), 0x10000)];
        let memory = Memory::from_ranges(&ranges).expect("memory");
        Arc::new(MemoryView(Arc::new(memory)))
    }

    /// A piece of guest memory.
    pub fn piece(addr: u64, len: u32, writable: bool) -> Piece {
        Piece { addr: GuestAddress(addr), len, writable }
    }

    #[test]
    fn copies_follow_the_pieces() {
        let memory = memory();
        let pieces = [piece(0x100, 10, true), piece(0x200, 5, true), piece(0x10_0000, 5, true)];
        let buffer = GuestBuffer::new(memory.clone(), &pieces).expect("in memory");
        assert_eq!(buffer.len(), 20);
        buffer.copy_from(8, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let mut two = [0; 2];
        memory.read_slice(&mut two, GuestAddress(0x108)).expect("read");
        assert_eq!(two, [1, 2]);
        memory.read_slice(&mut two, GuestAddress(0x203)).expect("read");
        assert_eq!(two, [6, 7]);
        buffer.zero(9, 2);
        let mut back = [9; 8];
        buffer.copy_to(8, &mut back);
        assert_eq!(back, [1, 0, 0, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn neighbours_merge() {
        let buffer = GuestBuffer::new(memory(), &[piece(0, 512, false), piece(512, 512, false)])
            .expect("in");
        let mut count = 0;
        buffer.visit(100, 900, |range| {
            count += 1;
            assert_eq!(range.len, 900);
        });
        assert_eq!(count, 1);
    }

    #[test]
    fn outsidememory_is_refused() {
        assert!(GuestBuffer::new(memory(), &[piece(0xff00, 0x200, true)]).is_none());
        assert!(GuestBuffer::new(memory(), &[piece(u64::MAX - 3, 8, true)]).is_none());
        assert!(GuestBuffer::new(memory(), &[piece(0x8_0000, 1, false)]).is_none());
    }
}
