//! Space prepared ahead of the allocator.
//!
//! A first write into a hole of the image file makes the host allocate, serialize what is not aligned
//! and commit metadata at the next sync; a write over written space costs none of that. So small new
//! blocks are placed where zeroes have been written before them, in large writes, and as far ahead as
//! blocks are being allocated.
//!
//! The pool decides where and how much; `disk/zeroing.rs` does the writing. A range is *busy* while an
//! operation of the pool runs against it, and out of everybody's reach: the operation could otherwise
//! overtake the data.

use crate::bugs::{self, Bug};
use crate::space::{SECTOR, Window, Wish};
use crate::streams::Streams;
use std::collections::VecDeque;
use std::ops::Range;

/// What the host's page cache and file systems work in, in sectors: places may begin anywhere, but
/// data is aligned to this where its place can be chosen so.
pub(crate) const PHASES: u64 = 4096 / SECTOR;

/// What a lane takes at a time, in sectors.
const SLICE: u64 = (256 << 10) / SECTOR;

/// Sectors a stream gets first.
const RUN_FIRST: u64 = (64 << 10) / SECTOR;

/// How space is prepared ahead of small first writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ZeroAhead {
    /// By writing zeroes: first writes are overwrites for the host.
    Zero,
    /// By allocating it on the host: half the bytes, dearer flushes.
    Falloc,
    /// Not at all.
    #[default]
    Off,
}

/// What [`Pool::cut`] took from a range.
pub(crate) struct Cut {
    pub(crate) gap: Range<u64>,
    pub(crate) sector: u64,
    pub(crate) blocks: u64,
    /// Sectors around the place that belong to its blocks of the host.
    pub(crate) lead: u64,
    pub(crate) pad: u64,
    /// For a stream, which goes on where this ends.
    pub(crate) open_end: bool,
}

pub(crate) struct Pool {
    policy: ZeroAhead,
    /// Sectors it holds at most, ...
    limit: u64,
    /// ... and prepares in one operation.
    step: u64,
    /// Space taken from a window and not prepared yet, and whether it is known to be zero.
    chunk: Option<Window>,
    /// Prepared, for the lanes to take.
    ready: VecDeque<Range<u64>>,
    /// For each phase: where the next small block goes.
    lanes: Vec<Range<u64>>,
    streams: Streams,
    /// Prepared, but known to be zero only when it is durable.
    unsynced: VecDeque<(Range<u64>, u64)>,
    /// Under an operation of the pool.
    busy: u64,
    operations: u32,
    /// Sectors of small first writes of late.
    demand: u64,
    used: bool,
    /// Sectors asked for since the last tick, ...
    asked: u64,
    /// ... and those of them that were there.
    found: u64,
    /// Ticks in a row in which most were not there.
    behind: u32,
    last_use_ms: u64,
    /// The host had no space: not before this time.
    paused_until_ms: u64,
}

/// After so many ticks behind the demand the pool gives up ...
const BEHIND_MAX: u32 = 3;
/// ... for so long.
const BEHIND_PAUSE_MS: u64 = 2000;

/// Operations of the pool under way at once.
const OPERATIONS_MAX: u32 = 4;

impl Pool {
    pub(crate) fn new(policy: ZeroAhead, limit_bytes: u64) -> Pool {
        let limit = limit_bytes / SECTOR / PHASES * PHASES;
        let step = (limit / 16 / PHASES * PHASES).clamp(PHASES, (1 << 20) / SECTOR);
        let policy = if limit < 4 * step { ZeroAhead::Off } else { policy };
        Pool {
            policy,
            limit,
            step,
            chunk: None,
            ready: VecDeque::new(),
            lanes: vec![0..0; PHASES as usize],
            streams: Streams::default(),
            unsynced: VecDeque::new(),
            busy: 0,
            operations: 0,
            demand: 0,
            used: false,
            asked: 0,
            found: 0,
            behind: 0,
            last_use_ms: 0,
            paused_until_ms: 0,
        }
    }

    pub(crate) fn policy(&self) -> ZeroAhead {
        self.policy
    }

