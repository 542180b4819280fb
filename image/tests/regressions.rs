//! What went wrong once, on the smallest image that showed it. Each test tells its story.

mod common;

use common::{
    EIO, Fate, Memory, Rig, SMALL_RING, SUPERBLOCKS_END, check_killed, small_image, window,
};
use exd_format::FIXED_AREA;
use exd_image::{CreateOptions, Op, OpenOptions, Request, RequestError, Segment, StorageError};

const MIB: u64 = 1 << 20;

/// Is this a write of a journal record into the smallest ring?
fn is_record(op: &Op) -> bool {
    matches!(op, Op::Write { offset, .. } if (FIXED_AREA..FIXED_AREA + SMALL_RING).contains(offset))
}

fn is_superblock(op: &Op) -> bool {
    matches!(op, Op::Write { offset, .. } if *offset < SUPERBLOCKS_END)
}

/// Is this a write of guest data?
fn is_data(op: &Op) -> bool {
    matches!(op, Op::Write { segments, .. } if matches!(segments[0], Segment::Request { .. }))
}

fn eio_if(fails: bool) -> Fate {
    if fails { Fate::Fail(EIO) } else { Fate::Proceed }
}

// --- The tree. ---

/// P3: what a checkpoint of many nodes leaves behind is given back in steps. Meanwhile leaves of the old
/// tree can still be found, and nothing may be read from them that has changed.
#[test]
fn p3_old_leaves_are_not_believed_while_they_are_cleared_up() {
    let options = OpenOptions { clear_up_nodes: 1, ..window(1024) };
    let mut rig = Rig::new(&small_image(64 * MIB), options);
    rig.scatter(4000);
    assert_eq!(rig.checkpoint(), Ok(()));
    rig.tick();
    assert!(!rig.disk.is_checkpoint_under_way());
    // Where data is given up, a read of the file would be one of what was there. Punches would make steps.
    rig.storage.set_hook(|op| match op {
        Op::Punch { .. } => Fate::Hold,
        op => eio_if(matches!(op, Op::ReadRequest { .. })),
    });
    for i in (0..4000).filter(|i| i % 4 > 0) {
        assert_eq!(rig.discard(i * 8192, 4096), Ok(()));
    }
    assert_eq!(rig.checkpoint(), Ok(()));
    let mut steps = 0;
    while rig.disk.is_checkpoint_under_way() {
        let offset = (steps * 7919 % 1000 * 4 + 1) * 8192;
        assert_eq!(rig.request(Request::Read { offset, len: 4096 }), Ok(()));
        steps += 1;
    }
    assert!(steps > 20, "one node is given back with each step: {steps}");
    rig.storage.release();
    rig.close();
}

/// P5: after a failed sync, the end of clearing up after a checkpoint put room aside.
#[test]
fn p5_nothing_is_put_aside_after_a_failed_sync() {
    let options = OpenOptions { clear_up_nodes: 0, ..window(1024) };
    let mut rig = Rig::new(&small_image(64 * MIB), options);
    rig.scatter(4000);
    assert_eq!(rig.checkpoint(), Ok(()));
    assert!(rig.disk.is_checkpoint_under_way(), "there is something to clear up");
    assert_eq!(rig.write(0, 4096), Ok(()));
    rig.storage.set_hook(|op| eio_if(*op == Op::Sync));
    assert!(rig.flush().is_err());
    rig.storage.set_hook(|op| panic!("{op:?} after a failed sync"));
    rig.tick();
    assert!(rig.disk.has_failed());
    rig.storage.release();
    rig.kill();
}

