//! Walks a descriptor chain from its head (virtio 1.2, 2.7.5): for requests from the ring and for those
//! that an earlier process had taken from it.
//!
//! The guest can change descriptors at any time: each is read once, and nothing here depends on what is
//! read twice.

use crate::queue::memory::{Memory, Piece};
use crate::queue::request::Flaw;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

/// Bytes in a descriptor.
const DESCRIPTOR: u64 = 16;

/// Descriptors that a number of 16 bits can name.
const INDICES: u32 = 1 << 16;

/// A table of descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Guest address of the first one.
    pub addr: GuestAddress,
    /// Number of descriptors.
    pub len: u32,
}

impl Table {
    fn descriptor(self, memory: &Memory, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.len {
            return None;
        }
        let addr = self.addr.0.checked_add(u64::from(index) * DESCRIPTOR)?;
        memory.read_obj(GuestAddress(addr)).ok()
    }

    /// The indirect table that a descriptor refers to.
    fn indirect(descriptor: &Descriptor) -> Option<Table> {
        let len = descriptor.len();
        let whole = len > 0 && u64::from(len).is_multiple_of(DESCRIPTOR);
        let table = Table { addr: descriptor.addr(), len: len / DESCRIPTOR as u32 };
        // Nothing may follow: the chain goes on in the table. What no index reaches is no table.
        (whole && table.len <= INDICES && !descriptor.has_next()).then_some(table)
    }
}

/// Puts the pieces of the chain that starts at `head` into `pieces`. `longest` is the most pieces that an
/// indirect table may bring; in the ring's own table a chain longer than the table is a loop.
pub fn walk(
    memory: &Memory,
    ring: Table,
    head: u16,
    longest: usize,
    pieces: &mut Vec<Piece>,
) -> Result<(), Flaw> {
    pieces.clear();
    let mut table = ring;
    let mut most = ring.len as usize;
    let mut is_indirect = false;
    let mut index = head;
    let mut total = 0u32;
    loop {
        let descriptor = table.descriptor(memory, index).ok_or(Flaw::Truncated)?;
        if descriptor.refers_to_indirect_table() {
            if is_indirect {
                return Err(Flaw::Truncated);
            }
            table = Table::indirect(&descriptor).ok_or(Flaw::Truncated)?;
            (is_indirect, most, index) = (true, longest, 0);
            continue;
        }
        if pieces.len() >= most {
            return Err(Flaw::TooLong);
        }
        // virtio 1.2, 2.7.5.2: no more than 2^32 bytes; the used entry can count fewer.
        total = total.checked_add(descriptor.len()).ok_or(Flaw::Truncated)?;
        pieces.push(Piece {
            addr: descriptor.addr(),
            len: descriptor.len(),
            writable: descriptor.is_write_only(),
        });
        if !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::{memory, piece};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    /// Where indirect tables lie.
    const OTHER: u64 = 0x1000;

    fn put(memory: &Memory, table: u64, slot: u64, fields: (u64, u32, u16, u16)) {
        let (addr, len, flags, next) = fields;
        let descriptor = Descriptor::new(addr, len, flags, next);
        memory.write_obj(descriptor, GuestAddress(table + slot * DESCRIPTOR)).expect("write");
    }

    fn walked(memory: &Memory, head: u16) -> Result<Vec<Piece>, Flaw> {
        let mut pieces = vec![piece(9, 9, true)];
        let ring = Table { addr: GuestAddress(0), len: 4 };
        walk(memory, ring, head, 8, &mut pieces).map(|()| pieces)
    }

    #[test]
    fn a_chain_in_the_ring() {
        let memory = memory();
        put(&memory, 0, 2, (0x2000, 16, NEXT, 0));
        put(&memory, 0, 0, (0x3000, 512, NEXT | WRITE, 3));
        put(&memory, 0, 3, (0x4000, 1, WRITE, 0));
        let expected =
            vec![piece(0x2000, 16, false), piece(0x3000, 512, true), piece(0x4000, 1, true)];
        assert_eq!(walked(&memory, 2), Ok(expected));
    }

    #[test]
    fn a_chain_in_an_indirect_table() {
        let memory = memory();
        put(&memory, 0, 1, (0x2000, 16, NEXT, 0));
        put(&memory, 0, 0, (OTHER, 6 * 16, INDIRECT, 0));
        for slot in 0..5 {
            put(&memory, OTHER, slot, (0x3000, 512, NEXT, slot as u16 + 1));
        }
        put(&memory, OTHER, 5, (0x4000, 1, WRITE, 0));
        assert_eq!(walked(&memory, 0).map(|pieces| pieces.len()), Ok(6), "more than the ring has");
        assert_eq!(walked(&memory, 1).map(|pieces| pieces.len()), Ok(7), "behind another one");
    }

    #[test]
    fn broken_chains() {
        let memory = memory();
        // A loop, in the ring and in a table.
        put(&memory, 0, 0, (0x2000, 16, NEXT, 1));
        put(&memory, 0, 1, (0x2000, 16, NEXT, 0));
        assert_eq!(walked(&memory, 0), Err(Flaw::TooLong));
        put(&memory, 0, 0, (OTHER, 32, INDIRECT, 0));
        put(&memory, OTHER, 0, (0x2000, 16, NEXT, 0));
        assert_eq!(walked(&memory, 0), Err(Flaw::TooLong));
        // Next outside the table it is in.
        put(&memory, OTHER, 0, (0x2000, 16, NEXT, 2));
        assert_eq!(walked(&memory, 0), Err(Flaw::Truncated));
        put(&memory, 0, 0, (0x2000, 16, NEXT, 4));
        assert_eq!(walked(&memory, 0), Err(Flaw::Truncated));
        assert_eq!(walked(&memory, 4), Err(Flaw::Truncated));
        assert_eq!(walked(&memory, u16::MAX), Err(Flaw::Truncated));
        // Tables that are none.
        for (addr, len, flags) in [
            (OTHER, 0, INDIRECT),
            (OTHER, 17, INDIRECT),
            (OTHER, 0xffff_fff0, INDIRECT),
            (0x8_0000, 16, INDIRECT),
            (u64::MAX - 15, 32, INDIRECT),
            (OTHER, 16, INDIRECT | NEXT),
        ] {
            put(&memory, OTHER, 0, (0x2000, 16, 0, 0));
            put(&memory, 0, 0, (addr, len, flags, 1));
            assert_eq!(walked(&memory, 0), Err(Flaw::Truncated), "{addr:x} {len} {flags}");
        }
        // A table in a table.
        put(&memory, 0, 0, (OTHER, 16, INDIRECT, 0));
        put(&memory, OTHER, 0, (OTHER, 16, INDIRECT, 0));
        assert_eq!(walked(&memory, 0), Err(Flaw::Truncated));
        // More than 4 GiB.
        put(&memory, 0, 0, (0x2000, u32::MAX, NEXT, 1));
        put(&memory, 0, 1, (0x2000, 1, WRITE, 0));
        assert_eq!(walked(&memory, 0), Err(Flaw::Truncated));
    }
}
