//! What a committed checkpoint leaves behind: nodes of the old tree, and changes that the new tree has.
//! There may be a hundred thousand of each, so they are given back in small steps, between which requests
//! are served.
//!
//! The frozen changes go last. They say the same as the new tree; the old tree's leaves, which a lookup may
//! still find in the cache, do not, but every block where they differ is in the frozen changes.

use super::Disk;
use crate::bugs::{self, Bug};
use crate::map::OverlayPieces;
use crate::ranges::RangeSet;
use crate::storage::{SECTOR, Storage};
use std::ops::Range;

/// Nodes given back at each tick: where there are no requests, nothing else makes steps.
pub(super) const CLEAR_UP_NODES_TICK: u64 = 4096;
/// So many changes are as much work as a node.
const CHANGES_EACH: u64 = 16;

/// See the module.
pub(crate) struct Leftovers {
    /// Sectors of the new tree's nodes, which still count as open.
    written: RangeSet,
    /// Sectors of the old tree's nodes, which the new tree does not use.
    retired: RangeSet,
    changes: Option<OverlayPieces>,
}

impl Leftovers {
    pub(super) fn new(written: RangeSet, retired: RangeSet) -> Self {
        Leftovers { written, retired, changes: None }
    }

    /// What will join the reserve.
    pub(super) fn sectors(&self) -> u64 {
        self.retired.total()
    }

    /// By so many ranges the list of open space may grow.
    pub(super) fn ranges(&self) -> usize {
        self.retired.count() + self.written.count()
    }
}

impl Disk {
    /// As [`Disk::clear_up`], in the background: not while the image is to stand still, or has failed, since
    /// room is put aside at the end.
    pub(super) fn clear_up_meanwhile(&mut self, st: &mut dyn Storage, nodes: u64) {
        if !(self.is_settling() || self.failed) {
            self.clear_up(st, nodes);
        }
    }

    /// Gives back what `nodes` nodes hold, at most, and what goes with them.
    pub(super) fn clear_up(&mut self, st: &mut dyn Storage, nodes: u64) {
        let Some(mut left) = self.leftovers.take() else { return };
        let node_sectors = self.node_size() / SECTOR;
        let most = nodes.saturating_mul(node_sectors);
        for range in take_up_to(&mut left.written, most) {
            self.space.map(range);
        }
        for range in take_up_to(&mut left.retired, most) {
            for sector in range.clone().step_by(node_sectors as usize) {
                self.map.cache.remove(sector * SECTOR);
            }
            self.space.free(range.clone());
            self.space.give_meta(range);
        }
        let old_tree_gone = left.retired.total() == 0;
        if old_tree_gone || bugs::on(Bug::ForgetChangesEarly) {
            let frozen = self.map.frozen.take();
            left.changes = left.changes.or_else(|| frozen.map(|frozen| frozen.into_pieces()));
        }
        if let Some(changes) = &mut left.changes {
            let most = nodes.saturating_mul(CHANGES_EACH).try_into().unwrap_or(usize::MAX);
            changes.by_ref().take(most).for_each(drop);
        }
        let changes_gone = left.changes.as_ref().is_some_and(|changes| changes.len() == 0);
        if !(old_tree_gone && left.written.total() == 0 && changes_gone) {
            self.leftovers = Some(left);
            return;
        }
        if !(self.closing || self.failed) {
            let ahead = self.changes_ahead();
            let changes = self.map.active.len() as u64 + self.reserved + ahead;
            let wanted = (2 * self.reserve_needed(2 * ahead)).max(self.reserve_needed(changes));
            self.space.shrink_meta(wanted * node_sectors);
            self.top_up_reserve(st);
        }
    }
}

/// Takes ranges out of a set, `most` sectors in all.
fn take_up_to(set: &mut RangeSet, mut most: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    std::iter::from_fn(move || {
        let range = if most > 0 { set.take_first(most)? } else { return None };
        most -= range.end - range.start;
        Some(range)
    })
}