/// While the image stands still, what a checkpoint has left behind stays, too: at the end of clearing up, room is
/// put aside, which changes the file. Reads and flushes go on meanwhile, and each lets the engine work.
#[test]
fn nothing_is_cleared_up_while_the_image_stands_still() {
    let options = OpenOptions { clear_up_nodes: 1, ..window(1024) };
    let mut rig = Rig::new(&small_image(64 * MIB), options);
    rig.scatter(4000);
    assert_eq!(rig.checkpoint(), Ok(()));
    assert_eq!(rig.request(Request::Freeze), Ok(()));
    assert!(rig.disk.is_checkpoint_under_way(), "there is something to clear up");
    rig.storage.set_hook(|op| match op {
        Op::ReadRequest { .. } => Fate::Proceed,
        op => panic!("{op:?} while it stands still"),
    });
    let still = (rig.storage.file.clone(), rig.storage.log.clone());
    for i in 0..1000 {
        assert_eq!(rig.request(Request::Read { offset: i * 8192, len: 4096 }), Ok(()));
        assert_eq!(rig.flush(), Ok(()));
        rig.tick();
    }
    assert!(rig.disk.is_frozen() && rig.disk.is_checkpoint_under_way());
    assert!(
        rig.storage.file == still.0 && rig.storage.log == still.1,
        "not even the log has changed"
    );
    rig.storage.set_hook(|_| Fate::Proceed);
    rig.disk.thaw(&mut rig.storage);
    (0..100).for_each(|_| rig.tick());
    assert!(!rig.disk.is_checkpoint_under_way(), "it is cleared up afterwards");
    rig.close();
}

/// The ring did not grow while there was something to clear up after a checkpoint.
#[test]
fn the_ring_grows_while_a_checkpoint_is_cleared_up_after() {
    let options = OpenOptions { clear_up_nodes: 0, overlay_max: 4096, ..window(64 << 10) };
    let mut rig = Rig::new(&small_image(256 * MIB), options);
    for i in 0..10_000 {
        assert_eq!(rig.write(i * 8192, 4096), Ok(()));
        assert_eq!(rig.flush(), Ok(()));
    }
    let checkpoints = rig.disk.stats().checkpoints;
    assert!(checkpoints < 60, "{checkpoints} checkpoints");
    rig.close();
}

/// P4, P8: the first leaf of a tree became empty and was dropped, and the node above it no longer
/// began where it said. The checkpoint panicked, and so did each opening that repeated it.
#[test]
fn p4_p8_discard_of_all_of_the_first_leaf() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(1024));
    rig.scatter(1000);
    assert_eq!(rig.checkpoint(), Ok(()));
    assert!(rig.disk.info().nodes > 3, "there are several leaves");
    assert_eq!(rig.discard(0, 400 * 8192), Ok(()));
    assert_eq!(rig.checkpoint(), Ok(()));
    assert_eq!(rig.disk.info().extents, 600);
    let rig = Rig::open(rig.kill(), window(1024)).expect("it opens again");
    rig.close();
}

/// What stays written between two discards of [`fragmented`] images.
const STAYS: u64 = 512;

/// An image of 512-byte blocks with room for so many discards of 4 KiB that leave a block between them.
fn fragmented(discards: u64, options: OpenOptions, journal_bytes: u64) -> Rig {
    let size = (discards * (4096 + STAYS)).next_multiple_of(MIB);
    let mut rig =
        Rig::new(&CreateOptions { block_size: 512, journal_bytes, ..small_image(size) }, options);
    for i in 0..size / MIB {
        assert_eq!(rig.write(i * MIB, MIB), Ok(()));
    }
    assert_eq!(rig.checkpoint(), Ok(()));
    for i in 0..discards {
        assert_eq!(rig.discard(i * (4096 + STAYS), 4096), Ok(()), "discard {i}");
    }
    rig
}

/// P3, P4: twenty thousand places freed one by one make the space list longer than the room that was put
/// aside for it.
#[test]
fn p4_space_list_of_a_fragmented_image_finds_room() {
    let mut rig = fragmented(20_000, OpenOptions::default(), MIB);
    assert_eq!(rig.checkpoint(), Ok(()));
    assert!(rig.disk.info().extents >= 20_000);
    let rig = Rig::open(rig.close(), OpenOptions::default()).expect("it opens again");
    rig.close();
}

