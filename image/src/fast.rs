//! The way past the engine: reads and overwrites of written blocks, from any thread, without a lock.
//!
//! Most requests of a disk in use fall on blocks that are written already. They change no map and
//! need no journal; all they want from the engine is where the blocks are. [`Fast`] tells them. It is
//! a bounded cache of "this block is written, and here", which the engine fills after it looked
//! something up. Whatever it does not know, the engine does: a miss is never wrong, only slower.
//!
//! Two things make it safe, and both are decided in one total order of sequentially consistent
//! operations:
//!
//! * *Announce, then look.* A lane counts itself as under way before it looks a block up; the engine
//!   takes an entry away before it looks at the counts. So either the lane does not find the entry any
//!   more, or the engine sees the lane and waits for its I/O before the place is used again.
//! * *Epochs.* Counts are kept for two epochs in turn. What was freed in one epoch is recycled when
//!   that epoch is over and its count is zero; lanes that come later count in the next and have not
//!   seen the entry.
//!
//! An entry is one atomic word, so that there is nothing to tear: it says of one cell at which sector it
//! is. A cell is a block or 4 KiB, whichever is more. Where blocks are smaller than 4 KiB a cell may begin
//! at any sector, since that is where a guest's requests begin whose partition does: an entry is found by
//! the 4 KiB in which its cell begins, and says how many sectors into them that is. Its position and its
//! tag together name these exactly. Another table holds aligned runs of 512 cells that lie one
//! behind the other.

use crate::bugs::{self, Bug};
use crate::storage::SECTOR;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Cells in an aligned run that one entry can stand for.
pub(crate) const RUN_CELLS: u64 = 1 << RUN_BITS;
const RUN_BITS: u32 = 9;
/// Sectors of the smallest cell.
const CELL_MIN: u64 = 4096 / SECTOR;

/// A request in more parts than this goes to the engine.
const PLACES_MAX: usize = 16;
/// So does one of more bytes.
const BYTES_MAX: u64 = 4 << 20;

/// No engine stands behind it.
const SHUT: u64 = 1;
/// Nothing may be overwritten: the image is read-only, or has failed, or storage wants units larger
/// than a sector, so that overwrites own their blocks.
const NO_WRITES: u64 = 2;
/// The disk is being resized: everything goes to the engine, which holds it back.
const RESIZING: u64 = 4;
/// The image stands still: what writes goes to the engine, or waits.
const FROZEN: u64 = 8;
/// Where the number of the epoch begins.
const EPOCH: u64 = 1 << 8;

/// A part of the image file, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilePart {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What a lane wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read.
    Read,
    /// Write over what is there; not durable before a flush.
    Overwrite,
}

/// The shared part: what is known of written blocks, and who is under way.
pub struct Fast {
    /// Reasons to refuse, and the epoch.
    state: Line<AtomicU64>,
    /// Sectors of a block, a power of two.
    block_sectors: AtomicU64,
    /// Bound of the tables in bytes.
    bytes: u64,
    /// Made for the first image, and not larger than that can use.
    tables: OnceLock<Tables>,
    lanes: Mutex<Lanes>,
    /// Overwrites of lanes that are gone.
    left: AtomicU64,
}

/// A thread's way past the engine. Operations begin and end through the same lane.
pub struct Lane {
    fast: Arc<Fast>,
    counters: Arc<Line<Counters>>,
}

/// Allows the I/O that [`Lane::begin`] described, until [`Lane::end`]. One that is lost keeps freed
/// space from being used again.
#[must_use]
#[derive(PartialEq, Eq, Debug)]
pub struct Ticket {
    odd: bool,
    access: Access,
}

/// Counts of one lane, on cache lines of its own.
#[derive(Default)]
struct Counters {
    /// Under way, by the parity of the epoch they began in.
    under_way: [AtomicU64; 2],
    /// Overwrites ended that the engine has not been told of.
    dirty: AtomicU64,
    reads: AtomicU64,
    overwrites: AtomicU64,
    misses: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// What a lane, or all, have done.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct FastStats {
    /// Reads.
    pub reads: u64,
    /// Overwrites.
    pub overwrites: u64,
    /// Requests that had to go to the engine.
    pub misses: u64,
    /// Bytes of the reads.
    pub bytes_read: u64,
    /// Bytes of the overwrites.
    pub bytes_written: u64,
}

impl FastStats {
    fn plus(self, other: FastStats) -> FastStats {
        FastStats {
            reads: self.reads + other.reads,
            overwrites: self.overwrites + other.overwrites,
            misses: self.misses + other.misses,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_written: self.bytes_written + other.bytes_written,
        }
    }
}

