//! Space of the image file: what may be allocated, and what must happen to freed space first.
//!
//! Free space has no truth of its own. `open` is exactly the space that no map owns and that may
//! hold anything; it follows from the last checkpoint's list and the journal's entries, so that
//! recovery needs no scan and nothing can leak. Everything else that nothing owns is zero, durably.
//! The allocator's own structures are parts of `open`, kept in memory only.

use crate::pool::{Cut, Pool, ZeroAhead};
use crate::ranges::RangeSet;
use crate::streams::Streams;
use exd_format::{SpaceKind, SpaceRange};
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes in the units of this module.
pub(crate) const SECTOR: u64 = crate::storage::SECTOR;

/// Image space is handed to windows, nodes and lists in units of 4 KiB.
const UNIT: u64 = 4096 / SECTOR;

/// No place lies at or past this sector.
pub(crate) const SECTORS_END: u64 = exd_format::PHYSICAL_END / SECTOR;

/// Remembered ranges of zeroes; a forgotten one costs file offsets, not host space.
const ZERO_RANGES_MAX: usize = 4096;

/// A range of recycled zeroes this long, in sectors, is always worth a window.
const WORTH_MAX: u64 = (256 << 10) / SECTOR;

/// Runs that streams have left; more are not remembered.
const RUNS_MAX: usize = 64;

/// Windows whose records are not durable yet.
const OPENINGS_MAX: usize = 16;

/// With so many separate ranges of open space, data is not aligned at the price of another one.
const GAPS_MAX: usize = 1 << 16;

/// Ends of host blocks remembered for blocks smaller than the host's.
const SCRAPS_MAX: usize = 1024;

/// A freshly allocated place for data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) sector: u64,
    pub(crate) blocks: u64,
    /// The place is durably zero: one sync may cover its data and its record.
    pub(crate) known_zero: bool,
    /// Written before, for the host: a write of a part of its blocks costs no more than any other.
    pub(crate) written: bool,
    /// So many sectors before the place and behind it are to be written with zeroes together with it: the
    /// host must not see a first write of a part of one of its blocks, which it would serialize.
    pub(crate) lead: u64,
    pub(crate) pad: u64,
    /// What follows is going to be written there: the end of the last block is left to it.
    pub(crate) open_end: bool,
}

impl Place {
    /// One that shares no block of the host with a hole.
    pub(crate) fn plain(sector: u64, blocks: u64) -> Place {
        Place {
            sector,
            blocks,
            known_zero: false,
            written: false,
            lead: 0,
            pad: 0,
            open_end: false,
        }
    }
}

/// What is to be allocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wish {
    pub(crate) first: u64,
    pub(crate) blocks: u64,
    /// The place shall be so many sectors past a multiple of 4 KiB: the data is aligned then.
    pub(crate) phase: u64,
    /// Few blocks: worth a place in the pool, and not a block more to be aligned.
    pub(crate) small: bool,
    /// Worth a place in the pool.
    pub(crate) prepared: bool,
    /// The data begins with the first block, in the request or in the one before it.
    pub(crate) goes_on: bool,
}

pub(crate) struct Window {
    pub(crate) range: Range<u64>,
    pub(crate) known_zero: bool,
}

struct Opening {
    window: Window,
    cseq: u64,
    /// It is to join the metadata reserve.
    reserve: bool,
}

struct Freed {
    range: Range<u64>,
    cseq: u64,
    io: u64,
}