    /// The host sees writes into the pool as overwrites: they need no padding.
    pub(crate) fn is_written(&self) -> bool {
        self.policy == ZeroAhead::Zero
    }

    // --- Allocation. ---

    /// Takes up to `blocks` blocks of `per_block` sectors from the front of `range`, at a place of this
    /// phase; what lies before it is a gap.
    pub(crate) fn cut(
        range: &mut Range<u64>,
        blocks: u64,
        per_block: u64,
        phase: u64,
    ) -> Option<Cut> {
        let gap_start = range.start;
        let gap = (phase % PHASES + PHASES - range.start % PHASES) % PHASES;
        let sector = range.start + gap;
        let blocks = blocks.min(range.end.saturating_sub(sector) / per_block);
        if blocks == 0 {
            return None;
        }
        let end = sector + blocks * per_block;
        // Small blocks: the rest of the host's block is a scrap.
        let small = !per_block.is_multiple_of(PHASES);
        let padded = if small { end.next_multiple_of(PHASES).min(range.end) } else { end };
        range.start = padded;
        let (gap, pad) = (gap_start..sector, padded - end);
        Some(Cut { gap, sector, blocks, lead: 0, pad, open_end: false })
    }

    /// The same, but the place has the blocks of the host that it lies in for itself.
    pub(crate) fn cut_apart(
        range: &mut Range<u64>,
        blocks: u64,
        per_block: u64,
        phase: u64,
    ) -> Option<Cut> {
        let start = range.start.next_multiple_of(PHASES);
        let sector = start + phase % PHASES;
        let last = range.end / PHASES * PHASES;
        let blocks = blocks.min(last.saturating_sub(sector) / per_block);
        if blocks == 0 {
            return None;
        }
        let end = sector + blocks * per_block;
        let gap = range.start..start;
        range.start = end.next_multiple_of(PHASES);
        let (lead, pad) = (sector - start, range.start - end);
        Some(Cut { gap, sector, blocks, lead, pad, open_end: false })
    }

    /// A place for small new blocks. Notes the demand, whether it can be met or not.
    pub(crate) fn allocate(&mut self, wish: &Wish, per_block: u64) -> Option<Cut> {
        if self.policy == ZeroAhead::Off {
            return None;
        }
        let Wish { first, blocks, phase, .. } = *wish;
        self.used = true;
        self.demand = (self.demand + blocks * per_block).min(self.limit);
        self.asked += blocks * per_block;
        let cut = self
            .continue_stream(wish, per_block)
            .or_else(|| self.take_from_lane(blocks, per_block, phase))?;
        self.found += cut.blocks * per_block;
        self.streams.note(first + cut.blocks);
        Some(cut)
    }

    /// A place for any blocks, when there is no other.
    pub(crate) fn last_resort(&mut self, wish: &Wish, per_block: u64) -> Option<Cut> {
        self.take_from_lane(wish.blocks, per_block, wish.phase)
    }

    /// The next blocks of a stream lie behind the ones before them, if that can be.
    fn continue_stream(&mut self, wish: &Wish, per_block: u64) -> Option<Cut> {
        let mut stream = self.streams.take(wish.first)?;
        let needed = wish.blocks * per_block;
        let mut phase = stream.range.start;
        if stream.room() < needed {
            // The first blocks may have to be moved to their phase.
            let run = stream.next_run(needed + PHASES).max(RUN_FIRST).min(self.limit / 16);
            // Right behind what was allocated last, if it is still free.
            if let Some(more) = self.slice(run, stream.range.end) {
                let rest = stream.extend(more, run);
                if stream.range.start != phase {
                    phase = wish.phase;
                    self.put_back(rest);
                }
            }
        }
        let Some(cut) = Pool::cut(&mut stream.range, wish.blocks, per_block, phase) else {
            self.put_back(stream.range);
            return None;
        };
        let idle = self.streams.put(stream, wish.first + cut.blocks);
        self.put_back(idle.unwrap_or(0..0));
        Some(Cut { open_end: true, ..cut })
    }

