//! From a descriptor chain to a block request, by the rules of virtio 1.2, 5.2.6.
//!
//! Everything here comes from the guest and is believed in nothing. What a rule needs twice is copied
//! once, since the guest can change it in between.

use crate::disk::gate::Gate;
use crate::queue::dirty_log::DirtyLog;
use crate::queue::memory::{GuestBuffer, Memory, MemoryView, Piece};
use std::fmt;
use std::sync::Arc;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

/// Length of the serial number.
pub const SERIAL_LEN: usize = 20;

/// Status: done.
pub const OK: u8 = VIRTIO_BLK_S_OK as u8;
/// Status: an error of the device or the driver.
pub const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// Status: no such request here.
pub const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const SECTOR: u64 = 512;
const HEADER_LEN: u64 = 16;
const RANGE_LEN: usize = 16;
/// A bit of old drivers that means nothing any more.
const BARRIER: u32 = 0x8000_0000;
const FLAG_UNMAP: u32 = 1;

/// What requests are checked against.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Where pages are marked that are written while a request is taken.
    pub log: Arc<DirtyLog>,
    /// Knows the size of the disk, which can change between two requests.
    pub gate: Arc<Gate>,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Logical block in bytes.
    pub block_size: u32,
    /// Largest range of a discard or write-zeroes in sectors.
    pub max_range_sectors: u32,
    /// Most ranges in a discard or write-zeroes.
    pub max_ranges: usize,
    /// Serial number, zero-padded.
    pub serial: [u8; SERIAL_LEN],
}

/// A range to be zeroed or discarded, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, not 0.
    pub len: u64,
    /// Its space may be given back.
    pub unmap: bool,
}

/// What the guest asks for.
#[derive(Debug)]
pub enum Command {
    /// Read into the buffer.
    Read {
        /// First byte of the disk.
        offset: u64,
        /// Where the data goes.
        buffer: Arc<GuestBuffer>,
    },
    /// Write the buffer.
    Write {
        /// First byte of the disk.
        offset: u64,
        /// The data.
        buffer: Arc<GuestBuffer>,
    },
    /// Make what was written durable.
    Flush,
    /// Forget the ranges.
    Discard(Vec<Range>),
    /// Zero the ranges.
    WriteZeroes(Vec<Range>),
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The status byte.
    pub status: GuestAddress,
    /// Bytes the device may write, the status included: the length of the used entry.
    pub len: u32,
}

/// What a chain comes to.
#[derive(Debug)]
pub enum Parsed {
    /// To be carried out.
    Command(Command, Reply),
    /// Answered already; the status is still to be stored.
    Answer(u8, Reply),
    /// Nothing can be answered.
    Broken(Flaw),
}

/// Why a chain cannot be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// It ends in the middle: a loop, a descriptor outside the table or memory, nested or misshapen
    /// indirect tables, or more than 4 GiB.
    Truncated,
    /// More descriptors than a chain may have.
    TooLong,
    /// No byte for the status, or none in the guest's memory.
    NoStatus,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flaw::Truncated => "the chain is broken",
            Flaw::TooLong => "the chain is longer than a queue",
            Flaw::NoStatus => "there is no status byte in guest memory",
        })
    }
}

/// Makes sense of the pieces of a complete chain.
pub fn parse(memory: &Arc<MemoryView>, pieces: &[Piece], rules: &Rules) -> Parsed {
    let readable: Vec<Piece> = pieces.iter().copied().filter(|piece| !piece.writable).collect();
    let writable: Vec<Piece> = pieces.iter().copied().filter(|piece| piece.writable).collect();
    let Some(reply) = reply(memory, &writable) else {
        return Parsed::Broken(Flaw::NoStatus);
    };
    let in_order = pieces.is_sorted_by_key(|piece| piece.writable);
    let parser = Parser { memory, rules, readable, writable };
    match if in_order { parser.command() } else { Err(IOERR) } {
        Ok(Some(command)) => Parsed::Command(command, reply),
        Ok(None) => Parsed::Answer(OK, reply),
        Err(status) => Parsed::Answer(status, reply),
    }
}