/// The lanes there are, and what those did that are gone.
#[derive(Default)]
struct Lanes {
    live: Vec<Arc<Line<Counters>>>,
    gone: FastStats,
}

/// Keeps a value on cache lines of its own (two: processors fetch them in pairs).
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

impl fmt::Debug for Fast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fast").field("state", &self.state.0).finish_non_exhaustive()
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Fast {
    /// One of at most about `bytes` bytes, with no engine behind it yet: see [`crate::Disk::share`].
    pub fn new(bytes: u64) -> Arc<Fast> {
        Arc::new(Fast {
            state: Line(AtomicU64::new(SHUT)),
            block_sectors: AtomicU64::new(1),
            bytes,
            tables: OnceLock::new(),
            lanes: Mutex::new(Lanes::default()),
            left: AtomicU64::new(0),
        })
    }

    /// A lane for a thread.
    pub fn lane(self: &Arc<Self>) -> Lane {
        let counters = Arc::new(Line(Counters::default()));
        self.lanes().live.push(Arc::clone(&counters));
        Lane { fast: Arc::clone(self), counters }
    }

    /// What all lanes have done.
    pub fn stats(&self) -> FastStats {
        let lanes = self.lanes();
        lanes.live.iter().fold(lanes.gone, |sum, lane| sum.plus(lane.0.stats()))
    }

    /// Nothing is under way. What begins afterwards does so unless it is refused.
    pub fn is_idle(&self) -> bool {
        self.count(0) == 0 && self.count(1) == 0
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, parity: usize) -> u64 {
        self.lanes().live.iter().map(|lane| lane.0.under_way[parity].load(SeqCst)).sum()
    }

    /// The parts of the file where `offset .. offset + len` is; false if not all of it is known.
    fn find(&self, offset: u64, len: u64, parts: &mut Vec<FilePart>) -> bool {
        let Some(Tables { cells, runs }) = self.tables.get() else { return false };
        let Some(end) = offset.checked_add(len) else { return false };
        if len == 0 || len > BYTES_MAX || !(offset | len).is_multiple_of(SECTOR) {
            return false;
        }
        let block = self.block_sectors.load(SeqCst);
        let bits = cell_sectors(block).ilog2();
        // Cells that begin in the one before may reach into this one.
        let reach = |cell: u64| (block < CELL_MIN && cell > 0).then(|| cell - 1);
        let (mut at, end) = (offset / SECTOR, end / SECTOR);
        while at < end {
            let cell = at >> bits;
            let run = cell >> RUN_BITS;
            let find = |cell: u64| {
                let (phase, sector) = cells.get(cell)?;
                let start = (cell << bits) + phase;
                (start..start + (1 << bits)).contains(&at).then_some((start, bits, sector))
            };
            let found = match runs.get(run) {
                Some((_, sector)) => Some((run << (bits + RUN_BITS), bits + RUN_BITS, sector)),
                None => find(cell).or_else(|| find(reach(cell)?)),
            };
            let Some((start, bits, sector)) = found else { return false };
            let until = end.min(start + (1 << bits));
            let (place, len) = ((sector + at - start) * SECTOR, (until - at) * SECTOR);
            let full = parts.len() == PLACES_MAX;
            match parts.last_mut() {
                Some(last) if last.offset + last.len == place => last.len += len,
                _ if full => return false,
                _ => parts.push(FilePart { offset: place, len }),
            }
            at = until;
        }
        true
    }
}

impl Lane {
    /// Where to read or write a range of the disk, whose parts are put into the empty `parts`. `None`:
    /// ask the engine.
    pub fn begin(
        &mut self,
        access: Access,
        offset: u64,
        len: u64,
        parts: &mut Vec<FilePart>,
    ) -> Option<Ticket> {
        let counters = &self.counters.0;
        let refused = match access {
            Access::Read => SHUT | RESIZING,
            Access::Overwrite => SHUT | RESIZING | NO_WRITES | FROZEN,
        };
        let state = self.fast.state.0.load(SeqCst);
        if state & refused == 0 {
            let odd = state & EPOCH != 0;
            let under_way = &counters.under_way[usize::from(odd)];
            under_way.fetch_add(1, SeqCst);
            // The same state still: whoever changes it from now on sees the count.
            if self.fast.state.0.load(SeqCst) == state && self.fast.find(offset, len, parts) {
                let (count, bytes) = match access {
                    Access::Read => (&counters.reads, &counters.bytes_read),
                    Access::Overwrite => (&counters.overwrites, &counters.bytes_written),
                };
                add(count, 1);
                add(bytes, len);
                return Some(Ticket { odd, access });
            }
            under_way.fetch_sub(1, SeqCst);
            parts.clear();
        }
        add(&counters.misses, 1);
        None
    }