    /// `sectors` of prepared space, from the place `at` if possible.
    fn slice(&mut self, sectors: u64, at: u64) -> Option<Range<u64>> {
        let lane = self.lanes.iter_mut().find(|lane| !lane.is_empty() && lane.start == at);
        let lane = match lane {
            Some(lane) => lane,
            // The lane in use, so that a stream of one writer goes on where it began.
            None => match self.lanes.iter_mut().max_by_key(|lane| lane.end - lane.start) {
                Some(lane) if lane.end - lane.start >= sectors => lane,
                _ => {
                    return self.take_ready(sectors, sectors);
                }
            },
        };
        let end = lane.end.min(lane.start + sectors);
        let slice = lane.start..end;
        lane.start = end;
        Some(slice)
    }

    fn take_from_lane(&mut self, blocks: u64, per_block: u64, phase: u64) -> Option<Cut> {
        let lane = (phase % PHASES) as usize;
        let least = blocks * per_block + PHASES;
        if self.lanes[lane].end - self.lanes[lane].start < blocks * per_block
            && let Some(slice) = self.take_ready(SLICE.max(least), least)
        {
            if self.lanes[lane].end == slice.start {
                self.lanes[lane].end = slice.end;
            } else {
                let rest = std::mem::replace(&mut self.lanes[lane], slice);
                self.put_back(rest);
            }
        }
        let cut = Pool::cut(&mut self.lanes[lane], blocks, per_block, phase);
        if cut.is_some() {
            return cut;
        }
        // The last of the pool is good for any phase.
        let lane = self.lanes.iter_mut().max_by_key(|lane| lane.end - lane.start)?;
        Pool::cut(lane, blocks, per_block, phase).or_else(|| {
            let phase = lane.start;
            Pool::cut(lane, blocks, per_block, phase)
        })
    }

    /// A part of prepared space, from a range that has enough of it if there is one.
    fn take_ready(&mut self, sectors: u64, least: u64) -> Option<Range<u64>> {
        let enough = |range: &Range<u64>| range.end - range.start >= least;
        let index = self.ready.iter().position(enough).unwrap_or(0);
        let ready = self.ready.get_mut(index)?;
        let end = ready.end.min(ready.start + sectors);
        let slice = ready.start..end;
        ready.start = end;
        if ready.is_empty() {
            self.ready.remove(index);
        }
        Some(slice)
    }

