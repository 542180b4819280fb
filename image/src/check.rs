//! Examining an image. Never writes; the one oracle of the CLI, the simulator and the fuzzers.
//!
//! What must hold: every structure is valid, no two owners share a byte of the image file, nothing
//! lies past the end of used space, and (leaks) the host holds no data that nothing owns.

use crate::blocking_io as io;
use crate::disk::commit_superblock;
use crate::error::{Error, ErrorKind};
use crate::map::{Fault, Mapping, State, decode_node};
use crate::recovery::{self, Recovered};
use crate::storage::{SECTOR, Storage};
use exd_format::{
    DecodeError, FIXED_AREA, Geometry, HOLDER_OFFSET, HOLDER_SIZE, NodeEntries, SUPERBLOCK_SIZE,
    State as SuperblockState, Superblock,
};
use std::collections::HashSet;
use std::ops::Range;

/// No more findings than this are described; all are counted.
const FINDINGS_MAX: usize = 1000;

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Byte offset in the image file, where there is one.
    pub offset: Option<u64>,
    /// What is wrong there.
    pub what: String,
}

/// What an examination found.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Report {
    /// Corruptions, the first thousand.
    pub corruptions: Vec<Finding>,
    /// Number of all corruptions.
    pub corruption_count: u64,
    /// Byte ranges of the image file that hold data and that nothing owns, the first thousand.
    pub leaks: Vec<Range<u64>>,
    /// Bytes in all of them.
    pub leaked_bytes: u64,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks with a place.
    pub allocated_blocks: u64,
    /// Extents, changes since the last checkpoint included.
    pub extents: u64,
    /// Extents whose place does not follow their predecessor's.
    pub fragments: u64,
    /// Nodes of the tree.
    pub nodes: u64,
    /// Bytes of the image file that are in use, holes included.
    pub image_end: u64,
    /// The image was not closed cleanly (or is open for writing).
    pub unclean: bool,
    /// Journal records newer than the last checkpoint.
    pub records: u64,
    /// Completions that only the completion log holds.
    pub logged: u64,
}

impl Report {
    /// Nothing is wrong at all.
    pub fn is_clean(&self) -> bool {
        self.corruption_count == 0 && self.leaked_bytes == 0
    }

    fn corrupt(&mut self, offset: Option<u64>, what: impl Into<String>) {
        self.corruption_count += 1;
        if self.corruptions.len() < FINDINGS_MAX {
            self.corruptions.push(Finding { offset, what: what.into() });
        }
    }

    fn leak(&mut self, range: Range<u64>) {
        self.leaked_bytes += range.end - range.start;
        if self.leaks.len() < FINDINGS_MAX {
            self.leaks.push(range);
        }
    }
}

/// Owners of space, as findings name them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Owner {
    Fixed,
    Journal,
    List,
    Node,
    Data,
    Open,
    Zero,
}

impl Owner {
    fn name(self) -> &'static str {
        match self {
            Owner::Fixed => "the superblock area",
            Owner::Journal => "the journal",
            Owner::List => "the space list",
            Owner::Node => "a tree node",
            Owner::Data => "an extent",
            Owner::Open => "open space",
            Owner::Zero => "free space",
        }
    }
}

/// Sectors of the image file and who owns them.
type Owned = (u64, u64, Owner);