/// P2, P4: killed with as many changes in the completion log as it holds, an image needs room for
/// nodes and list before it can take anything.
#[test]
fn p2_p4_kill_of_a_fragmented_image_leaves_room_to_recover() {
    let options = OpenOptions { log_slots: 1 << 16, overlay_max: 30_000, ..Default::default() };
    let rig = fragmented(25_000, options, 4 * MIB);
    let rig = Rig::open(rig.kill(), OpenOptions::default()).expect("it opens again");
    assert!(rig.disk.info().extents >= 25_000);
    rig.close();
}

// --- Closing. ---

/// P8: one superblock slot could not be written, and closing began a second checkpoint while the
/// first still had to write the same bytes again.
#[test]
fn p8_close_while_a_superblock_is_to_be_written_again() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(1024));
    assert_eq!(rig.write(0, 4096), Ok(()));
    let mut fails = 1;
    rig.storage.set_hook(move |op| {
        let fail = is_superblock(op) && fails > 0;
        fails -= u32::from(fail);
        eio_if(fail)
    });
    let checkpoint = rig.submit(Request::Checkpoint);
    rig.run();
    assert_eq!(rig.outcome(checkpoint), Some(Err(RequestError::Storage(EIO))));
    rig.storage.release();
    rig.close();
}

/// P4, P8: closing wrote a record that got `EIO` again and again, for ever.
#[test]
fn p8_close_ends_when_no_record_can_be_written() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(1024));
    assert_eq!(rig.write(0, 4096), Ok(()));
    rig.storage.set_hook(|op| eio_if(is_record(op)));
    // With or without an error: a checkpoint makes the record superfluous.
    let closed = rig.disk.close(&mut rig.storage);
    rig.storage.release();
    let storage = rig.kill();
    let rig = Rig::open(storage, window(1024)).expect("it opens again");
    assert_eq!(rig.disk.info().extents, 1, "closed with {closed:?}");
    rig.close();
}

// --- Requests that never ended. ---

/// A write that waits for a window and a resize that waits for the write: while a resize was under
/// way no window was opened.
#[test]
fn resize_behind_a_write_that_waits_for_a_window() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(128));
    let write = rig.submit(Request::Write { offset: 0, len: 4 * MIB, durable: false });
    let resize = rig.submit(Request::Resize { size: 32 * MIB });
    assert_eq!(rig.finish(write), Ok(()));
    assert_eq!(rig.finish(resize), Ok(()));
    assert_eq!(rig.disk.info().virtual_size, 32 * MIB);
    rig.close();
}

/// Requests behind a resize were held until it was committed: one that failed held them for ever.
#[test]
fn requests_behind_a_resize_that_fails() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(1024));
    assert_eq!(rig.write(0, 8192), Ok(()));
    // The rest of the last block is zeroed: sectors 15 of 16.
    rig.storage.set_hook(|op| {
        eio_if(matches!(op, Op::Write { segments, .. } if segments[0] == Segment::Zero(512)))
    });
    let resize = rig.submit(Request::Resize { size: 4096 + 3584 });
    let read = rig.submit(Request::Read { offset: 0, len: 512 });
    assert_eq!(rig.finish(resize), Err(RequestError::Storage(EIO)));
    assert_eq!(rig.finish(read), Ok(()));
    assert_eq!(rig.disk.info().virtual_size, 64 * MIB);
    rig.storage.release();
    rig.close();
}

/// P5: a write that waited for a window waited for ever once a sync had failed.
#[test]
fn p5_write_that_waits_for_a_window_when_a_sync_fails() {
    let mut rig = Rig::new(&small_image(64 * MIB), window(128));
    rig.storage.set_hook(|op| eio_if(*op == Op::Sync));
    let write = rig.submit(Request::Write { offset: 0, len: 4 * MIB, durable: false });
    assert_eq!(rig.finish(write), Err(RequestError::Failed));
    assert!(rig.disk.has_failed());
    rig.kill();
}