    fn put_back(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.ready.push_front(range);
        }
    }

    // --- Supply. ---

    fn held(&self) -> u64 {
        let streams = self.streams.ranges();
        let unsynced = self.unsynced.iter().map(|(range, _)| range);
        let all = self.ready.iter().chain(&self.lanes).chain(streams).chain(unsynced);
        all.map(|range| range.end - range.start).sum::<u64>() + self.busy
    }

    /// What it should hold: twice what was allocated of late, nothing for a few writes.
    fn target(&self) -> u64 {
        if self.demand < self.step / 4 {
            0
        } else {
            (2 * self.demand).max(2 * self.step).min(self.limit)
        }
    }

    /// True if it needs `chunk_sectors` more from a window.
    pub(crate) fn wants_chunk(&self, now_ms: u64) -> Option<u64> {
        let wanted = self.policy != ZeroAhead::Off
            && now_ms >= self.paused_until_ms
            && self.chunk.is_none()
            && self.held() + self.step <= self.target();
        let chunk = (self.target() / 2 / self.step * self.step).clamp(self.step, self.limit / 2);
        wanted.then_some(chunk)
    }

    pub(crate) fn add_chunk(&mut self, window: Window) {
        self.chunk = Some(window);
    }

    /// The next range to prepare; it is busy until [`Pool::prepared`] or [`Pool::failed`]. Tells whether
    /// it was known to be zero.
    pub(crate) fn take_step(&mut self, now_ms: u64) -> Option<(Range<u64>, bool)> {
        if self.operations >= OPERATIONS_MAX
            || now_ms < self.paused_until_ms
            || self.held() + self.step > self.target()
        {
            return None;
        }
        let chunk = self.chunk.as_mut()?;
        let end = chunk.range.end.min(chunk.range.start + self.step);
        let range = chunk.range.start..end;
        let known_zero = chunk.known_zero;
        chunk.range.start = end;
        if chunk.range.is_empty() {
            self.chunk = None;
        }
        if range.is_empty() {
            return None;
        }
        self.operations += 1;
        self.busy += range.end - range.start;
        if bugs::on(Bug::AllocateWhileZeroing) {
            self.ready.push_back(range.clone());
        }
        Some((range, known_zero))
    }

    fn ended(&mut self, range: &Range<u64>) {
        self.operations -= 1;
        self.busy -= range.end - range.start;
    }

    /// Its zeroes have landed. `mark`: they count once the file is synced so far; 0: at once.
    pub(crate) fn prepared(&mut self, range: Range<u64>, mark: u64) {
        self.ended(&range);
        if bugs::on(Bug::AllocateWhileZeroing) {
            return;
        }
        if mark > 0 && !bugs::on(Bug::TrustZeroesUnsynced) {
            self.unsynced.push_back((range, mark));
        } else {
            self.ready.push_back(range);
        }
    }

    /// It could not be prepared: nothing is, for a while.
    pub(crate) fn failed(&mut self, range: &Range<u64>, again_ms: u64) {
        self.ended(range);
        self.paused_until_ms = again_ms;
    }

    /// The file is synced so far.
    pub(crate) fn settle(&mut self, synced: u64) {
        while let Some((range, _)) = self.unsynced.pop_front_if(|(_, mark)| *mark <= synced) {
            self.ready.push_back(range);
        }
    }

    /// Space is on its way: whoever finds none can wait.
    pub(crate) fn is_busy(&self) -> bool {
        self.operations > 0
    }

    pub(crate) fn awaits_sync(&self) -> bool {
        !self.unsynced.is_empty()
    }

    // --- Giving back. ---

    /// Time goes by; true if the pool is not used any more and should go.
    pub(crate) fn age(&mut self, now_ms: u64, idle_ms: u64) -> bool {
        if std::mem::take(&mut self.used) {
            self.last_use_ms = now_ms;
        }
        self.demand -= (self.demand / 4).max(1).min(self.demand);
        self.judge(now_ms);
        now_ms.saturating_sub(self.last_use_ms) >= idle_ms
    }

    /// Where the host's bandwidth is what is short, zeroes come too late and take it from the data.
    fn judge(&mut self, now_ms: u64) {
        let (asked, found) = (std::mem::take(&mut self.asked), std::mem::take(&mut self.found));
        let late = asked >= self.step / 4 && 2 * found < asked && now_ms >= self.paused_until_ms;
        self.behind = if late { self.behind + 1 } else { 0 };
        if self.behind >= BEHIND_MAX {
            self.behind = 0;
            self.paused_until_ms = now_ms + BEHIND_PAUSE_MS;
        }
    }

    /// Everything prepared that is not allocated. With an idle pool it becomes busy piece by piece.
    pub(crate) fn drain(&mut self) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = self.ready.drain(..).collect();
        all.extend(self.streams.drain());
        all.extend(self.lanes.iter_mut().map(|lane| std::mem::replace(lane, 0..0)));
        all.extend(self.unsynced.drain(..).map(|(range, _)| range));
        all.retain(|range| !range.is_empty());
        self.streams.forget();
        all
    }

    /// Ranges it holds, at most.
    pub(crate) fn ranges(&self) -> usize {
        self.ready.len()
            + self.streams.ranges().count()
            + self.lanes.len()
            + self.unsynced.len()
            + 1
    }

    pub(crate) fn take_chunk(&mut self) -> Option<Window> {
        self.chunk.take()
    }

    /// An operation that gives this range back begins.
    pub(crate) fn dropping(&mut self, range: &Range<u64>) {
        self.operations += 1;
        self.busy += range.end - range.start;
    }

    /// It has ended.
    pub(crate) fn dropped(&mut self, range: &Range<u64>) {
        self.ended(range);
    }

    /// Prepared space that could not be given back.
    pub(crate) fn keep(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.used = true;
            self.ready.push_back(range);
        }
    }
}