pub(crate) struct Space {
    sectors_per_block: u64,
    host_sectors: u64,
    window_sectors: u64,
    /// End of a block device.
    device_end: Option<u64>,
    /// Owned by no map, may hold anything.
    pub(crate) open: RangeSet,
    /// Free and durably zero.
    pub(crate) zero: RangeSet,
    /// Nothing at or past this sector was ever used.
    pub(crate) data_end: u64,
    windows: VecDeque<Window>,
    pub(crate) pool: Pool,
    /// Writers that go on where they were, in windows.
    streams: Streams,
    /// What streams have left of their space.
    runs: Vec<Range<u64>>,
    /// Ends of host blocks that were written as padding: zero, and written already for the host.
    scraps: Vec<Range<u64>>,
    opening: Vec<Opening>,
    quarantine: VecDeque<Freed>,
    dirty: RangeSet,
    /// Ranges of `dirty` that punching has not been tried on.
    to_punch: VecDeque<Range<u64>>,
    punched: VecDeque<(Range<u64>, u64)>,
    meta: RangeSet,
    /// Freed places keep their host space: nothing is punched.
    keep: bool,
}

impl Space {
    pub(crate) fn new(sectors_per_block: u64, data_end: u64) -> Self {
        Space {
            sectors_per_block,
            host_sectors: UNIT,
            window_sectors: 0,
            device_end: None,
            open: RangeSet::new(),
            zero: RangeSet::new(),
            data_end,
            windows: VecDeque::new(),
            pool: Pool::new(ZeroAhead::Off, 0),
            streams: Streams::default(),
            runs: Vec::new(),
            scraps: Vec::new(),
            opening: Vec::new(),
            quarantine: VecDeque::new(),
            dirty: RangeSet::new(),
            to_punch: VecDeque::new(),
            punched: VecDeque::new(),
            meta: RangeSet::new(),
            keep: false,
        }
    }

    /// Settles the host's side of things once the image is opened for writing.
    pub(crate) fn configure(
        &mut self,
        host_block: u64,
        window_bytes: u64,
        device_end: Option<u64>,
        keep: bool,
        pool: Pool,
    ) {
        self.pool = pool;
        self.host_sectors = (host_block / SECTOR).max(1);
        let unit = self.unit();
        self.window_sectors = (window_bytes / SECTOR).max(1).next_multiple_of(unit);
        self.device_end = device_end;
        self.keep = keep;
    }

    /// No place lies at or past this sector.
    pub(crate) fn end(&self) -> u64 {
        self.device_end.unwrap_or(SECTORS_END)
    }

    /// Windows begin and end at multiples of this.
    fn unit(&self) -> u64 {
        UNIT.max(self.sectors_per_block).max(self.host_sectors)
    }

    // --- What the entries of the journal do; the same for running and for replaying. ---

    pub(crate) fn map(&mut self, range: Range<u64>) {
        self.open.remove(range);
    }

    pub(crate) fn free(&mut self, range: Range<u64>) {
        self.zero.remove(range.clone());
        self.open.insert(range);
    }

    pub(crate) fn open_window(&mut self, range: Range<u64>) {
        self.data_end = self.data_end.max(range.end.next_multiple_of(UNIT));
        self.zero.remove(range.clone());
        self.open.insert(range);
    }

    pub(crate) fn release(&mut self, range: Range<u64>) {
        self.open.remove(range.clone());
        self.zero.insert(range);
        while self.zero.count() > ZERO_RANGES_MAX {
            let shortest = self.zero.iter().min_by_key(|range| range.end - range.start);
            if let Some(shortest) = shortest {
                self.zero.remove(shortest);
            }
        }
    }

    // --- Allocation. ---

    /// A place for as many of the blocks as fit.
    pub(crate) fn allocate(&mut self, wish: &Wish) -> Option<Place> {
        let per_block = self.sectors_per_block;
        // What lies between places of different phases stays open, and the list of it has a bound.
        let aligned = self.open.count() < GAPS_MAX;
        let wish = &Wish { phase: if aligned { wish.phase } else { 0 }, ..*wish };
        if wish.blocks * per_block < UNIT
            && let Some(place) = self.allocate_scrap(wish.blocks)
        {
            return Some(place);
        }
        if wish.prepared
            && let Some(cut) = self.pool.allocate(wish, per_block)
        {
            return Some(self.pool_place(cut));
        }
        if let Some(place) = self.allocate_from_windows(wish) {
            return Some(place);
        }
        // What the pool holds or was about to prepare is better than waiting.
        if let Some(cut) = self.pool.last_resort(wish, per_block) {
            return Some(self.pool_place(cut));
        }
        if let Some(window) = self.pool.take_chunk() {
            self.windows.push_front(window);
        }
        self.end_streams();
        self.allocate_from_windows(wish)
    }