/// P5, P8: a discard that waited for a first write was taken up after a sync had failed, found no room
/// and began a checkpoint, which must not be.
#[test]
fn p5_p8_discard_taken_up_after_a_failed_sync() {
    let mut rig = Rig::new(&small_image(256 * MIB), window(64));
    let refuse = |op: &Op| matches!(op, Op::Allocate { .. });
    rig.storage.set_hook(move |op| match refuse(op) {
        true => Fate::Fail(StorageError::NoSpace),
        false => Fate::Proceed,
    });
    rig.scatter(8000);
    assert_eq!(rig.checkpoint(), Ok(()));
    rig.storage.set_hook(move |op| match op {
        op if refuse(op) => Fate::Fail(StorageError::NoSpace),
        op if is_data(op) => Fate::Hold,
        op => eio_if(*op == Op::Sync),
    });
    let write = rig.submit(Request::Write { offset: 200 * MIB, len: 4096, durable: false });
    rig.run();
    let discard = rig.submit(Request::Discard { offset: 200 * MIB, len: 4096 });
    rig.run();
    // Its own sync, or one for a window before.
    assert!(rig.flush().is_err() && rig.disk.has_failed());
    assert_eq!(rig.storage.held.len(), 1);
    rig.storage.release();
    let _ = rig.finish(write);
    assert_eq!(rig.finish(discard), Err(RequestError::Failed));
    rig.kill();
}

/// A record whose place gives `EIO` was written again at once, for ever, when no guest's flush but the
/// full completion log asked for it.
#[test]
fn full_log_and_a_record_that_cannot_be_written() {
    let options = OpenOptions { log_slots: 128, ..window(1024) };
    let mut rig = Rig::new(&small_image(64 * MIB), options);
    rig.storage.set_hook(|op| eio_if(is_record(op)));
    let write = |i: u64| Request::Write { offset: i * 8192, len: 4096, durable: false };
    let ids: Vec<_> = (0..300).map(|i| rig.submit(write(i))).collect();
    let outcomes: Vec<_> = ids.into_iter().map(|id| rig.finish(id)).collect();
    assert_eq!(outcomes[0], Ok(()));
    let known = |outcome| matches!(outcome, Ok(()) | Err(RequestError::Storage(EIO)));
    assert!(outcomes.into_iter().all(known));
    rig.storage.release();
    rig.tick();
    assert_eq!(rig.write(32 * MIB, 4096), Ok(()), "the host has recovered");
    rig.close();
}

/// A checkpoint that commits makes room, but nothing looked again at what waited for room until the
/// next tick.
#[test]
fn writes_go_on_when_a_checkpoint_commits() {
    let options = OpenOptions { overlay_max: 16, ..window(1024) };
    let mut rig = Rig::new(&small_image(256 * MIB), options);
    rig.scatter(2000);
    assert_eq!(rig.waited_for_tick, 0);
    rig.close();
}

/// With the largest records and the smallest ring, a record fills the ring.
#[test]
fn ring_of_a_single_record() {
    let image = CreateOptions { record_align: 65536, ..small_image(64 * MIB) };
    let mut rig = Rig::new(&image, window(1024));
    for i in 0..1000 {
        assert_eq!(rig.write(i * 8192, 4096), Ok(()), "write {i}");
        if i % 7 == 0 {
            assert_eq!(rig.flush(), Ok(()), "flush {i}");
        }
    }
    rig.close();
}

// --- The completion log. ---

/// P2, P4: freed places were all released at once when a sync ended, more of them than the completion
/// log has slots: it ran over changes that no record held yet, and a killed process left an image that
/// did not open.
#[test]
fn p2_p4_many_places_released_at_once() {
    let image = CreateOptions { journal_bytes: 4 * MIB, ..small_image(256 * MIB) };
    let options = OpenOptions { log_slots: 512, overlay_max: 100_000, ..window(1024) };
    let mut rig = Rig::new(&image, options);
    rig.scatter(3000);
    assert_eq!(rig.checkpoint(), Ok(()));
    // Every other one is freed while the host's sync is slow.
    rig.storage.set_hook(|op| if *op == Op::Sync { Fate::Hold } else { Fate::Proceed });
    for i in 0..1500 {
        assert_eq!(rig.discard(i * 16384, 4096), Ok(()), "discard {i}");
    }
    rig.storage.release();
    for _ in 0..3 {
        let mut ended = 0;
        rig.run_with(|storage| {
            ended += 1;
            if ended % 20 == 0 {
                let report = check_killed(storage);
                assert_eq!(report.corruption_count, 0, "{:?}", report.corruptions);
            }
        });
        rig.submit(Request::Flush);
    }
    let rig = Rig::open(rig.kill(), window(1024)).expect("it opens again");
    assert_eq!(rig.disk.info().extents, 1500);
    rig.close();
}

