//! Streams: writers whose next block follows the last one they wrote.
//!
//! Several of them at once would leave their blocks mixed with each other in the order of arrival. So
//! each gets runs of space for itself, longer ones the longer it goes on, and its blocks lie one
//! behind the other. Where a run comes from is its owner's concern.

use crate::space::SECTOR;
use std::collections::VecDeque;
use std::ops::Range;

/// Ends of allocations remembered, to recognize streams.
const RECENT_MAX: usize = 64;
/// Streams that have space of their own.
const STREAMS_MAX: usize = 16;
/// A stream gets twice as many sectors each time, up to this.
const RUN_LAST: u64 = (1 << 20) / SECTOR;

/// Blocks that follow each other on the disk get places that follow each other.
pub(crate) struct Stream {
    /// The block that would continue it.
    next: u64,
    pub(crate) range: Range<u64>,
    /// Sectors it got last.
    run: u64,
}

impl Stream {
    /// How many sectors it should get now that it needs `needed`.
    pub(crate) fn next_run(&self, needed: u64) -> u64 {
        (self.run * 2).min(RUN_LAST).max(needed)
    }

    /// Adds what it got. Returns what it had if that lies elsewhere.
    pub(crate) fn extend(&mut self, more: Range<u64>, run: u64) -> Range<u64> {
        self.run = run;
        if self.range.end == more.start {
            self.range.end = more.end;
            return more.end..more.end;
        }
        std::mem::replace(&mut self.range, more)
    }

    pub(crate) fn room(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

#[derive(Default)]
pub(crate) struct Streams {
    streams: VecDeque<Stream>,
    /// Allocations of late: the block behind them.
    recent: VecDeque<u64>,
}

impl Streams {
    /// The stream that a write from block `first` on continues.
    pub(crate) fn take(&mut self, first: u64) -> Option<Stream> {
        if let Some(index) = self.streams.iter().position(|stream| stream.next == first) {
            return self.streams.remove(index);
        }
        let index = self.recent.iter().rposition(|end| *end == first)?;
        self.recent.remove(index);
        Some(Stream { next: first, range: 0..0, run: 0 })
    }

    /// It goes on at block `next`. Returns the space of one that has to go for it.
    pub(crate) fn put(&mut self, mut stream: Stream, next: u64) -> Option<Range<u64>> {
        stream.next = next;
        self.streams.push_back(stream);
        let gone = (self.streams.len() > STREAMS_MAX).then(|| self.streams.pop_front());
        gone.flatten().map(|stream| stream.range)
    }

    /// Blocks up to `end` were allocated: who goes on there is a stream.
    pub(crate) fn note(&mut self, end: u64) {
        if self.recent.len() >= RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(end);
    }

    pub(crate) fn forget(&mut self) {
        self.recent.clear();
    }

    /// The space they hold.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        self.streams.iter().map(|stream| &stream.range)
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Range<u64>> {
        self.streams.drain(..).map(|stream| stream.range)
    }
}
