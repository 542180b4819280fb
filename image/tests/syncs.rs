//! Syncs and checkpoints that no guest asks for are few, and nothing is done again and again while one of
//! them is on its way.

mod common;

use common::{Fate, Rig, SMALL_RING, small_image, window};
use exd_format::FIXED_AREA;
use exd_image::{CreateOptions, Op, OpenOptions, Request, Segment, StorageError};
use std::cell::Cell;
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// While a sync for a window is under way, the changes that follow are not journaled one by one: it was
/// to make durable what there was when it became necessary.
#[test]
fn a_sync_of_our_own_has_a_fixed_goal() {
    let image = CreateOptions { journal_bytes: MIB, ..small_image(64 * MIB) };
    let mut rig = Rig::new(&image, window(4096));
    let records = Rc::new(Cell::new(0));
    let held = Rc::new(Cell::new(false));
    let (count, holds) = (records.clone(), held.clone());
    rig.storage.set_hook(move |op| match op {
        Op::Write { offset, .. } if (FIXED_AREA..FIXED_AREA + MIB).contains(offset) => {
            count.set(count.get() + 1);
            Fate::Proceed
        }
        Op::Sync => {
            holds.set(true);
            Fate::Hold
        }
        _ => Fate::Proceed,
    });
    let mut next = 0;
    let mut write = |rig: &mut Rig| {
        assert_eq!(rig.write(next * 8192, 4096), Ok(()));
        next += 1;
    };
    while !held.get() {
        write(&mut rig);
    }
    let before = records.get();
    for _ in 0..100 {
        write(&mut rig);
    }
    assert!(records.get() <= before + 1, "{} records for 100 writes", records.get() - before);
    rig.storage.release();
    rig.close();
}

/// A ring that cannot grow, on a host that is full, is left alone until the next checkpoint.
#[test]
fn growth_that_fails_is_not_tried_again_and_again() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(16384));
    let tries = Rc::new(Cell::new(0));
    let count = tries.clone();
    rig.storage.set_hook(move |op| match op {
        Op::Write { segments, .. }
            if matches!(segments[..], [Segment::Zero(len)] if len >= 7 * SMALL_RING) =>
        {
            count.set(count.get() + 1);
            Fate::Fail(StorageError::NoSpace)
        }
        _ => Fate::Proceed,
    });
    let before = rig.disk.stats().checkpoints;
    for i in 0..40 {
        assert_eq!(rig.write(i * 8192, 4096), Ok(()));
        assert_eq!(rig.flush(), Ok(()));
    }
    let checkpoints = rig.disk.stats().checkpoints - before;
    assert!(tries.get() > 0, "the test means nothing otherwise");
    assert!(tries.get() <= checkpoints + 1, "{} tries, {checkpoints} checkpoints", tries.get());
    rig.close();
}

/// So many times 32 writes of 4 KiB that are under way together, each into a hole of its own.
fn write_batches(rig: &mut Rig, batches: u64) {
    for batch in 0..batches {
        let writes: Vec<_> = (0..32)
            .map(|i| (batch * 32 + i) * 8192)
            .map(|offset| rig.submit(Request::Write { offset, len: 4096, durable: false }))
            .collect();
        for write in writes {
            assert_eq!(rig.finish(write), Ok(()));
        }
    }
}

/// What waits for a record can be more than a short ring takes at once. The ring grows all the same, or
/// each such batch would need a checkpoint for ever.
#[test]
fn a_ring_that_is_full_at_each_checkpoint_grows() {
    let options = OpenOptions { log_slots: 16384, ..window(16384) };
    let mut rig = Rig::new(&small_image(256 * MIB), options);
    assert_eq!(rig.disk.info().journal_bytes, SMALL_RING);
    let before = rig.disk.stats().checkpoints;
    write_batches(&mut rig, 400);
    let checkpoints = rig.disk.stats().checkpoints - before;
    assert!(rig.disk.info().journal_bytes >= 8 * SMALL_RING);
    assert!(checkpoints <= 2, "{checkpoints} checkpoints for 12800 changes");
    rig.close();
}

/// Closing waits for what is under way and then syncs, not time and again while the nodes of a checkpoint
/// are on their way.
#[test]
fn closing_syncs_a_few_times_only() {
    let image = CreateOptions { journal_bytes: 4 * MIB, ..small_image(GIB) };
    let mut rig = Rig::new(&image, window(65536));
    write_batches(&mut rig, 1000);
    assert_eq!(rig.flush(), Ok(()));
    let before = rig.storage.syncs;
    let storage = rig.close();
    let syncs = storage.syncs - before;
    // Two checkpoints of three syncs each, and one for what was punched.
    assert!(syncs <= 7, "{syncs} syncs to close");
}

fn is_syncing(rig: &Rig) -> bool {
    rig.storage.queue.iter().any(|(_, op, _)| matches!(op, Op::Sync))
}

/// P1 without a price: a flush never waits for company. Its sync starts in the call that brings it, with no
/// tick and no timer between, if all it needs has landed; where a record has to be written first, that starts
/// then, and the sync in the call that tells of the record's end.
#[test]
fn a_lone_flush_starts_its_sync_at_once() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(4096));
    let submit_flush = |rig: &mut Rig| {
        let flush = rig.submit(Request::Flush);
        rig.disk.kick(&mut rig.storage);
        flush
    };
    for i in 0..32 {
        // Into a hole, then over it.
        for is_hole in [true, false] {
            assert_eq!(rig.write(i * 8192, 4096), Ok(()));
            assert!(!is_syncing(&rig));
            let flush = submit_flush(&mut rig);
            let mut steps = 0;
            while !is_syncing(&rig) {
                assert_eq!(rig.storage.queue.len(), 1, "only the record keeps the sync waiting");
                let (token, result) = rig.storage.step().expect("the record");
                rig.disk.complete(&mut rig.storage, token, result);
                steps += 1;
            }
            // Once the engine has seen what the guest does, the record is there before the flush.
            let most = u64::from(i < 16 && is_hole);
            assert!(steps <= most, "write {i}: {steps} operations before the sync");
            assert_eq!(rig.finish(flush), Ok(()));
        }
    }
    assert_eq!(rig.waited_for_tick, 0);
    rig.close();
}

/// A flush that comes while a sync is under way needs another one. It starts in the call that tells of the
/// end of the first, for all who have come meanwhile.
#[test]
fn flushes_that_come_together_share_the_next_sync_at_once() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(4096));
    assert_eq!((rig.write(0, 4096), rig.flush()), (Ok(()), Ok(())));
    let before = rig.disk.stats().syncs;
    rig.storage.set_hook(|op| if matches!(op, Op::Sync) { Fate::Hold } else { Fate::Proceed });
    let mut flushes = Vec::new();
    for _ in 0..8 {
        assert_eq!(rig.write(0, 4096), Ok(()));
        flushes.push(rig.submit(Request::Flush));
        rig.run();
    }
    assert_eq!(rig.storage.held.len(), 1, "the first one's");
    rig.storage.release();
    let (token, result) = rig.storage.step().expect("the sync");
    rig.disk.complete(&mut rig.storage, token, result);
    assert!(is_syncing(&rig), "the second starts when the first has ended");
    for flush in flushes {
        assert_eq!(rig.finish(flush), Ok(()));
    }
    assert_eq!((rig.disk.stats().syncs - before, rig.waited_for_tick), (2, 0));
    rig.close();
}