/// P2, P8: one write in more pieces than the completion log has slots waited for room that its own
/// reservation took, for ever.
#[test]
fn p2_p8_write_of_more_runs_than_the_log_has_slots() {
    let options = OpenOptions { log_slots: 256, ..window(4) };
    let mut rig = Rig::new(&small_image(256 * MIB), options);
    assert_eq!(rig.write(0, 2 * MIB), Ok(()));
    let rig = Rig::open(rig.kill(), window(1024)).expect("it opens again");
    rig.close();
}

/// P2, P8: a burst of small windows was opened in one go, past the end of what the completion log could
/// take.
#[test]
fn p2_p8_burst_of_small_windows() {
    let image = CreateOptions { journal_bytes: MIB, ..small_image(256 * MIB) };
    let options = OpenOptions { log_slots: 256, ..window(16 << 10) };
    let mut rig = Rig::new(&image, options);
    // Free ranges of 64 KiB each ...
    for i in 0..400 {
        assert_eq!(rig.write(i << 16, 1 << 16), Ok(()), "write {i}");
    }
    assert_eq!(rig.checkpoint(), Ok(()));
    for i in 0..200 {
        assert_eq!(rig.discard(i << 17, 1 << 16), Ok(()), "discard {i}");
    }
    for _ in 0..20 {
        assert_eq!(rig.flush(), Ok(()));
        rig.tick();
    }
    // ... a log that is nearly full ...
    for i in 0..190 {
        assert_eq!(rig.discard((i << 17) + (1 << 16), 4096), Ok(()), "unflushed discard {i}");
    }
    // ... and a write that needs more than a window.
    assert_eq!(rig.write(100 * MIB, 20 * MIB), Ok(()));
    rig.close();
}

/// P2, P8: writes at depth into small windows, with few slots and as many freed places.
#[test]
fn p2_p8_small_windows_and_a_small_log_at_depth() {
    let image = CreateOptions { journal_bytes: MIB, ..small_image(256 * MIB) };
    let options = OpenOptions { log_slots: 160, ..window(1024) };
    let mut rig = Rig::new(&image, options);
    for i in 0..2000 {
        assert_eq!(rig.write(i * 4096, 4096), Ok(()), "write {i}");
    }
    for i in 0..1000 {
        assert_eq!(rig.discard(i * 8192, 4096), Ok(()), "discard {i}");
    }
    for _ in 0..20 {
        assert_eq!(rig.flush(), Ok(()));
    }
    for batch in 0..40 {
        let offset = |i: u64| 64 * MIB + (batch * 64 + i) * 8192;
        let write = |i: u64| Request::Write { offset: offset(i), len: 4096, durable: false };
        let ids: Vec<_> = (0..64).map(|i| rig.submit(write(i))).collect();
        for id in ids {
            assert_eq!(rig.finish(id), Ok(()), "batch {batch}");
        }
    }
    rig.close();
}

// --- Space. ---

/// Space freed in pieces smaller than a sixteenth of a window was never used again: on a device that
/// is for good, and writes got `ENOSPC` on a disk with room.
#[test]
fn small_freed_places_of_a_device_are_used_again() {
    let device = Memory { fixed_length: true, file: vec![0x5a; 16 << 20], ..Default::default() };
    let mut rig = Rig::on(device, &small_image(8 * MIB), window(1024));
    let mut random = common::Random::new(12345);
    for step in 0..20_000 {
        let offset = random.below(2048) * 4096;
        let outcome =
            if random.one_in(3) { rig.discard(offset, 4096) } else { rig.write(offset, 4096) };
        assert_eq!(outcome, Ok(()), "step {step}: {:?}", rig.disk.info());
        if step % 50 == 0 {
            assert_eq!(rig.flush(), Ok(()));
            rig.tick();
        }
    }
    rig.close();
}

