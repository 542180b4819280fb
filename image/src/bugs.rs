//! Deliberate bugs, one at a time, that the simulator has to find. A simulator that never failed
//! proves nothing. Compiled in only with the feature `seeded-bugs`; every hook is a no-op without.

/// A bug that can be switched on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// First writes do not own their blocks.
    SkipBlockOwnership,
    /// A block counts as written when its data is submitted, not when it has landed.
    ConvertBeforeData,
    /// The last entry of a journal record is left out.
    LoseLastEntry,
    /// Recovery goes on into records of an earlier epoch.
    AcceptEarlierEpoch,
    /// A completion is shown before its slot of the completion log is stored.
    CompleteBeforeLog,
    /// Freed space is allocated again without a punch.
    ReuseBeforePunch,
    /// Freed space is recycled before the record that frees it is durable.
    ReuseBeforeDurable,
    /// Freed space is recycled while earlier I/O still runs against it.
    ReuseBeforeDrain,
    /// After an unclean open, open space is taken for known zeroes.
    TrustPoolAfterUnclean,
    /// The first flush after opening does not sync.
    SkipFirstSync,
    /// Tree nodes with a wrong checksum are accepted.
    SkipChecksum,
    /// The superblock is written before the nodes it points at are durable.
    SyncInWrongOrder,
    /// Data in space that is not known to be zero is not made durable before its record.
    SkipOrderedSync,
    /// The old superblock's structures are reused after the first of the two copies.
    OneSuperblockOnly,
    /// A flush does not write the records of the conversions it covers.
    FlushWithoutRecord,
    /// Shrinking leaves the cut tail of the last block as it is.
    KeepTailOnShrink,
    /// A failed sync is forgotten.
    ForgetFailedSync,
    /// Windows are used before the record that opens them is durable.
    UseWindowEarly,
    /// A move's record may be durable before the moved data is.
    MoveWithoutOrder,
    /// A move reads the old place while writes still run against it.
    MoveBeforeDrain,
    /// A move's two entries are not a group.
    MoveInHalves,
    /// The fast path still finds what a discard gave up.
    FastShowsDiscarded,
    /// Freed space is recycled while I/O on the fast path still runs against it.
    FastRecyclesEarly,
    /// The fast path still finds blocks that are being moved.
    FastShowsMoving,
    /// Overwrites on the fast path do not make the image dirty.
    FastNotDirty,
    /// Space is allocated while the zeroing ahead of it still runs: the zeroes may overtake the data.
    AllocateWhileZeroing,
    /// Zeroes written ahead on a block device count as known before they are durable.
    TrustZeroesUnsynced,
    /// Prepared space that is given back is allocated while its punch still runs.
    AllocateWhileDropping,
    /// What a write may zero besides its data reaches into the next place.
    SpareBeyondPlace,
    /// A block that a write under way has left may be freed and used again before that has ended.
    LeaveUnnumbered,
    /// The fast path is shown a block as a write left it, whatever others have made of it.
    FastShowsLeft,
    /// What is shown is taken back by the 4 KiB that change, and not where a cell reaches into them.
    FastHidesAligned,
    /// The changes of a checkpoint are forgotten while leaves of the old tree can still be found.
    ForgetChangesEarly,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 33] = [
        Bug::SkipBlockOwnership,
        Bug::ConvertBeforeData,
        Bug::LoseLastEntry,
        Bug::AcceptEarlierEpoch,
        Bug::CompleteBeforeLog,
        Bug::ReuseBeforePunch,
        Bug::ReuseBeforeDurable,
        Bug::ReuseBeforeDrain,
        Bug::TrustPoolAfterUnclean,
        Bug::SkipFirstSync,
        Bug::SkipChecksum,
        Bug::SyncInWrongOrder,
        Bug::SkipOrderedSync,
        Bug::OneSuperblockOnly,
        Bug::FlushWithoutRecord,
        Bug::KeepTailOnShrink,
        Bug::ForgetFailedSync,
        Bug::UseWindowEarly,
        Bug::MoveWithoutOrder,
        Bug::MoveBeforeDrain,
        Bug::MoveInHalves,
        Bug::FastShowsDiscarded,
        Bug::FastRecyclesEarly,
        Bug::FastShowsMoving,
        Bug::FastNotDirty,
        Bug::AllocateWhileZeroing,
        Bug::TrustZeroesUnsynced,
        Bug::AllocateWhileDropping,
        Bug::SpareBeyondPlace,
        Bug::LeaveUnnumbered,
        Bug::FastShowsLeft,
        Bug::FastHidesAligned,
        Bug::ForgetChangesEarly,
    ];
}

#[cfg(feature = "seeded-bugs")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Switches a bug on, or all off, for this thread.
    pub fn set(bug: Option<Bug>) {
        BUG.set(bug);
    }

    pub(crate) fn on(bug: Bug) -> bool {
        BUG.get() == Some(bug)
    }

    thread_local! {
        static DETOURS: Cell<bool> = const { Cell::new(false) };
    }

    /// Has sessions begin, on this thread, as if the image had no room for that: in one of the ways that
    /// are rare otherwise.
    pub fn set_detours(on: bool) {
        DETOURS.set(on);
    }

    /// Not a bug: how a session makes room. 0: as the image is; 1: by another list; 2: where records
    /// opened space; 3: by a record.
    pub(crate) fn way_to_begin(generation: u64) -> u64 {
        if DETOURS.get() { generation % 4 } else { 0 }
    }
}

#[cfg(feature = "seeded-bugs")]
pub(crate) use switch::{on, way_to_begin};
#[cfg(feature = "seeded-bugs")]
pub use switch::{set, set_detours};

#[cfg(not(feature = "seeded-bugs"))]
pub(crate) const fn on(_: Bug) -> bool {
    false
}

#[cfg(not(feature = "seeded-bugs"))]
pub(crate) const fn way_to_begin(_: u64) -> u64 {
    0
}