    /// The I/O has ended, well or not. To be called before anybody learns that the request is finished.
    pub fn end(&mut self, ticket: Ticket) {
        let counters = &self.counters.0;
        if ticket.access == Access::Overwrite {
            counters.dirty.fetch_add(1, SeqCst);
        }
        counters.under_way[usize::from(ticket.odd)].fetch_sub(1, SeqCst);
    }

    /// What went this way so far.
    pub fn stats(&self) -> FastStats {
        self.counters.0.stats()
    }
}

/// Adds to a counter that only this thread writes.
fn add(counter: &AtomicU64, more: u64) {
    use std::sync::atomic::Ordering::Relaxed;
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

impl Drop for Lane {
    /// Its I/O has ended: whoever did it has waited for that.
    fn drop(&mut self) {
        let under_way: u64 = self.counters.0.under_way.iter().map(|count| count.load(SeqCst)).sum();
        let dirty = self.counters.0.dirty.swap(0, SeqCst) + under_way;
        self.fast.left.fetch_add(dirty, SeqCst);
        let mut lanes = self.fast.lanes();
        lanes.gone = lanes.gone.plus(self.counters.0.stats());
        lanes.live.retain(|lane| !Arc::ptr_eq(lane, &self.counters));
    }
}

impl Counters {
    fn stats(&self) -> FastStats {
        FastStats {
            reads: self.reads.load(SeqCst),
            overwrites: self.overwrites.load(SeqCst),
            misses: self.misses.load(SeqCst),
            bytes_read: self.bytes_read.load(SeqCst),
            bytes_written: self.bytes_written.load(SeqCst),
        }
    }
}

/// The engine's end of a [`Fast`]. All calls come from one thread at a time.
pub(crate) struct FastOwner {
    fast: Arc<Fast>,
    block_sectors: u64,
    /// The I/O numbers under which the epochs count as under way: the present one, and the one before
    /// if it is not over.
    present: u64,
    former: Option<u64>,
}

impl FastOwner {
    /// Stands behind `fast`, for a disk of so many blocks of so many sectors, with `io` as the number of the
    /// first epoch. Fails if another does.
    pub(crate) fn new(
        fast: Arc<Fast>,
        block_sectors: u64,
        blocks: u64,
        writes: bool,
        io: u64,
    ) -> Option<FastOwner> {
        let state = fast.state.0.load(SeqCst);
        if state & SHUT == 0 || !fast.is_idle() {
            return None;
        }
        fast.block_sectors.store(block_sectors, SeqCst);
        let cells = (blocks * block_sectors).div_ceil(cell_sectors(block_sectors));
        // New ones are empty: looking through them would only map their pages.
        if let Some(tables) = fast.tables.get() {
            tables.clear();
        }
        fast.tables.get_or_init(|| Tables::new(fast.bytes, cells));
        fast.left.store(0, SeqCst);
        for lane in &fast.lanes().live {
            lane.0.dirty.store(0, SeqCst);
        }
        let epoch = state & !(EPOCH - 1);
        fast.state.0.store(epoch | if writes { 0 } else { NO_WRITES }, SeqCst);
        Some(FastOwner { fast, block_sectors, present: io, former: None })
    }

    /// Blocks of a cell.
    pub(crate) fn cell_blocks(&self) -> u64 {
        cell_sectors(self.block_sectors) / self.block_sectors
    }

    /// Shows that `blocks` blocks from `block` are written and lie from `sector` on, as far as they fill
    /// cells that begin with the first.
    pub(crate) fn show(&self, block: u64, blocks: u64, sector: u64) {
        let cell = cell_sectors(self.block_sectors);
        let first = block * self.block_sectors;
        for index in 0..blocks * self.block_sectors / cell {
            let (start, place) = (first + index * cell, sector + index * cell);
            self.tables().cells.put(start / cell, start % cell, place);
        }
    }

    /// Shows that the aligned run of this number is written and lies from `sector` on.
    pub(crate) fn show_run(&self, run: u64, sector: u64) {
        self.tables().runs.put(run, 0, sector);
    }

    /// Takes back what was shown of these blocks. What begins afterwards does not find them.
    pub(crate) fn hide(&self, blocks: Range<u64>) {
        if blocks.is_empty() || bugs::on(Bug::FastShowsDiscarded) {
            return;
        }
        let cell = cell_sectors(self.block_sectors);
        let sectors = blocks.start * self.block_sectors..blocks.end * self.block_sectors;
        let overlaps = |start: u64, len: u64| start < sectors.end && sectors.start < start + len;
        let of_cells = |len: u64| sectors.start / len..(sectors.end - 1) / len + 1;
        let mut cells = of_cells(cell);
        if self.block_sectors < CELL_MIN && !bugs::on(Bug::FastHidesAligned) {
            // One that begins in the cell before may reach into the first.
            cells.start = cells.start.saturating_sub(1);
        }
        self.tables().cells.remove(cells, |index, phase| overlaps(index * cell + phase, cell));
        self.tables().runs.remove(of_cells(cell * RUN_CELLS), |_, _| true);
    }

    /// Takes everything back.
    pub(crate) fn hide_all(&self) {
        self.tables().clear();
    }

    fn tables(&self) -> &Tables {
        self.fast.tables.get().expect("made when this was")
    }

    /// Overwrites that ended since the last call.
    pub(crate) fn take_dirty(&self) -> u64 {
        if bugs::on(Bug::FastNotDirty) {
            return 0;
        }
        let fast = &self.fast;
        let take =
            |count: &AtomicU64| if count.load(SeqCst) == 0 { 0 } else { count.swap(0, SeqCst) };
        let left = take(&fast.left);
        left + fast.lanes().live.iter().map(|lane| take(&lane.0.dirty)).sum::<u64>()
    }

    /// Works towards the end of the epochs under way, which are numbered like I/O: numbers of those that
    /// are over leave `running`, and a new one gets the number `io`.
    pub(crate) fn turn(&mut self, io: u64, running: &mut BTreeSet<u64>) {
        self.end_former(running);
        if self.former.is_none() {
            self.former = Some(std::mem::replace(&mut self.present, io));
            running.insert(io);
            self.fast.state.0.fetch_add(EPOCH, SeqCst);
            self.end_former(running);
        }
    }

    fn end_former(&mut self, running: &mut BTreeSet<u64>) {
        let Some(former) = self.former else { return };
        let odd = self.fast.state.0.load(SeqCst) & EPOCH != 0;
        if self.fast.count(usize::from(!odd)) == 0 || bugs::on(Bug::FastRecyclesEarly) {
            self.former = None;
            running.remove(&former);
        }
    }

    /// All its epochs are over.
    pub(crate) fn leave(&self, running: &mut BTreeSet<u64>) {
        running.remove(&self.present);
        self.former.map(|former| running.remove(&former));
    }

    /// Nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.fast.is_idle()
    }

    /// The disk is being resized, or is not any more.
    pub(crate) fn set_resizing(&self, on: bool) {
        self.set(RESIZING, on);
    }

    /// The image is to stand still, or may change again.
    pub(crate) fn set_frozen(&self, on: bool) {
        self.set(FROZEN, on);
    }

    /// Nothing is overwritten any more.
    pub(crate) fn refuse_writes(&self) {
        self.set(NO_WRITES, true);
    }

    /// Nothing begins any more.
    pub(crate) fn shut(&self) {
        self.set(SHUT, true);
    }

    fn set(&self, flag: u64, on: bool) {
        if on {
            self.fast.state.0.fetch_or(flag, SeqCst);
        } else {
            self.fast.state.0.fetch_and(!flag, SeqCst);
        }
    }
}