/// Examines an image. `Err` is for what keeps it from being examined: the host's errors, features
/// that are not supported, a file that is no EXD image.
pub fn check(st: &mut dyn Storage) -> Result<Report, Error> {
    let mut report = Report::default();
    let recovered = match recovery::recover(st) {
        Ok(recovered) => recovered,
        Err(error) if error.kind == ErrorKind::Corrupt => {
            report.corrupt(error.offset, error.context);
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let superblock = &recovered.superblock;
    let unknown = superblock.read_only_compatible & !exd_format::features::READ_ONLY_IMPLEMENTED;
    let set = exd_format::features::FeatureSet::ReadOnlyCompatible;
    let reasons = exd_format::features::names(set, unknown);
    if !reasons.is_empty() {
        // Somebody unknown may own space.
        return Err(Error {
            context: format!("the image cannot be checked by this version: {}", reasons.join(", ")),
            kind: ErrorKind::Unsupported(reasons),
            offset: None,
        });
    }
    report.virtual_size = superblock.virtual_size;
    report.block_size = 1 << superblock.block_bits;
    report.image_end = recovered.space.data_end * SECTOR;
    report.unclean = superblock.state == SuperblockState::InUse;
    report.records = recovered.records;
    report.logged = recovered.logged;
    check_copies(st, &recovered, &mut report)?;
    check_reserved(st, &mut report)?;

    let mut owned: Vec<Owned> = vec![(0, FIXED_AREA / SECTOR, Owner::Fixed)];
    for segment in &superblock.segments {
        let end = (segment.offset + segment.length) / SECTOR;
        owned.push((segment.offset / SECTOR, end, Owner::Journal));
    }
    let list = &superblock.space_list;
    if !list.is_none() {
        owned.push((list.address / SECTOR, (list.address + list.length) / SECTOR, Owner::List));
    }
    owned.extend(recovered.space.open.iter().map(|range| (range.start, range.end, Owner::Open)));
    owned.extend(recovered.space.zero.iter().map(|range| (range.start, range.end, Owner::Zero)));
    let mut walk = Walk {
        recovered: &recovered,
        report: &mut report,
        owned: &mut owned,
        last: None,
        tree_extents: 0,
    };
    walk.tree(st)?;
    walk.overlay();
    check_overlaps(&mut owned, recovered.space.data_end, &mut report);
    check_zeroes(st, &recovered, &mut report)?;
    if !st.geometry().fixed_length {
        check_past_end(st, report.image_end, &mut report)?;
        owned.retain(|(_, _, owner)| *owner != Owner::Zero);
        find_leaks(st, &owned, &mut report)?;
    }
    Ok(report)
}

/// A crash may leave one superblock slot torn or one generation behind; a clean close may not.
fn check_copies(
    st: &mut dyn Storage,
    recovered: &Recovered,
    report: &mut Report,
) -> Result<(), Error> {
    if recovered.both_slots || recovered.superblock.state == SuperblockState::InUse {
        return Ok(());
    }
    for slot in 0..2 {
        let offset = Superblock::slot_address(slot);
        let bytes = io::read(st, offset, SUPERBLOCK_SIZE as u64, "the superblock")?;
        match Superblock::decode(&bytes, slot, Some(&recovered.superblock.uuid)) {
            // An interrupted commit: the older copy is in use, or the close was cut short. Or an older
            // copy that this program does not understand.
            Ok(_) | Err(DecodeError::Unsupported { .. }) => {}
            Err(_) if torn_commit(slot, recovered) => {}
            Err(error) => report.corrupt(Some(offset), error.to_string()),
        }
    }
    Ok(())
}

/// The other slot may be torn if it is the one the present generation is written to last.
fn torn_commit(slot: usize, recovered: &Recovered) -> bool {
    slot != recovered.superblock.first_slot()
}

/// What lies between the holder record and the first segment is not used.
fn check_reserved(st: &mut dyn Storage, report: &mut Report) -> Result<(), Error> {
    let start = HOLDER_OFFSET + HOLDER_SIZE as u64;
    let bytes = io::read(st, start, FIXED_AREA - start, "the superblock area")?;
    if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
        report.corrupt(Some(start + at as u64), "reserved byte is not zero");
    }
    Ok(())
}

struct Walk<'a> {
    recovered: &'a Recovered,
    report: &'a mut Report,
    owned: &'a mut Vec<Owned>,
    /// Where the place of the extent before ends, in sectors.
    last: Option<u64>,
    /// Extents of the tree, whatever became of them since.
    tree_extents: u64,
}