/// The status is the last writable byte.
fn reply(memory: &Memory, writable: &[Piece]) -> Option<Reply> {
    let last = writable.iter().rev().find(|piece| piece.len > 0)?;
    let status = last.addr.checked_add(u64::from(last.len) - 1)?;
    if !memory.check_range(status, 1, Permissions::Write) {
        return None;
    }
    let len = writable.iter().try_fold(0u32, |sum, piece| sum.checked_add(piece.len))?;
    Some(Reply { status, len })
}

struct Parser<'a> {
    memory: &'a Arc<MemoryView>,
    rules: &'a Rules,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

impl Parser<'_> {
    /// The command, `None` if there is nothing left to do, or the status of a refusal.
    fn command(&self) -> Result<Option<Command>, u8> {
        let mut header = [0; HEADER_LEN as usize];
        self.copy(&self.readable, 0, &mut header)?;
        let (kind, rest) = header.split_first_chunk::<4>().ok_or(IOERR)?;
        let sector = rest.last_chunk::<8>().ok_or(IOERR)?;
        let sector = u64::from_le_bytes(*sector);
        match u32::from_le_bytes(*kind) & !BARRIER {
            VIRTIO_BLK_T_IN => {
                let len = length(&self.writable).saturating_sub(1);
                self.data(&cut(&self.writable, 0, len), sector, len, |offset, buffer| {
                    Command::Read { offset, buffer }
                })
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let len = length(&self.readable).saturating_sub(HEADER_LEN);
                self.data(&cut(&self.readable, HEADER_LEN, len), sector, len, |offset, buffer| {
                    Command::Write { offset, buffer }
                })
            }
            // Whoever cannot write has nothing to make durable.
            VIRTIO_BLK_T_FLUSH if self.rules.read_only => Ok(None),
            VIRTIO_BLK_T_FLUSH => Ok(Some(Command::Flush)),
            VIRTIO_BLK_T_GET_ID => self.get_id(),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = self.ranges(0)?;
                Ok((!ranges.is_empty()).then_some(Command::Discard(ranges)))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let ranges = self.ranges(FLAG_UNMAP)?;
                Ok((!ranges.is_empty()).then_some(Command::WriteZeroes(ranges)))
            }
            _ => Err(UNSUPP),
        }
    }

    fn check_writable(&self) -> Result<(), u8> {
        if self.rules.read_only { Err(IOERR) } else { Ok(()) }
    }

    fn data(
        &self,
        pieces: &[Piece],
        sector: u64,
        len: u64,
        command: impl FnOnce(u64, Arc<GuestBuffer>) -> Command,
    ) -> Result<Option<Command>, u8> {
        let offset = self.check_range(sector, len)?;
        if len == 0 {
            return Ok(None);
        }
        let buffer = GuestBuffer::new(self.memory.clone(), pieces).ok_or(IOERR)?;
        Ok(Some(command(offset, Arc::new(buffer))))
    }

    /// The range in bytes, if it is made of whole logical blocks inside the disk.
    fn check_range(&self, sector: u64, len: u64) -> Result<u64, u8> {
        let block = u64::from(self.rules.block_size);
        let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
        let end = offset.checked_add(len).ok_or(IOERR)?;
        let whole = offset.is_multiple_of(block) && len.is_multiple_of(block);
        if whole && end <= self.rules.gate.capacity() { Ok(offset) } else { Err(IOERR) }
    }

    fn get_id(&self) -> Result<Option<Command>, u8> {
        let len = length(&self.writable).saturating_sub(1).min(SERIAL_LEN as u64);
        let target = GuestBuffer::new(self.memory.clone(), &cut(&self.writable, 0, len));
        let target = target.ok_or(IOERR)?;
        target.copy_from(0, self.rules.serial.get(..len as usize).ok_or(IOERR)?);
        self.rules.log.mark_buffer(&target);
        Ok(None)
    }

    /// The ranges of a discard or write-zeroes, those of no sectors left out.
    fn ranges(&self, allowed_flags: u32) -> Result<Vec<Range>, u8> {
        self.check_writable()?;
        let len = length(&self.readable).saturating_sub(HEADER_LEN);
        if len == 0 || !len.is_multiple_of(RANGE_LEN as u64) {
            return Err(IOERR);
        }
        if len > (self.rules.max_ranges * RANGE_LEN) as u64 {
            return Err(UNSUPP);
        }
        let mut payload = vec![0; len as usize];
        self.copy(&self.readable, HEADER_LEN, &mut payload)?;
        let mut ranges = Vec::with_capacity(payload.len() / RANGE_LEN);
        for entry in payload.chunks_exact(RANGE_LEN) {
            let range = self.range(entry, allowed_flags)?;
            if range.len > 0 {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    fn range(&self, entry: &[u8], allowed_flags: u32) -> Result<Range, u8> {
        let (sector, rest) = entry.split_first_chunk::<8>().ok_or(IOERR)?;
        let (sectors, rest) = rest.split_first_chunk::<4>().ok_or(IOERR)?;
        let flags = u32::from_le_bytes(*rest.first_chunk::<4>().ok_or(IOERR)?);
        let sectors = u32::from_le_bytes(*sectors);
        if sectors > self.rules.max_range_sectors {
            return Err(IOERR);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.check_range(u64::from_le_bytes(*sector), len)?;
        if flags & !allowed_flags != 0 {
            return Err(UNSUPP);
        }
        Ok(Range { offset, len, unmap: flags & FLAG_UNMAP != 0 })
    }

    /// Copies bytes of guest memory, once.
    fn copy(&self, pieces: &[Piece], skip: u64, target: &mut [u8]) -> Result<(), u8> {
        let mut rest = target;
        for piece in cut(pieces, skip, rest.len() as u64) {
            let (now, later) =
                std::mem::take(&mut rest).split_at_mut_checked(piece.len as usize).ok_or(IOERR)?;
            self.memory.read_slice(now, piece.addr).map_err(|_| IOERR)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(IOERR) }
    }
}

fn length(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.len)).sum()
}

/// Bytes `skip .. skip + take` of the pieces, or what there is of them.
fn cut(pieces: &[Piece], skip: u64, take: u64) -> Vec<Piece> {
    let (mut skip, mut left) = (skip, take);
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let len = u64::from(piece.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let part = left.min(len - skip);
        // Wrapping addresses are outside memory and found there.
        let addr = GuestAddress(piece.addr.0.wrapping_add(skip));
        if part > 0 {
            parts.push(Piece { addr, len: part as u32, writable: piece.writable });
        }
        left -= part;
        skip = 0;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::memory::tests::{memory, piece};

    const CAPACITY: u64 = 1 << 20;

    fn rules() -> Rules {
        Rules {
            log: Arc::default(),
            gate: Arc::new(Gate::new(true, CAPACITY).expect("eventfd")),
            read_only: false,
            block_size: 512,
            max_range_sectors: 1024,
            max_ranges: 3,
            serial: *b"serial number\0\0\0\0\0\0\0",
        }
    }

    const T_IN: u32 = VIRTIO_BLK_T_IN;
    const T_OUT: u32 = VIRTIO_BLK_T_OUT;
    const T_DISCARD: u32 = VIRTIO_BLK_T_DISCARD;
    const T_ZEROES: u32 = VIRTIO_BLK_T_WRITE_ZEROES;

    fn header(memory: &Memory, kind: u32, sector: u64) -> Piece {
        memory.write_obj(kind, GuestAddress(0)).expect("write");
        memory.write_obj(sector, GuestAddress(8)).expect("write");
        piece(0, 16, false)
    }

    fn status() -> Piece {
        piece(0xf000, 1, true)
    }

    fn answer(parsed: Parsed) -> u8 {
        match parsed {
            Parsed::Answer(status, reply) => {
                assert_eq!(reply.status, GuestAddress(0xf000));
                status
            }
            other => panic!("{other:?}"),
        }
    }

    fn ranges(memory: &Memory, ranges: &[(u64, u32, u32)]) -> Piece {
        for (i, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = 0x800 + i as u64 * 16;
            memory.write_obj(*sector, GuestAddress(at)).expect("write");
            memory.write_obj(*sectors, GuestAddress(at + 8)).expect("write");
            memory.write_obj(*flags, GuestAddress(at + 12)).expect("write");
        }
        piece(0x800, ranges.len() as u32 * 16, false)
    }

    #[test]
    fn a_read() {
        let memory = memory();
        let pieces = [header(&memory, T_IN, 3), piece(0x1000, 4096, true), status()];
        match parse(&memory, &pieces, &rules()) {
            Parsed::Command(Command::Read { offset, buffer }, reply) => {
                assert_eq!((offset, buffer.len()), (1536, 4096));
                assert_eq!(reply, Reply { status: GuestAddress(0xf000), len: 4097 });
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn layout_is_free() {
        // Header split in two, the second half in one descriptor with the data; the status is the tail
        // of the last data buffer.
        let memory = memory();
        header(&memory, T_OUT | BARRIER, 1);
        let pieces = [piece(0, 8, false), piece(8, 8 + 512, false), piece(0xf000, 1, true)];
        match parse(&memory, &pieces, &rules()) {
            Parsed::Command(Command::Write { offset, buffer }, reply) => {
                assert_eq!((offset, buffer.len(), reply.len), (512, 512, 1));
            }
            other => panic!("{other:?}"),
        }
        let pieces = [header(&memory, T_IN, 0), piece(0xf000 - 512, 513, true)];
        match parse(&memory, &pieces, &rules()) {
            Parsed::Command(Command::Read { buffer, .. }, reply) => {
                assert_eq!((buffer.len(), reply.len), (512, 513));
                assert_eq!(reply.status, GuestAddress(0xf000));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lengths_and_ranges() {
        let memory = memory();
        let last = CAPACITY / 512 - 1;
        for (sector, len, expected) in [
            (0, 511, IOERR),
            (0, 0, OK),
            (last + 1, 0, OK),
            (last + 2, 0, IOERR),
            (last, 1024, IOERR),
            (u64::MAX, 512, IOERR),
            (u64::MAX / 512, 512, IOERR),
        ] {
            let pieces = [header(&memory, T_IN, sector), piece(0x1000, len, true), status()];
            assert_eq!(answer(parse(&memory, &pieces, &rules())), expected, "{sector} {len}");
        }
        let coarse = Rules { block_size: 4096, ..rules() };
        for (sector, len, fine) in [(8, 4096, true), (1, 4096, false), (8, 512, false)] {
            let pieces = [header(&memory, T_IN, sector), piece(0x1000, len, true), status()];
            let parsed = parse(&memory, &pieces, &coarse);
            assert_eq!(matches!(parsed, Parsed::Command(..)), fine);
        }
    }

    #[test]
    fn read_only_disks_refuse_changes() {
        let memory = memory();
        let rules = Rules { read_only: true, ..rules() };
        let pieces = [header(&memory, T_OUT, 0), piece(0x1000, 512, false), status()];
        assert_eq!(answer(parse(&memory, &pieces, &rules)), IOERR);
        for kind in [T_DISCARD, T_ZEROES] {
            let pieces = [header(&memory, kind, 0), ranges(&memory, &[(0, 1, 0)]), status()];
            assert_eq!(answer(parse(&memory, &pieces, &rules)), IOERR);
        }
    }

    #[test]
    fn discard_and_write_zeroes() {
        let memory = memory();
        let run = |kind, list: &[(u64, u32, u32)]| {
            let pieces = [header(&memory, kind, 0), ranges(&memory, list), status()];
            parse(&memory, &pieces, &rules())
        };
        match run(T_DISCARD, &[(1, 2, 0), (0, 0, 0), (9, 1, 0)]) {
            Parsed::Command(Command::Discard(ranges), _) => assert_eq!(
                ranges,
                [
                    Range { offset: 512, len: 1024, unmap: false },
                    Range { offset: 9 * 512, len: 512, unmap: false }
                ]
            ),
            other => panic!("{other:?}"),
        }
        match run(T_ZEROES, &[(1, 2, 1)]) {
            Parsed::Command(Command::WriteZeroes(ranges), _) => {
                assert_eq!(ranges, [Range { offset: 512, len: 1024, unmap: true }]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(answer(run(T_DISCARD, &[(0, 1, 1)])), UNSUPP);
        assert_eq!(answer(run(T_ZEROES, &[(0, 1, 2)])), UNSUPP);
        assert_eq!(answer(run(T_ZEROES, &[(0, 1, 3)])), UNSUPP);
        assert_eq!(answer(run(T_DISCARD, &[(0, 0xffff_ffff, 0)])), IOERR);
        assert_eq!(answer(run(T_DISCARD, &[(0, 1025, 0)])), IOERR);
        assert_eq!(answer(run(T_DISCARD, &[(CAPACITY / 512, 1, 0)])), IOERR);
        // The range is looked at before the flags.
        assert_eq!(answer(run(T_DISCARD, &[(u64::MAX, 1, 1)])), IOERR);
        assert_eq!(answer(run(T_DISCARD, &[(0, 1, 0); 4])), UNSUPP);
        assert_eq!(answer(run(T_DISCARD, &[(0, 0, 0)])), OK);
        for len in [0, 15, 17] {
            let pieces = [header(&memory, T_ZEROES, 0), piece(0x800, len, false), status()];
            assert_eq!(answer(parse(&memory, &pieces, &rules())), IOERR);
        }
    }

    #[test]
    fn get_id_is_cut_to_the_buffer() {
        let memory = memory();
        for len in [0u32, 6, 20, 30] {
            memory.write_slice(&[0xee; 32], GuestAddress(0x1000)).expect("write");
            let kind = VIRTIO_BLK_T_GET_ID;
            let pieces = [header(&memory, kind, 0), piece(0x1000, len, true), status()];
            assert_eq!(answer(parse(&memory, &pieces, &rules())), OK);
            let mut back = [0; 32];
            memory.read_slice(&mut back, GuestAddress(0x1000)).expect("read");
            let copied = len.min(20) as usize;
            assert_eq!(back[..copied], rules().serial[..copied]);
            assert!(back[copied..].iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn unknown_types_and_bad_layouts() {
        let memory = memory();
        let pieces = [header(&memory, 99, 0), status()];
        assert_eq!(answer(parse(&memory, &pieces, &rules())), UNSUPP);
        // Header too short.
        assert_eq!(answer(parse(&memory, &[piece(0, 15, false), status()], &rules())), IOERR);
        assert_eq!(answer(parse(&memory, &[status()], &rules())), IOERR);
        // Readable after writable.
        let pieces = [header(&memory, T_IN, 0), status(), piece(0x1000, 512, false)];
        assert_eq!(answer(parse(&memory, &pieces, &rules())), IOERR);
        // Data outside memory.
        let pieces = [header(&memory, T_IN, 0), piece(0x8_0000, 512, true), status()];
        assert_eq!(answer(parse(&memory, &pieces, &rules())), IOERR);
    }

    #[test]
    fn chains_without_a_status_byte() {
        let memory = memory();
        let no_status = |pieces: &[Piece]| {
            matches!(parse(&memory, pieces, &rules()), Parsed::Broken(Flaw::NoStatus))
        };
        assert!(no_status(&[]));
        assert!(no_status(&[header(&memory, T_OUT, 0), piece(0x1000, 512, false)]));
        assert!(no_status(&[header(&memory, T_IN, 0), piece(0x1000, 0, true)]));
        assert!(no_status(&[header(&memory, T_IN, 0), piece(0x9_0000, 1, true)]));
        assert!(no_status(&[header(&memory, T_IN, 0), piece(u64::MAX, 2, true)]));
        assert!(no_status(&[header(&memory, T_IN, 0), piece(0x1000, u32::MAX, true), status()]));
    }
}