impl Drop for FastOwner {
    fn drop(&mut self) {
        self.shut();
    }
}

/// Sectors of a cell, where blocks have so many.
fn cell_sectors(block_sectors: u64) -> u64 {
    block_sectors.max(CELL_MIN)
}

/// Bits of a sector number in an entry: images of 1 PiB.
const SECTOR_BITS: u32 = 41;
const SECTOR_MASK: u64 = (1 << SECTOR_BITS) - 1;
/// Bits of where a cell begins, above these.
const PHASE_BITS: u32 = CELL_MIN.ilog2();
/// Bits of the part of the key that the position does not tell, above those.
const TAG_BITS: u32 = 18;
const TAG_SHIFT: u32 = SECTOR_BITS + PHASE_BITS;
/// What says which key an entry is of.
const HEAD_MASK: u64 = !((1 << TAG_SHIFT) - 1);
/// The entry stands at its second position.
const SECOND: u64 = 1 << 62;
const TAKEN: u64 = 1 << 63;

struct Tables {
    cells: Table,
    runs: Table,
}

impl Tables {
    /// For a disk of so many cells.
    fn new(bytes: u64, cells: u64) -> Tables {
        // Two thirds for single cells, one third for runs; both with room for a larger disk.
        let words = bytes / 8;
        Tables {
            cells: Table::new((words * 2 / 3).min(2 * cells)),
            runs: Table::new((words / 3).min(2 * (cells / RUN_CELLS + 1))),
        }
    }