    fn pool_place(&mut self, cut: Cut) -> Place {
        let written = self.pool.is_written();
        self.place(cut, true, written)
    }

    fn allocate_from_windows(&mut self, wish: &Wish) -> Option<Place> {
        let place = self.continue_stream(wish).or_else(|| self.take_from_windows(wish))?;
        self.streams.note(wish.first + place.blocks);
        Some(place)
    }

    fn take_from_windows(&mut self, wish: &Wish) -> Option<Place> {
        let phase = if wish.small { 0 } else { wish.phase };
        let per_block = self.sectors_per_block;
        if wish.small
            && let Some(run) = self.runs.last_mut()
        {
            let cut = Pool::cut_apart(run, wish.blocks, per_block, 0);
            if run.end.saturating_sub(run.start) < per_block.max(UNIT) {
                let rest = self.runs.pop().unwrap_or(0..0);
                self.waste(rest);
            }
            if let Some(cut) = cut {
                return Some(self.place(cut, true, false));
            }
        }
        while let Some(window) = self.windows.front_mut() {
            let cut = Pool::cut_apart(&mut window.range, wish.blocks, per_block, phase)
                .or_else(|| Pool::cut_apart(&mut window.range, wish.blocks, per_block, 0));
            if let Some(cut) = cut {
                let known_zero = window.known_zero;
                return Some(self.place(cut, known_zero, false));
            }
            let rest = window.range.clone();
            self.windows.pop_front();
            self.waste(rest);
        }
        None
    }

    /// A place right behind the blocks before, in a run that is kept for them. Its data continues theirs on
    /// the host as well: blocks of the host that they share are the next write's, which covers them.
    fn continue_stream(&mut self, wish: &Wish) -> Option<Place> {
        if !wish.goes_on {
            return None;
        }
        let mut stream = self.streams.take(wish.first)?;
        let per_block = self.sectors_per_block;
        let needed = wish.blocks * per_block;
        let begun = stream.range.start;
        if stream.room() < needed {
            let run = stream.next_run(needed + wish.phase).next_multiple_of(UNIT);
            if let Some(more) = self.run_from_windows(run) {
                let rest = stream.extend(more, run);
                self.return_run(rest);
            }
        }
        let start = stream.range.start;
        let (at, lead) = match start == begun {
            true => (start, 0),
            false => (start + wish.phase, wish.phase),
        };
        let fits = at % UNIT == wish.phase && at + needed <= stream.range.end;
        if !fits {
            self.return_run(stream.range);
            return None;
        }
        stream.range.start = at + needed;
        let idle = self.streams.put(stream, wish.first + wish.blocks);
        self.return_run(idle.unwrap_or(0..0));
        let place = Place::plain(at, wish.blocks);
        Some(Place { known_zero: true, lead, open_end: true, ..place })
    }

    /// A run for a stream: what another has left, or a part of a window that is zero.
    fn run_from_windows(&mut self, sectors: u64) -> Option<Range<u64>> {
        let start_of = |range: &Range<u64>| {
            let start = range.start.next_multiple_of(UNIT);
            (start + sectors <= range.end).then_some(start)
        };
        let windows = self.windows.iter_mut().filter(|window| window.known_zero);
        let places = self.runs.iter_mut().chain(windows.map(|window| &mut window.range));
        let (start, range) =
            places.into_iter().find_map(|range| start_of(range).map(|start| (start, range)))?;
        let gap = range.start..start;
        range.start = start + sectors;
        self.waste(gap);
        Some(start..start + sectors)
    }

