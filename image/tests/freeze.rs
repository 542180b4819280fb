//! Freezing: the file stands still, and a copy of it has everything that was acknowledged (P3, P4).

mod common;

use common::{Fate, Memory, Random, Rig, small_image};
use exd_image::blocking::Image;
use exd_image::check::check;
use exd_image::{Op, OpenOptions, Request, RequestId};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 2048;

/// Submits a write of one block that holds `stamp` only.
fn write(rig: &mut Rig, block: u64, stamp: u8) -> RequestId {
    let id = rig.submit(Request::Write { offset: block * BLOCK, len: BLOCK, durable: false });
    rig.storage.buffers.get_mut(&id).expect("its buffer").fill(stamp);
    id
}

/// Random changes under way; what each block holds when they have ended.
fn churn(rig: &mut Rig, random: &mut Random, model: &mut BTreeMap<u64, u8>) {
    let mut busy = BTreeSet::new();
    for _ in 0..200 {
        let block = random.below(BLOCKS);
        if !busy.insert(block) {
            continue;
        }
        if random.one_in(4) {
            rig.submit(Request::Discard { offset: block * BLOCK, len: BLOCK });
            model.remove(&block);
        } else {
            let stamp = 1 + random.below(250) as u8;
            write(rig, block, stamp);
            model.insert(block, stamp);
        }
        match random.below(40) {
            0 => drop(rig.submit(Request::Flush)),
            1 => drop(rig.submit(Request::Checkpoint)),
            _ => {}
        }
    }
}

fn assert_content(file: &[u8], model: &BTreeMap<u64, u8>, seed: u64) {
    let mut copy = Memory { file: file.to_vec(), ..Memory::default() };
    let report = check(&mut copy).expect("examined");
    assert!(report.is_clean(), "seed {seed}: {report:?}");
    let mut image = Image::open(copy, OpenOptions::default()).expect("the copy opens");
    for block in 0..BLOCKS {
        let mut data = vec![0; BLOCK as usize];
        image.read(block * BLOCK, &mut data).expect("read");
        let stamp = model.get(&block).copied().unwrap_or(0);
        assert!(data.iter().all(|byte| *byte == stamp), "seed {seed}: block {block}");
    }
    image.close().expect("the copy closes");
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let options = OpenOptions {
        window_bytes: 256 << 10,
        overlay_max: 64,
        clear_up_nodes: seed % 2,
        journal_max: 256 << 10,
        ..OpenOptions::default()
    };
    let mut rig = Rig::new(&small_image(BLOCKS * BLOCK), options);
    rig.storage.shuffle = Some(Random::new(seed + 1000));
    let changes = Rc::new(Cell::new(0));
    let counter = changes.clone();
    rig.storage.set_hook(move |op| {
        if !matches!(op, Op::ReadBytes { .. } | Op::ReadRequest { .. } | Op::NextData { .. }) {
            counter.set(counter.get() + 1);
        }
        Fate::Proceed
    });
    let mut model = BTreeMap::new();
    for _ in 0..3 {
        churn(&mut rig, &mut random, &mut model);
        // Some of it has ended, some is under way, in the background too.
        rig.disk.kick(&mut rig.storage);
        for _ in 0..random.below(200) {
            let Some((token, result)) = rig.storage.step() else { break };
            rig.disk.complete(&mut rig.storage, token, result);
        }
        let freeze = rig.submit(Request::Freeze);
        let late = write(&mut rig, 5, 255);
        let read = rig.submit(Request::Read { offset: 0, len: BLOCKS * BLOCK });
        rig.run();
        assert_eq!(rig.outcome(freeze), Some(Ok(())), "seed {seed}");
        assert!(rig.disk.is_frozen());
        assert_eq!(rig.outcome(read), Some(Ok(())), "reads go on");
        let (file, before) = (rig.storage.file.clone(), changes.get());
        for _ in 0..3 {
            rig.tick();
        }
        for block in 0..BLOCKS {
            let read = Request::Read { offset: block * BLOCK, len: BLOCK };
            assert_eq!(rig.request(read), Ok(()));
        }
        assert_eq!(rig.flush(), Ok(()), "a flush has nothing to do");
        let checkpoint = rig.submit(Request::Checkpoint);
        rig.run();
        assert_eq!(changes.get(), before, "seed {seed}: the file is being changed");
        assert!(rig.storage.file == file, "seed {seed}: the file has changed");
        assert_eq!((rig.outcome(late), rig.outcome(checkpoint)), (None, None), "changes wait");
        assert_content(&file, &model, seed);
        rig.disk.thaw(&mut rig.storage);
        assert_eq!(rig.finish(late), Ok(()));
        assert_eq!(rig.finish(checkpoint), Ok(()));
        model.insert(5, 255);
    }
    assert_eq!(rig.flush(), Ok(()));
    let memory = rig.close();
    assert_content(&memory.file, &model, seed);
}

/// P3, P4: whatever is under way when it begins.
#[test]
fn p4_a_copy_of_a_frozen_image_is_whole() {
    for seed in 0..12 {
        run(seed);
    }
}

/// Called off before it has come about, it leaves nothing behind.
#[test]
fn a_freeze_can_be_called_off() {
    let mut rig = Rig::new(&small_image(BLOCKS * BLOCK), OpenOptions::default());
    rig.storage.set_hook(|op| match op {
        Op::Sync => Fate::Hold,
        _ => Fate::Proceed,
    });
    write(&mut rig, 1, 1);
    let freeze = rig.submit(Request::Freeze);
    let late = write(&mut rig, 2, 2);
    rig.run();
    assert_eq!((rig.outcome(freeze), rig.outcome(late)), (None, None));
    rig.disk.thaw(&mut rig.storage);
    rig.run();
    assert!(rig.outcome(freeze).expect("ended").is_err());
    assert_eq!(rig.outcome(late), Some(Ok(())));
    rig.storage.hook = None;
    rig.storage.release();
    assert_eq!(rig.request(Request::Freeze), Ok(()), "another one works");
    rig.close();
}

/// P5: what cannot be made durable cannot be frozen.
#[test]
fn p5_a_failed_sync_fails_the_freeze() {
    let mut rig = Rig::new(&small_image(BLOCKS * BLOCK), OpenOptions::default());
    rig.storage.set_hook(|op| match op {
        Op::Sync => Fate::Fail(common::EIO),
        _ => Fate::Proceed,
    });
    write(&mut rig, 1, 1);
    assert!(rig.request(Request::Freeze).is_err());
    assert!(!rig.disk.is_frozen());
    let read = Request::Read { offset: BLOCK, len: BLOCK };
    assert_eq!(rig.request(read), Ok(()));
}