/// The host refuses to allocate the reserve: a write of several runs waited for room that only its own
/// end would make.
#[test]
fn writes_of_several_runs_when_the_host_refuses_the_reserve() {
    let mut rig = Rig::new(&small_image(256 * MIB), window(64));
    rig.storage.set_hook(|op| match op {
        Op::Allocate { .. } => Fate::Fail(StorageError::NoSpace),
        _ => Fate::Proceed,
    });
    rig.scatter(8000);
    for i in 0..20 {
        assert_eq!(rig.write((128 + i) * MIB, MIB), Ok(()), "write {i}");
    }
    rig.close();
}

/// The metadata reserve was space in the file but not on the host: on a full host discards could not
/// become durable, and so nothing could ever be freed.
#[test]
fn discards_free_a_full_host() {
    let storage = Memory { pages_left: Some(20_000), ..Default::default() };
    let mut rig = Rig::on(storage, &small_image(256 * MIB), window(1024));
    let full = (0..32_000).find(|i| rig.write(i * 8192, 4096).is_err());
    let full = full.expect("the host gets full");
    assert!(full > 10_000, "full after {full} blocks");
    assert_eq!(rig.write(255 * MIB, 4096), Err(RequestError::Storage(StorageError::NoSpace)));
    for i in 0..full {
        assert_eq!(rig.discard(i * 8192, 4096), Ok(()), "discard {i} of {full}");
    }
    for _ in 0..5 {
        assert_eq!(rig.flush(), Ok(()));
        rig.tick();
    }
    for i in 0..full / 2 {
        assert_eq!(rig.write(i * 8192, 4096), Ok(()), "write {i} after discarding {full}");
    }
    rig.close();
}

// --- Damage that is none, and damage that is. ---

/// P6: a node of the old tree was still being read when two checkpoints had committed and its place
/// held another node: the guest was told that the image is damaged.
#[test]
fn p6_node_replaced_while_it_is_read_is_no_damage() {
    let options = OpenOptions { cache_bytes: 32 << 10, ..window(1024) };
    let mut rig = Rig::new(&small_image(64 * MIB), options);
    rig.scatter(4000);
    assert_eq!(rig.checkpoint(), Ok(()));
    // A checkpoint that replaces every leaf has written them and waits for a sync ...
    rig.storage.set_hook(|op| if *op == Op::Sync { Fate::Hold } else { Fate::Proceed });
    for i in 0..40 {
        assert_eq!(rig.discard(i * 100 * 8192, 4096), Ok(()));
    }
    rig.submit(Request::Checkpoint);
    rig.run();
    // ... when a read begins that needs a leaf of the old tree.
    let is_node_read = |op: &Op| matches!(op, Op::ReadBytes { .. });
    rig.storage.set_hook(move |op| if is_node_read(op) { Fate::Hold } else { Fate::Proceed });
    let read = rig.submit(Request::Read { offset: 50 * 8192, len: 4096 });
    rig.run();
    let place = rig.storage.held.iter().find_map(|(_, op, _)| match op {
        Op::ReadBytes { offset, len } => Some(*offset as usize..(offset + len) as usize),
        _ => None,
    });
    let place = place.expect("the leaf is being read");
    let before = rig.storage.file[place.clone()].to_vec();
    rig.storage.hook = None;
    rig.storage.release_only(|op| *op == Op::Sync);
    rig.run();
    let replaced = (1..20).any(|round| {
        for i in 0..40 {
            assert_eq!(rig.discard((i * 100 + round) * 8192, 4096), Ok(()));
        }
        assert_eq!(rig.checkpoint(), Ok(()));
        rig.storage.file[place.clone()] != before
    });
    assert!(replaced, "the place is used again");
    rig.storage.release();
    assert_eq!(rig.finish(read), Ok(()));
    assert_eq!(rig.disk.last_corruption(), None);
    rig.close();
}