    /// What a stream did not use: for other streams, and for small blocks. Windows are for metadata, too, and
    /// stay in one piece.
    fn return_run(&mut self, range: Range<u64>) {
        self.runs.retain(|run| !run.is_empty());
        if self.runs.len() >= RUNS_MAX {
            self.waste(range);
        } else if !range.is_empty() {
            self.runs.push(range);
        }
    }

    /// All that is kept for streams is a part of windows again.
    fn end_streams(&mut self) {
        let ranges: Vec<_> = self.streams.drain().chain(self.runs.drain(..)).collect();
        let windows = ranges.into_iter().filter(|range| !range.is_empty());
        self.windows.extend(windows.map(|range| Window { range, known_zero: true }));
    }

    fn place(&mut self, cut: Cut, known_zero: bool, written: bool) -> Place {
        self.waste(cut.gap);
        let Cut { sector, blocks, lead, pad, open_end, .. } = cut;
        Place { sector, blocks, known_zero, written, lead, pad, open_end }
    }

    /// Open space too small for a block, until its neighbours are free.
    fn waste(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.quarantine(range, 0, 0);
        }
    }

    /// Takes space for the pool to prepare out of a window: so many sectors, or fewer.
    pub(crate) fn refill_pool(&mut self, sectors: u64) {
        // At most half of what is there: metadata and large writes need some, too.
        let half = self.window_blocks() * self.sectors_per_block / 2;
        let sectors = sectors.min(half) / UNIT * UNIT;
        let place = self.windows.iter_mut().find_map(|window| {
            let start = window.range.start.next_multiple_of(UNIT);
            let fits = sectors > 0 && start + sectors <= window.range.end;
            fits.then_some((start, window))
        });
        let Some((start, window)) = place else { return };
        let gap = window.range.start..start;
        let range = start..start + sectors;
        window.range.start = range.end;
        let known_zero = window.known_zero;
        self.pool.add_chunk(Window { range, known_zero });
        self.waste(gap);
    }

    /// Known zeroes that the pool does not want any more.
    pub(crate) fn give_window(&mut self, range: Range<u64>) {
        self.return_window(Window { range, known_zero: true });
    }

    pub(crate) fn return_window(&mut self, window: Window) {
        self.windows.push_front(window);
    }

    fn allocate_scrap(&mut self, blocks: u64) -> Option<Place> {
        let sectors = blocks * self.sectors_per_block;
        let index = self.scraps.iter().rposition(|scrap| scrap.end - scrap.start >= sectors)?;
        let scrap = &mut self.scraps[index];
        let sector = scrap.start;
        scrap.start += sectors;
        if scrap.is_empty() {
            self.scraps.swap_remove(index);
        }
        let place = Place::plain(sector, blocks);
        Some(Place { known_zero: true, written: true, ..place })
    }

    /// The padding behind a place was written.
    pub(crate) fn add_scrap(&mut self, range: Range<u64>, known_zero: bool) {
        let useful = range.end - range.start >= self.sectors_per_block;
        if known_zero && useful && self.scraps.len() < SCRAPS_MAX {
            self.scraps.push(range);
        } else {
            self.quarantine(range, 0, 0);
        }
    }

    /// A place in recycled space of unknown content, for when there is no window to be had.
    pub(crate) fn allocate_dirty(&mut self, blocks: u64) -> Option<Place> {
        let per_block = self.sectors_per_block;
        let align = per_block.max(UNIT);
        let (sector, blocks) = self.dirty.iter().find_map(|range| {
            let start = range.start.next_multiple_of(align);
            let fits = range.end.saturating_sub(start) / per_block;
            (fits > 0).then_some((start, fits.min(blocks)))
        })?;
        self.dirty.remove(sector..sector + blocks * per_block);
        Some(Place::plain(sector, blocks))
    }

    /// Blocks that can be allocated at once.
    pub(crate) fn window_blocks(&self) -> u64 {
        let per_block = self.sectors_per_block;
        self.windows.iter().map(|w| (w.range.end - w.range.start) / per_block).sum()
    }

    /// True if another window should be opened now, ahead of need.
    pub(crate) fn wants_window(&self) -> bool {
        let windows = self.opening.iter().filter(|opening| !opening.reserve);
        let opening: u64 = windows.map(|o| o.window.range.end - o.window.range.start).sum();
        self.opening.len() < OPENINGS_MAX
            && self.window_blocks() * self.sectors_per_block + opening
                < self.window_sectors.div_ceil(2)
    }

    /// Less than a quarter of a window is left.
    pub(crate) fn windows_run_out(&self) -> bool {
        self.window_blocks() * self.sectors_per_block < self.window_sectors.div_ceil(4)
    }

    pub(crate) fn window_is_opening(&self) -> bool {
        self.opening.iter().any(|opening| !opening.reserve)
    }

    /// Chooses the next window: recycled zeroes, if a range is worth it, else space never used.
    pub(crate) fn plan_window(&self) -> Option<(Range<u64>, bool)> {
        let unit = self.unit();
        let worth = (self.window_sectors / 256).min(WORTH_MAX).max(unit);
        let recycled_of = |worth: u64| {
            let range = self.zero.longest()?;
            let start = range.start.next_multiple_of(unit);
            let end = (range.end / unit * unit).min(start + self.window_sectors);
            (end >= start + worth).then_some(start..end)
        };
        if let Some(range) = recycled_of(worth) {
            return Some((range, true));
        }
        let start = self.data_end.next_multiple_of(unit);
        let end = start + self.window_sectors;
        let fresh = match self.device_end {
            None => (end <= SECTORS_END).then_some((start..end, true)),
            Some(device_end) => {
                let end = end.min(device_end / unit * unit);
                (start < end).then_some((start..end, false))
            }
        };
        // Where nothing else is left, a small range will do.
        fresh.or_else(|| recycled_of(unit).map(|range| (range, true)))
    }

    /// A window's record has been made (with `cseq`); the window may be used once that is durable.
    pub(crate) fn begin_window(&mut self, range: Range<u64>, known_zero: bool, cseq: u64) {
        self.open_window(range.clone());
        let window = Window { range, known_zero };
        self.opening.push(Opening { window, cseq, reserve: false });
    }

    /// Space in one piece that is not open yet, for metadata: recycled zeroes, or space never used.
    pub(crate) fn plan_run(&self, sectors: u64) -> Option<Range<u64>> {
        let sectors = sectors.next_multiple_of(UNIT);
        let recycled = self.zero.iter().find_map(|range| {
            let start = range.start.next_multiple_of(UNIT);
            (start + sectors <= range.end).then_some(start..start + sectors)
        });
        let start = self.data_end.next_multiple_of(UNIT);
        let fresh = start..start + sectors;
        let fits = fresh.end <= self.end();
        recycled.or(fits.then_some(fresh))
    }

    /// As [`Space::begin_window`], for a range that joins the metadata reserve.
    pub(crate) fn begin_run(&mut self, range: Range<u64>, cseq: u64) {
        self.open_window(range.clone());
        let window = Window { range, known_zero: false };
        self.opening.push(Opening { window, cseq, reserve: true });
    }

    pub(crate) fn run_is_opening(&self) -> bool {
        self.opening.iter().any(|opening| opening.reserve)
    }

    /// Completions up to `through` are durable: windows become usable. Returns what has joined the
    /// metadata reserve.
    pub(crate) fn settle_windows(&mut self, through: u64) -> Vec<Range<u64>> {
        let mut reserved = Vec::new();
        for opening in self.opening.extract_if(.., |opening| opening.cseq <= through) {
            if opening.reserve {
                self.meta.insert(opening.window.range.clone());
                reserved.push(opening.window.range);
            } else {
                self.windows.push_back(opening.window);
            }
        }
        reserved
    }

    /// Completions up to `through` are durable and I/O numbered below `io` has ended: freed space can
    /// be recycled.
    pub(crate) fn settle_freed(&mut self, through: u64, io: u64) {
        while let Some(freed) = self.quarantine.front() {
            if freed.cseq > through || freed.io > io {
                break;
            }
            let range = freed.range.clone();
            self.quarantine.pop_front();
            self.add_dirty(range);
        }
    }

    /// I/O numbered below this keeps what was freed first from being recycled.
    pub(crate) fn waits_for_io(&self, through: u64) -> Option<u64> {
        self.quarantine.front().filter(|freed| freed.cseq <= through).map(|freed| freed.io)
    }

    /// A place has been freed by the entry `cseq`; I/O numbered below `io` may still touch it.
    pub(crate) fn quarantine(&mut self, range: Range<u64>, cseq: u64, io: u64) {
        self.quarantine.push_back(Freed { range, cseq, io });
    }

    /// Free space that nothing durable speaks of.
    pub(crate) fn add_dirty(&mut self, range: Range<u64>) {
        self.dirty.insert(range.clone());
        if !self.keep {
            self.to_punch.push_back(range);
        }
    }

    pub(crate) fn wants_punch(&self) -> bool {
        !self.to_punch.is_empty()
    }

    /// The next range to punch, aligned to the host's blocks. It is out of everybody's reach until
    /// [`Space::punched`] or [`Space::punch_failed`]. Below `hole_from` it has about `sectors_max`
    /// sectors at most; above, where the file has ended, any number.
    pub(crate) fn take_punch(&mut self, sectors_max: u64, hole_from: u64) -> Option<Range<u64>> {
        while let Some(range) = self.to_punch.pop_front() {
            let Some(whole) = self.dirty.within(range.clone()).next() else { continue };
            // Neighbours freed earlier or later complete the host's blocks at the edges.
            let Some(wide) = self.dirty.range_at(whole.start) else { continue };
            let host = self.host_sectors;
            let floor = (whole.start / host * host).max(wide.start.next_multiple_of(host));
            let ceiling = whole.end.next_multiple_of(host).min(wide.end / host * host);
            if whole.end < range.end {
                self.to_punch.push_front(whole.end..range.end);
            }
            if floor >= ceiling {
                continue;
            }
            let end = if floor >= hole_from {
                ceiling
            } else {
                let file_end = hole_from.checked_next_multiple_of(host).unwrap_or(u64::MAX);
                // A giant range is mostly a hole: it must not take for ever.
                let step = sectors_max.max((ceiling - floor) / 16).next_multiple_of(host);
                ceiling.min(floor + step).min(file_end)
            };
            if end < whole.end {
                self.to_punch.push_front(end..whole.end);
            }
            self.dirty.remove(floor..end);
            return Some(floor..end);
        }
        None
    }

    /// The punch landed; it is durable once a sync that starts after `mark` has returned.
    pub(crate) fn punched(&mut self, range: Range<u64>, mark: u64) {
        self.punched.push_back((range, mark));
    }

    /// The host cannot punch here: the space stays usable for what does not need zeroes.
    pub(crate) fn punch_failed(&mut self, range: Range<u64>) {
        self.dirty.insert(range);
    }

    /// Ranges whose punch is durable.
    /// At most `max` of them.
    pub(crate) fn take_zeroed(&mut self, synced: u64, max: usize) -> Vec<Range<u64>> {
        let ready = self.punched.iter().take(max).take_while(|(_, mark)| *mark <= synced).count();
        self.punched.drain(..ready).map(|(range, _)| range).collect()
    }

    pub(crate) fn awaits_sync(&self) -> bool {
        !self.punched.is_empty()
            || !self.opening.is_empty()
            || !self.quarantine.is_empty()
            || self.pool.awaits_sync()
    }

    // --- Metadata. ---

    /// Room for `bytes` of metadata at a 4 KiB boundary; a byte offset.
    pub(crate) fn take_meta(&mut self, bytes: u64) -> Option<u64> {
        self.meta.take(bytes / SECTOR, UNIT).map(|sector| sector * SECTOR)
    }

    pub(crate) fn give_meta(&mut self, range: Range<u64>) {
        self.meta.insert(range);
    }

    /// Puts a run of the reserve aside, so that nodes do not break it up.
    pub(crate) fn take_meta_run(&mut self, sectors: u64) -> Option<Range<u64>> {
        let sectors = sectors.next_multiple_of(UNIT);
        self.meta.take(sectors, UNIT).map(|start| start..start + sectors)
    }

    /// Separate ranges of the reserve.
    pub(crate) fn meta_count(&self) -> usize {
        self.meta.count()
    }

    /// The host has no space for a part of the reserve.
    pub(crate) fn unreserve(&mut self, range: Range<u64>) {
        let parts: Vec<_> = self.meta.within(range).collect();
        for part in parts {
            self.meta.remove(part.clone());
            self.add_dirty(part);
        }
    }

    pub(crate) fn meta_sectors(&self) -> u64 {
        self.meta.total()
    }

    /// Moves `sectors` of windows into the metadata reserve; returns the ranges moved.
    pub(crate) fn meta_from_windows(&mut self, sectors: u64) -> Vec<Range<u64>> {
        let mut moved = Vec::new();
        // At most half of them: data comes first.
        let half = self.window_blocks() * self.sectors_per_block / 2;
        let mut left = sectors.next_multiple_of(self.unit()).min(half / UNIT * UNIT);
        // From the front, so that the file stays compact.
        while left > 0 {
            let Some(window) = self.windows.front_mut() else { break };
            let start = window.range.start.next_multiple_of(UNIT);
            let range = start..(start + left).min(window.range.end);
            if range.is_empty() {
                let rest = window.range.clone();
                self.windows.pop_front();
                self.waste(rest);
                continue;
            }
            let gap = window.range.start..start;
            window.range.start = range.end;
            left -= range.end - range.start;
            self.meta.insert(range.clone());
            moved.push(range);
            self.waste(gap);
        }
        moved
    }

    /// Moves a run of `sectors` out of a window into the metadata reserve.
    pub(crate) fn meta_run_from_windows(&mut self, sectors: u64) -> Option<Range<u64>> {
        let sectors = sectors.next_multiple_of(UNIT);
        let (start, window) = self.windows.iter_mut().find_map(|window| {
            let start = window.range.start.next_multiple_of(UNIT);
            (start + sectors <= window.range.end).then_some((start, window))
        })?;
        let gap = window.range.start..start;
        let range = start..start + sectors;
        window.range.start = range.end;
        self.meta.insert(range.clone());
        self.waste(gap);
        Some(range)
    }

    /// Takes an aligned range out of a window, for the journal.
    pub(crate) fn take_from_window(&mut self, sectors: u64, align: u64) -> Option<Range<u64>> {
        let (start, window) = self.windows.iter_mut().rev().find_map(|window| {
            let start = window.range.end.checked_sub(sectors)? / align * align;
            (start >= window.range.start).then_some((start, window))
        })?;
        let range = start..start + sectors;
        let rest = range.end..window.range.end;
        window.range.end = start;
        if !rest.is_empty() {
            self.meta.insert(rest);
        }
        Some(range)
    }

    /// Gives what the reserve holds beyond `sectors` to recycling.
    pub(crate) fn shrink_meta(&mut self, sectors: u64) {
        // Whole units only: what is left must hold nodes.
        for range in self.meta.keep_longest(sectors.next_multiple_of(UNIT)) {
            self.add_dirty(range);
        }
    }

    /// Length of the longest run of the reserve: the space list needs one piece.
    pub(crate) fn meta_run(&self) -> u64 {
        self.meta.longest().map_or(0, |range| range.end - range.start)
    }

    // --- Opening and closing. ---

    /// What a fresh opening finds: all open space is of unknown content.
    pub(crate) fn adopt_open(&mut self, meta: RangeSet) {
        let open: Vec<_> = self.open.iter().collect();
        for range in open {
            self.add_dirty(range);
        }
        for range in meta.iter() {
            self.dirty.remove(range);
        }
        self.meta = meta;
    }

    /// Makes a window usable at once (its superblock is being written and will be durable first).
    pub(crate) fn add_window(&mut self, range: Range<u64>, known_zero: bool) {
        self.open_window(range.clone());
        self.windows.push_back(Window { range, known_zero });
    }

    /// On closing: what is left of known-zero windows is free and zero again.
    pub(crate) fn close_windows(&mut self) -> Vec<Range<u64>> {
        self.end_streams();
        let mut released = std::mem::take(&mut self.scraps);
        for scrap in &released {
            self.release(scrap.clone());
        }
        // Zeroes that were written take space on the host: they are punched before they are released.
        for range in self.pool.drain() {
            self.add_dirty(range);
        }
        let opening = self.opening.drain(..).map(|opening| opening.window);
        let chunk = self.pool.take_chunk();
        for window in self.windows.drain(..).chain(opening).chain(chunk).collect::<Vec<_>>() {
            if window.known_zero {
                self.release(window.range.clone());
                released.push(window.range);
            } else {
                self.dirty.insert(window.range);
            }
        }
        released
    }

    /// Ranges that closing adds to the list of free space, at most.
    pub(crate) fn ranges_to_close(&self) -> usize {
        let streams = self.streams.ranges().count() + self.runs.len();
        self.scraps.len() + self.windows.len() + self.opening.len() + self.pool.ranges() + streams
    }

    /// Freed places keep their host space.
    pub(crate) fn keeps(&self) -> bool {
        self.keep
    }

    /// Open space outside the metadata reserve.
    pub(crate) fn unreserved(&self) -> Vec<Range<u64>> {
        let mut open = self.open.clone();
        for range in self.meta.iter() {
            open.remove(range);
        }
        open.iter().collect()
    }

    /// What is free and zero at the end of the used space is not used any more.
    pub(crate) fn trim_end(&mut self) {
        let Some(last) = self.zero.iter().next_back() else { return };
        let start = last.start.next_multiple_of(UNIT);
        if last.end.next_multiple_of(UNIT) >= self.data_end && start < last.end {
            self.zero.remove(start..last.end);
            self.data_end = start;
        }
    }

    /// The list a checkpoint writes.
    pub(crate) fn listing(open: &RangeSet, zero: &RangeSet) -> Vec<SpaceRange> {
        let entry = |kind| {
            move |range: Range<u64>| SpaceRange {
                start: range.start,
                sectors: range.end - range.start,
                kind,
            }
        };
        let mut ranges: Vec<SpaceRange> = open
            .iter()
            .map(entry(SpaceKind::Open))
            .chain(zero.iter().map(entry(SpaceKind::Zero)))
            .collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P8: however a guest writes, aligning its data leaves a bounded number of gaps: the space list has a
    /// bound, and a checkpoint that it does not fit into cannot be made.
    #[test]
    fn p8_gaps_beside_streams_are_bounded() {
        let mut space = Space::new(8, 0);
        space.configure(4096, 1 << 20, None, false, Pool::new(ZeroAhead::Off, 0));
        space.add_window(0..1 << 34, true);
        for i in 0..2 * GAPS_MAX as u64 {
            // A write that begins a stream at sector 63, and one that goes on there.
            for (first, blocks, goes_on) in [(1000 * i, 2, false), (1000 * i + 2, 1, true)] {
                let (small, prepared) = (true, false);
                let wish = Wish { first, blocks, phase: 1, small, prepared, goes_on };
                let place = space.allocate(&wish).expect("there is space");
                space.map(place.sector..place.sector + place.blocks * 8);
            }
        }
        let (gaps, most) = (space.open.count(), GAPS_MAX + 100);
        assert!(gaps <= most, "{gaps} gaps");
    }
}