    fn clear(&self) {
        self.cells.clear();
        self.runs.clear();
    }
}

/// Where in its 4 KiB the cell of an entry begins, in sectors.
fn phase_of(entry: u64) -> u64 {
    entry >> SECTOR_BITS & ((1 << PHASE_BITS) - 1)
}

/// A table of words, each an entry for the key that its position and its tag make. A key has two
/// positions. Keys and sectors that do not fit are not kept.
struct Table {
    slots: Box<[AtomicU64]>,
    bits: u32,
    /// Which of two taken positions gives way next.
    turn: AtomicU64,
}

impl Table {
    /// A table of at most `words` words, but at least one.
    fn new(words: u64) -> Table {
        let bits = words.max(1).ilog2();
        // Memory of zeroes comes from the system, which maps a page when it is touched first.
        let slots = bytemuck::zeroed_slice_box(1 << bits);
        Table { slots, bits, turn: AtomicU64::new(0) }
    }

    fn mask(&self) -> u64 {
        (1 << self.bits) - 1
    }

    /// Distance between the two positions of keys with this tag: its bits, mixed.
    fn distance(&self, tag: u64) -> u64 {
        (tag.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) & self.mask()
    }

    /// The positions of a key and what its entry there begins with.
    fn positions(&self, key: u64) -> Option<[(u64, u64); 2]> {
        let (low, tag) = (key & self.mask(), key >> self.bits);
        if tag >> TAG_BITS != 0 {
            return None;
        }
        let head = TAKEN | tag << TAG_SHIFT;
        Some([(low, head), (low ^ self.distance(tag), head | SECOND)])
    }

    fn slot(&self, position: u64) -> &AtomicU64 {
        &self.slots[position as usize]
    }

    /// The phase and the sector of a key's entry.
    fn get(&self, key: u64) -> Option<(u64, u64)> {
        let positions = self.positions(key)?;
        positions.into_iter().find_map(|(position, head)| {
            let entry = self.slot(position).load(SeqCst);
            (entry & HEAD_MASK == head).then_some((phase_of(entry), entry & SECTOR_MASK))
        })
    }

    fn put(&self, key: u64, phase: u64, sector: u64) {
        let Some(positions) = self.positions(key) else { return };
        if sector > SECTOR_MASK {
            return;
        }
        let current = positions.map(|(position, _)| self.slot(position).load(SeqCst));
        let same = (0..2).find(|&way| current[way] & HEAD_MASK == positions[way].1);
        let empty = || (0..2).find(|&way| current[way] == 0);
        let way = same.or_else(empty).unwrap_or_else(|| {
            add(&self.turn, 1);
            (self.turn.load(SeqCst) & 1) as usize
        });
        let (position, head) = positions[way];
        let entry = head | phase << SECTOR_BITS | sector;
        if current[way] != entry {
            self.slot(position).store(entry, SeqCst);
        }
    }

    /// Removes the entries of keys whose phase is one that `concerns` names.
    fn remove(&self, keys: Range<u64>, concerns: impl Fn(u64, u64) -> bool) {
        if keys.end - keys.start > self.slots.len() as u64 {
            for (position, slot) in self.slots.iter().enumerate() {
                let entry = slot.load(SeqCst);
                let key = self.key(position as u64, entry);
                if entry != 0 && keys.contains(&key) && concerns(key, phase_of(entry)) {
                    slot.store(0, SeqCst);
                }
            }
            return;
        }
        for key in keys {
            let Some(positions) = self.positions(key) else { return };
            for (position, head) in positions {
                let slot = self.slot(position);
                let entry = slot.load(SeqCst);
                if entry & HEAD_MASK == head && concerns(key, phase_of(entry)) {
                    slot.store(0, SeqCst);
                }
            }
        }
    }

    /// The key of an entry.
    fn key(&self, position: u64, entry: u64) -> u64 {
        let tag = (entry >> TAG_SHIFT) & ((1 << TAG_BITS) - 1);
        let low = if entry & SECOND == 0 { position } else { position ^ self.distance(tag) };
        tag << self.bits | low
    }

    fn clear(&self) {
        for slot in &self.slots {
            // Most are empty, and pages that nobody has touched need no memory of their own then.
            if slot.load(SeqCst) != 0 {
                slot.store(0, SeqCst);
            }
        }
    }
}