impl Walk<'_> {
    fn geometry(&self) -> Geometry {
        self.recovered.superblock.geometry()
    }

    fn per_block(&self) -> u64 {
        (1u64 << self.recovered.superblock.block_bits) / SECTOR
    }

    /// Every node and extent of the tree.
    fn tree(&mut self, st: &mut dyn Storage) -> Result<(), Error> {
        let root = self.recovered.superblock.root;
        if root.is_none() {
            return Ok(());
        }
        let before = self.report.corruption_count;
        let node_size = self.geometry().node_size();
        let mut seen = HashSet::new();
        let mut todo = vec![Fault::root(root)];
        while let Some(expected) = todo.pop() {
            let address = expected.pointer.address;
            if !seen.insert(address) {
                self.report.corrupt(Some(address), "a tree node with two parents");
                continue;
            }
            let bytes = io::read(st, address, node_size, "a tree node")?;
            let node = match decode_node(&bytes, &expected, &self.geometry()) {
                Ok(node) => node,
                Err(error) => {
                    self.report.corrupt(error.offset, error.context);
                    continue;
                }
            };
            self.report.nodes += 1;
            self.owned.push((address / SECTOR, (address + node_size) / SECTOR, Owner::Node));
            match &node.entries {
                NodeEntries::Internal(children) => {
                    let children = (0..children.len()).rev();
                    todo.extend(children.filter_map(|index| node.expected_child(index)));
                }
                NodeEntries::Leaf(extents) => {
                    self.tree_extents += extents.len() as u64;
                    for extent in extents {
                        let length = u64::from(extent.length);
                        self.uncovered(extent.logical, length, Mapping::of_extent(extent));
                    }
                }
            }
        }
        let superblock = &self.recovered.superblock;
        let counted = (self.report.nodes, self.tree_extents);
        if self.report.corruption_count == before
            && counted != (superblock.node_count, superblock.extent_count)
        {
            let what = format!(
                "the tree has {} nodes and {} extents, the superblock counts {} and {}",
                counted.0, counted.1, superblock.node_count, superblock.extent_count
            );
            self.report.corrupt(None, what);
        }
        Ok(())
    }

    /// The parts of an extent of the tree that no later change covers.
    fn uncovered(&mut self, start: u64, len: u64, mapping: Mapping) {
        let mut at = start;
        while at < start + len {
            match self.recovered.overlay.find(at) {
                Ok((_, run)) => at += run.min(start + len - at),
                Err(gap) => {
                    let run = gap.min(start + len - at);
                    self.extent(run, mapping.advanced((at - start) * self.per_block()));
                    at += run;
                }
            }
        }
    }

    /// The changes since the checkpoint.
    fn overlay(&mut self) {
        self.last = None;
        let recovered = self.recovered;
        for (_, len, mapping) in recovered.overlay.iter_from(0) {
            if mapping.state != State::Hole {
                self.extent(len, mapping);
            }
        }
    }

    fn extent(&mut self, len: u64, mapping: Mapping) {
        self.report.extents += 1;
        if mapping.place == 0 {
            return;
        }
        let end = mapping.place + len * self.per_block();
        self.owned.push((mapping.place, end, Owner::Data));
        self.report.allocated_blocks += len;
        if self.last.is_some_and(|last| last != mapping.place) {
            self.report.fragments += 1;
        }
        self.last = Some(end);
    }
}

fn check_overlaps(owned: &mut [Owned], data_end: u64, report: &mut Report) {
    owned.sort_unstable();
    let mut reach: Option<(u64, Owner)> = None;
    for &(start, end, owner) in owned.iter() {
        if end > data_end && owner != Owner::Fixed {
            let what = format!("{} reaches past the end of used space", owner.name());
            report.corrupt(Some(start * SECTOR), what);
        }
        if let Some((reached, by)) = reach
            && start < reached
        {
            let what = format!("{} overlaps {}", owner.name(), by.name());
            report.corrupt(Some(start * SECTOR), what);
        }
        if reach.is_none_or(|(reached, _)| end > reached) {
            reach = Some((end, owner));
        }
    }
}

