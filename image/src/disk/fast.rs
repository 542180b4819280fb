//! What passes the engine by, seen from here: what is shown to it, what is taken back, and what waits
//! for it. Why that is safe is told in [`crate::fast`].

use super::Disk;
use crate::error::{Error, ErrorKind};
use crate::fast::{Fast, FastOwner, RUN_CELLS};
use crate::map::{Mapping, State};
use crate::storage::SECTOR;
use exd_format::{Entry, EntryKind};
use std::ops::Range;
use std::sync::Arc;

/// So many cells of an extent are shown from the block on that was asked for.
const SHOWN_CELLS: u64 = 64;
/// A run is put together of at most so many extents.
const RUN_EXTENTS_MAX: usize = 4;

impl Disk {
    /// From now on reads and overwrites of written blocks may pass this engine by, through `fast`. Their
    /// I/O goes to the same file as this engine's, and has ended before [`Disk::close`] is called. Fails
    /// if another engine is behind `fast` still.
    pub fn share(&mut self, fast: &Arc<Fast>) -> Result<(), Error> {
        let io = self.begin_io();
        // Where storage wants larger units, overwrites read, modify and write what they share with
        // others: only the engine knows who owns it.
        let writes = !self.options.read_only && !self.failed && self.geometry.alignment == SECTOR;
        let blocks = self.virtual_size / self.block_size + 1;
        let owner = FastOwner::new(Arc::clone(fast), self.sectors_per_block, blocks, writes, io);
        if owner.is_none() {
            self.running_io.remove(&io);
            return Err(Error::invalid("the fast path is in use by another image"));
        }
        self.fast = owner;
        Ok(())
    }

    /// Nothing more passes by, for good: everything comes to this engine. To be called before closing;
    /// what began before ends, as [`Fast::is_idle`] tells.
    pub fn shut_fast(&mut self) {
        if let Some(fast) = &self.fast {
            fast.shut();
        }
    }

    /// Nothing is overwritten but by this engine, which holds it back, or no longer so.
    pub(super) fn freeze_fast(&mut self, frozen: bool) {
        self.freeze_io = self.next_io;
        if let Some(fast) = &self.fast {
            fast.set_frozen(frozen);
        }
    }

    /// The overwrites that began before [`Disk::freeze_fast`] have ended, and are counted.
    pub(super) fn fast_is_frozen(&mut self) -> bool {
        if self.fast.is_none() {
            return true;
        }
        self.turn_fast_epochs(self.freeze_io);
        let ended = self.drained_io() >= self.freeze_io;
        self.count_fast_overwrites();
        ended
    }

    /// The image accepts no more changes (P5).
    pub(super) fn fail(&mut self) {
        self.failed = true;
        if let Some(fast) = &self.fast {
            fast.refuse_writes();
        }
    }

    /// Shows where a written block is, and its neighbourhood. `run` blocks from `block` are mapped so.
    pub(super) fn show_to_fast(&mut self, block: u64, run: u64, mapping: Mapping) {
        let Some(fast) = &self.fast else { return };
        let (shown, run_blocks) =
            (SHOWN_CELLS * fast.cell_blocks(), RUN_CELLS * fast.cell_blocks());
        if mapping.state != State::Written || self.owner_of(block).is_some() {
            return;
        }
        // Nor are blocks that are owned: they are being moved, and must not change meanwhile.
        let run = (self.unowned_limit(block, (block + run) * self.block_size) / self.block_size)
            .saturating_sub(block);
        // A block that the end of the disk cuts is not shown: it would show what is behind the end.
        let whole = self.virtual_size / self.block_size;
        let number = block / run_blocks;
        let (run_start, run_end) = (number * run_blocks, (number + 1) * run_blocks);
        let long = run >= (run_end - block).min(shown);
        let owned = self.owner_of(run_start).is_some()
            || self.owned.range(run_start..run_end).next().is_some();
        let place = if long && run_end <= whole && !owned {
            self.place_of_run(run_start..run_end)
        } else {
            None
        };
        let Some(fast) = &self.fast else { return };
        match place {
            Some(sector) => fast.show_run(number, sector),
            None => {
                let blocks = run.min(shown).min(whole.saturating_sub(block));
                fast.show(block, blocks, mapping.place);
            }
        }
    }

    /// Blocks that were written for the first time are likely to be used again soon.
    pub(super) fn show_first_write(&self, entry: &Entry) {
        let Some(fast) = &self.fast else { return };
        if matches!(entry.kind, EntryKind::Map | EntryKind::Convert) {
            let whole = self.virtual_size / self.block_size;
            let blocks = u64::from(entry.length).min(whole.saturating_sub(entry.logical));
            let blocks = blocks.min(SHOWN_CELLS * fast.cell_blocks());
            fast.show(entry.logical, blocks, entry.physical);
        }
    }

    /// The place of an aligned run of blocks, if it is written and in one piece, and known without
    /// loading anything.
    fn place_of_run(&mut self, Range { start: first, end }: Range<u64>) -> Option<u64> {
        let mut block = first;
        let mut place = None;
        for _ in 0..RUN_EXTENTS_MAX {
            let (mapping, run) = self.map.lookup(block, end - block).ok()?;
            let start = *place.get_or_insert(mapping.place);
            let due = start + (block - first) * self.sectors_per_block;
            if mapping.state != State::Written || mapping.place != due {
                return None;
            }
            block += run;
            if block == end {
                return place;
            }
        }
        None
    }

    /// An entry is about to take effect: whatever it changes is not found any more.
    pub(super) fn hide_from_fast(&self, entry: &Entry) {
        if !matches!(entry.kind, EntryKind::Window | EntryKind::Release) {
            self.hide_blocks_from_fast(entry.logical..entry.logical + u64::from(entry.length));
        }
    }

    pub(super) fn hide_blocks_from_fast(&self, blocks: Range<u64>) {
        if let Some(fast) = &self.fast {
            fast.hide(blocks);
        }
    }

    /// Overwrites that passed by have landed: the next flush has something to make durable (P1).
    pub(super) fn count_fast_overwrites(&mut self) {
        let Some(fast) = &self.fast else { return };
        let count = fast.take_dirty();
        if count > 0 {
            self.landed += count;
            self.last_request_ms = self.now_ms;
        }
    }

    /// Somebody waits for I/O numbered below `io`, and so for the fast path's: its epochs have numbers
    /// like operations.
    pub(super) fn turn_fast_epochs(&mut self, io: u64) {
        if self.fast.is_none() || self.drained_io() >= io {
            return;
        }
        let io = self.next_io;
        self.next_io += 1;
        if let Some(fast) = &mut self.fast {
            fast.turn(io, &mut self.running_io);
        }
    }

    pub(super) fn set_fast_resizing(&mut self, resizing: bool) {
        let Some(fast) = &self.fast else { return };
        if !resizing {
            // The size is another one, and the last block may be cut or whole.
            fast.hide_all();
        }
        fast.set_resizing(resizing);
    }

    /// Nothing passes by any more.
    pub(super) fn end_fast(&mut self) -> Result<(), Error> {
        let Some(fast) = &self.fast else { return Ok(()) };
        fast.shut();
        if !fast.is_idle() {
            return Err(Error {
                kind: ErrorKind::Failed,
                context: "I/O on the fast path is still under way".into(),
                offset: None,
            });
        }
        fast.leave(&mut self.running_io);
        self.count_fast_overwrites();
        self.fast = None;
        Ok(())
    }
}
