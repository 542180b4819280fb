//! Scattered data becomes contiguous, and nothing else changes.

mod common;

use common::{EIO, Fate, Memory, Rig, check_killed, small_image, window};
use exd_image::blocking::Image;
use exd_image::{Op, OpenOptions, Request, State};

const BLOCK: u64 = 4096;

/// Blocks written in an order that scatters them over the image file.
fn scattered(image: &mut Image<Memory>, blocks: u64) {
    for i in 0..blocks {
        let block = i * 37 % blocks;
        image.write(block * BLOCK, &[block as u8 + 1; BLOCK as usize]).expect("write");
    }
}

fn assert_content(image: &mut Image<Memory>, blocks: u64) {
    for block in 0..blocks {
        let mut data = [0; BLOCK as usize];
        image.read(block * BLOCK, &mut data).expect("read");
        assert!(data.iter().all(|byte| *byte == block as u8 + 1), "block {block}");
    }
}

#[test]
fn scattered_blocks_become_one_extent() {
    let blocks = 128;
    let storage = Image::create(Memory::default(), &small_image(1 << 20)).expect("create");
    // What a checkpoint may need is taken from the window.
    let options = OpenOptions { overlay_max: 8192, ..window(4096) };
    let mut image = Image::open(storage, options).expect("open");
    scattered(&mut image, blocks);
    let before = image.map(0, blocks * BLOCK).expect("map").len();
    assert!(before > 100, "{before} extents");
    image.defragment(0, 1 << 20).expect("defragment");
    assert_eq!(image.map(0, blocks * BLOCK).expect("map").len(), 1);
    assert_content(&mut image, blocks);
    let moved = image.disk().stats().moved_bytes;
    assert_eq!(moved, blocks * BLOCK);
    image.defragment(0, 1 << 20).expect("again");
    assert_eq!(image.disk().stats().moved_bytes, moved, "what is together stays where it is");
    let storage = image.close().expect("close");
    let mut image = Image::open(storage, OpenOptions::default()).expect("open");
    assert_content(&mut image, blocks);
    image.close().expect("close");
}

/// P2: a death of the process between any two operations leaves every block's data.
#[test]
fn p2_p4_a_death_at_any_time_loses_nothing() {
    let blocks = 24;
    let storage = Image::create(Memory::default(), &small_image(1 << 20)).expect("create");
    let mut image = Image::open(storage, window(512)).expect("open");
    scattered(&mut image, blocks);
    image.flush().expect("flush");
    let mut rig = Rig::open(image.abandon(), window(512)).expect("open");
    let id = rig.submit(Request::Defragment { offset: 0, len: blocks * BLOCK });
    let mut deaths = 0;
    rig.run_with(|storage| {
        let report = check_killed(storage);
        assert!(report.is_clean(), "{report:?}");
        let mut image = Image::open(storage.killed(), window(512)).expect("open");
        assert_content(&mut image, blocks);
        deaths += 1;
    });
    assert_eq!(rig.finish(id), Ok(()));
    assert!(deaths >= 4, "{deaths}");
    rig.close();
}

/// P7: a write that meets a move waits for it and wins.
#[test]
fn p7_a_write_during_a_move_is_not_lost() {
    let blocks = 16;
    let storage = Image::create(Memory::default(), &small_image(1 << 20)).expect("create");
    let mut image = Image::open(storage, window(512)).expect("open");
    scattered(&mut image, blocks);
    let mut rig = Rig::open(image.close().expect("close"), window(512)).expect("open");
    rig.storage.set_hook(|op| match op {
        Op::Write { .. } => Fate::Hold,
        _ => Fate::Proceed,
    });
    // An overwrite under way at the old place is waited for, or its data would stay behind.
    let first = rig.submit(Request::Write { offset: 512, len: 512, durable: false });
    let moved = rig.submit(Request::Defragment { offset: 0, len: blocks * BLOCK });
    rig.run();
    assert!(rig.outcome(moved).is_none() && rig.outcome(first).is_none());
    let second = rig.submit(Request::Write { offset: 5 * BLOCK, len: 512, durable: false });
    rig.run();
    assert!(rig.outcome(second).is_none(), "the block is being moved");
    rig.storage.set_hook(|_| Fate::Proceed);
    rig.storage.release();
    for id in [first, moved, second] {
        assert_eq!(rig.finish(id), Ok(()));
    }
    let mut image = Image::open(rig.close(), OpenOptions::default()).expect("open");
    let pieces = image.map(0, blocks * BLOCK).expect("map");
    assert_eq!((pieces.len(), pieces[0].state), (1, State::Written));
    for (block, at) in [(0, 512), (5, 0)] {
        let mut data = [0; BLOCK as usize];
        image.read(block * BLOCK, &mut data).expect("read");
        let (new, old) = (&data[at..at + 512], data[at + 512]);
        assert!(new.iter().all(|byte| *byte == 0xab), "block {block}");
        assert_eq!(old, block as u8 + 1);
    }
}

/// A move that cannot read or write leaves the data where it is.
#[test]
fn errors_leave_the_data_where_it_is() {
    for reads in [true, false] {
        let blocks = 16;
        let storage = Image::create(Memory::default(), &small_image(1 << 20)).expect("create");
        let mut image = Image::open(storage, window(512)).expect("open");
        scattered(&mut image, blocks);
        image.checkpoint().expect("checkpoint");
        let mut rig = Rig::open(image.close().expect("close"), window(512)).expect("open");
        assert_eq!(rig.request(Request::Flush), Ok(()));
        rig.request(Request::Write { offset: 512, len: 512, durable: false })
            .expect("nodes are read");
        rig.storage.set_hook(move |op| match op {
            Op::ReadBytes { .. } if reads => Fate::Fail(EIO),
            Op::Write { .. } if !reads => Fate::Fail(EIO),
            _ => Fate::Proceed,
        });
        let outcome = rig.request(Request::Defragment { offset: 0, len: blocks * BLOCK });
        assert!(outcome.is_err());
        rig.storage.set_hook(|_| Fate::Proceed);
        let mut image = Image::open(rig.close(), OpenOptions::default()).expect("open");
        for block in 1..blocks {
            let mut data = [0; BLOCK as usize];
            image.read(block * BLOCK, &mut data).expect("read");
            assert!(data.iter().all(|byte| *byte == block as u8 + 1), "block {block}");
        }
    }
}