/// What was never used reads as zero.
fn check_past_end(st: &mut dyn Storage, end: u64, report: &mut Report) -> Result<(), Error> {
    let mut at = end;
    while let Some(data) = io::next_data(st, at)? {
        let start = data.start.max(at);
        let stop = data.end.min(start + (1 << 20));
        if start >= stop {
            break;
        }
        let bytes = io::read(st, start, (stop - start).next_multiple_of(SECTOR), "unused space")?;
        if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
            report.corrupt(Some(start + at as u64), "data past the end of used space");
            break;
        }
        at = stop;
    }
    Ok(())
}

/// Free space that is said to be zero must be.
fn check_zeroes(
    st: &mut dyn Storage,
    recovered: &Recovered,
    report: &mut Report,
) -> Result<(), Error> {
    for range in recovered.space.zero.iter() {
        let (mut at, end) = (range.start * SECTOR, range.end * SECTOR);
        while let Some(data) = io::next_data(st, at)? {
            let start = data.start.max(at) / SECTOR * SECTOR;
            let stop = data.end.min(end).min(start + (1 << 20));
            if start >= stop {
                break;
            }
            let len = (stop - start).next_multiple_of(SECTOR);
            let bytes = io::read(st, start, len, "free space")?;
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                report.corrupt(Some(start + at as u64), "free space that is not zero");
                break;
            }
            at = stop;
        }
    }
    Ok(())
}

/// Whole blocks of the host that hold data and that nothing owns.
fn find_leaks(st: &mut dyn Storage, owned: &[Owned], report: &mut Report) -> Result<(), Error> {
    let host_block = st.geometry().host_block.max(SECTOR);
    let mut index = 0;
    let mut at = 0;
    while let Some(data) = io::next_data(st, at)? {
        let end = data.end.max(data.start + 1);
        let mut from = data.start;
        while from < end {
            while owned.get(index).is_some_and(|&(_, stop, _)| stop * SECTOR <= from) {
                index += 1;
            }
            let (start, stop) =
                owned.get(index).map_or((end, end), |&(a, b, _)| (a * SECTOR, b * SECTOR));
            if start <= from {
                from = stop;
                continue;
            }
            let leak = from.next_multiple_of(host_block)..start.min(end) / host_block * host_block;
            if leak.start < leak.end {
                report.leak(leak);
            }
            from = start.min(end);
            if start >= end {
                break;
            }
        }
        at = end;
    }
    Ok(())
}

/// What a repair did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repaired {
    /// Corruptions that are gone.
    pub corruptions_fixed: u64,
    /// Bytes that were leaked and are not any more.
    pub leaked_bytes_fixed: u64,
    /// The examination after the repair.
    pub report: Report,
}

/// Repairs what can be repaired: leaks, and with `all` damaged copies of the superblock. The caller
/// holds the image locked for writing.
pub fn repair(st: &mut dyn Storage, all: bool) -> Result<Repaired, Error> {
    let reasons = recovery::read_superblock(st)
        .map(|(superblock, _)| superblock.read_only_reasons())
        .unwrap_or_default();
    if !reasons.is_empty() {
        return Err(Error {
            kind: ErrorKind::ReadOnly,
            context: format!("this version must not write the image: {}", reasons.join(", ")),
            offset: None,
        });
    }
    let before = check(st)?;
    if before.corruption_count == 0 || all {
        for range in &before.leaks {
            io::punch(st, range.clone())
                .map_err(|error| Error::storage(error, "cannot give a leak back", range.start))?;
        }
        if !before.leaks.is_empty() {
            io::sync(st)?;
        }
    }
    if all && before.corruption_count > 0 {
        let (superblock, both) = recovery::read_superblock(st)?;
        if !both {
            commit_superblock(st, &superblock)?;
        }
    }
    let report = check(st)?;
    Ok(Repaired {
        corruptions_fixed: before.corruption_count.saturating_sub(report.corruption_count),
        leaked_bytes_fixed: before.leaked_bytes.saturating_sub(report.leaked_bytes),
        report,
    })
}
