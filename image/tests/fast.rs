//! The way past the engine: what it shows is true, what it begins is waited for.

mod common;

use common::{EIO, Fate, Random, Rig, small_image, window};
use exd_image::fast::{Access, Fast, FilePart, Lane, Ticket};
use exd_image::{CreateOptions, Op, Request};
use std::sync::Arc;

const BLOCK: u64 = 4096;

fn rig(blocks: u64, bytes: u64) -> (Rig, Arc<Fast>, Lane) {
    rig_of(&small_image(blocks * BLOCK), bytes)
}

fn rig_of(image: &CreateOptions, bytes: u64) -> (Rig, Arc<Fast>, Lane) {
    let mut rig = Rig::new(image, window(128));
    let fast = Fast::new(bytes);
    rig.disk.share(&fast).expect("nobody else is behind it");
    let lane = fast.lane();
    (rig, fast, lane)
}

fn begin(
    lane: &mut Lane,
    access: Access,
    offset: u64,
    len: u64,
) -> Option<(Ticket, Vec<FilePart>)> {
    let mut parts = Vec::new();
    lane.begin(access, offset, len, &mut parts).map(|ticket| (ticket, parts))
}

/// Writes past the engine; false if that was refused.
fn overwrite(rig: &mut Rig, lane: &mut Lane, offset: u64, len: u64, byte: u8) -> bool {
    let Some((ticket, parts)) = begin(lane, Access::Overwrite, offset, len) else { return false };
    for part in parts {
        rig.storage.file[part.offset as usize..(part.offset + part.len) as usize].fill(byte);
    }
    lane.end(ticket);
    true
}

#[test]
fn what_is_shown_is_true() {
    const BLOCKS: u64 = 1100;
    for (seed, bytes, block_size, least) in [
        (1, 1 << 20, 4096, 100),
        (2, 4096, 4096, 20),
        (3, 8, 4096, 0),
        (4, 1 << 20, 512, 100),
        (5, 4096, 512, 20),
        (6, 1 << 20, 16384, 100),
        (7, 1 << 20, 1024, 100),
        (8, 4096, 1024, 20),
        (9, 1 << 20, 2048, 100),
        (10, 4096, 2048, 20),
        (11, 4096, 2048, 20),
        (12, 1 << 20, 512, 100),
    ] {
        let image = CreateOptions { block_size, ..small_image(BLOCKS * BLOCK) };
        let (mut rig, fast, mut lane) = rig_of(&image, bytes);
        let block = u64::from(block_size) / 512;
        let mut random = Random::new(seed);
        // What each sector of the disk holds; requests write 0xab.
        let mut expected = vec![0u8; (BLOCKS * 8) as usize];
        for round in 0..1500u64 {
            let start = random.below(BLOCKS * 8);
            let most = if random.one_in(8) { 6000 } else { 40 };
            let sectors = (1 + random.below(most)).min(BLOCKS * 8 - start);
            let (offset, len) = (start * 512, sectors * 512);
            let range = start as usize..(start + sectors) as usize;
            match random.below(8) {
                0..3 => {
                    assert_eq!(rig.write(offset, len), Ok(()));
                    expected[range].fill(0xab);
                }
                3 => {
                    let unmap = random.one_in(2);
                    let request = Request::WriteZeroes { offset, len, unmap, durable: false };
                    assert_eq!(rig.request(request), Ok(()));
                    expected[range].fill(0);
                }
                4 => {
                    let first = start.next_multiple_of(block);
                    let last = (start + sectors) / block * block;
                    assert_eq!(rig.discard(offset, len), Ok(()));
                    expected[first.min(last) as usize..last as usize].fill(0);
                }
                5 => {
                    if overwrite(&mut rig, &mut lane, offset, len, round as u8) {
                        expected[range].fill(round as u8);
                    }
                }
                _ => {
                    if let Some((ticket, parts)) = begin(&mut lane, Access::Read, offset, len) {
                        let found: Vec<u8> = parts
                            .iter()
                            .flat_map(|part| {
                                let (from, to) = (part.offset, part.offset + part.len);
                                rig.storage.file[from as usize..to as usize].iter().copied()
                            })
                            .collect();
                        assert_eq!(found.len() as u64, len);
                        for (index, sector) in found.chunks(512).enumerate() {
                            let value = expected[start as usize + index];
                            assert!(sector.iter().all(|byte| *byte == value), "round {round}");
                        }
                        lane.end(ticket);
                    } else {
                        assert_eq!(rig.request(Request::Read { offset, len }), Ok(()));
                    }
                }
            }
            if random.one_in(20) {
                assert_eq!(rig.flush(), Ok(()));
            }
            if random.one_in(100) {
                assert_eq!(rig.checkpoint(), Ok(()));
            }
        }
        let stats = fast.stats();
        assert!(stats.reads + stats.overwrites >= least, "{stats:?}");
        rig.close();
    }
}

#[test]
fn whole_runs_are_found_by_one_lookup_in_the_engine() {
    let (mut rig, fast, mut lane) = rig(4096, 1 << 20);
    for block in (0..4096).step_by(128) {
        rig.write(block * BLOCK, 128 * BLOCK).expect("write");
    }
    rig.checkpoint().expect("checkpoint");
    for run in 0..8 {
        rig.request(Request::Read { offset: run * 512 * BLOCK, len: BLOCK }).expect("read");
    }
    for block in 0..4096 {
        let (ticket, parts) =
            begin(&mut lane, Access::Read, block * BLOCK, BLOCK).expect("it is known");
        assert_eq!(parts.len(), 1);
        lane.end(ticket);
    }
    assert_eq!((fast.stats().reads, fast.stats().misses), (4096, 0));
}

/// In an image of 512-byte blocks, what a guest whose partition begins at sector 63 has written is found by one
/// lookup each, wherever its neighbours are, until a part of it is discarded.
#[test]
fn cells_begin_where_requests_do() {
    const START: u64 = 63 * 512;
    let image = CreateOptions { block_size: 512, ..small_image(1024 * BLOCK) };
    let (mut rig, fast, mut lane) = rig_of(&image, 1 << 20);
    let places: Vec<u64> = (0..1000).map(|i| START + i * 7919 % 1000 * BLOCK).collect();
    for offset in &places {
        rig.write(*offset, BLOCK).expect("write");
    }
    for offset in &places {
        for (skip, len) in [(0, BLOCK), (512, 512), (BLOCK - 512, 512)] {
            let (ticket, parts) =
                begin(&mut lane, Access::Overwrite, offset + skip, len).expect("it is known");
            assert_eq!((parts.len(), parts[0].len), (1, len));
            lane.end(ticket);
        }
    }
    assert_eq!(fast.stats().misses, 0);
    let known = |lane: &mut Lane, offset| {
        begin(lane, Access::Read, offset, BLOCK).map(|(ticket, _)| lane.end(ticket)).is_some()
    };
    for sectors in 1..8 {
        // The last ones of the cell before and the first ones of this one.
        let cell = START + sectors * 10 * BLOCK;
        rig.discard(cell - BLOCK + sectors * 512, BLOCK).expect("discard");
        assert!(!known(&mut lane, cell) && !known(&mut lane, cell - BLOCK), "{sectors}");
        assert!(known(&mut lane, cell + BLOCK) && known(&mut lane, cell - 2 * BLOCK));
    }
    rig.close();
}

/// P1: a flush makes durable what passed the engine by, and only then needs a sync.
#[test]
fn p1_overwrites_make_the_image_dirty() {
    let (mut rig, _, mut lane) = rig(16, 4096);
    rig.write(0, BLOCK).expect("write");
    rig.flush().expect("flush");
    let syncs = rig.storage.syncs;
    rig.flush().expect("flush");
    assert_eq!(rig.storage.syncs, syncs, "nothing was written");
    assert!(overwrite(&mut rig, &mut lane, 512, 1024, 7));
    rig.flush().expect("flush");
    assert_eq!(rig.storage.syncs, syncs + 1);
    // Also when the thread is gone before the flush.
    assert!(overwrite(&mut rig, &mut lane, 512, 1024, 8));
    drop(lane);
    rig.flush().expect("flush");
    assert_eq!(rig.storage.syncs, syncs + 2);
}

/// P3: a place is not used again, nor punched, before the I/O that began on it has ended.
#[test]
fn p3_freed_space_waits_for_the_fast_path() {
    let (mut rig, fast, mut lane) = rig(16, 4096);
    rig.write(0, 2 * BLOCK).expect("write");
    let (ticket, parts) = begin(&mut lane, Access::Overwrite, 0, BLOCK).expect("it is written");
    let place = parts[0].offset as usize;
    rig.discard(0, 2 * BLOCK).expect("discard");
    assert!(begin(&mut lane, Access::Read, 0, 512).is_none(), "it is discarded");
    for _ in 0..20 {
        // What begins now does not make it wait longer.
        let mut other = fast.lane();
        rig.write(8 * BLOCK, BLOCK).expect("write");
        let later = begin(&mut other, Access::Read, 8 * BLOCK, BLOCK).expect("it is written");
        rig.flush().expect("flush");
        rig.tick();
        other.end(later.0);
    }
    assert_eq!(rig.storage.file[place], 0xab, "punched while it is written to");
    let (later, _) = begin(&mut lane, Access::Read, 8 * BLOCK, BLOCK).expect("it is written");
    rig.flush().expect("flush");
    lane.end(ticket);
    for _ in 0..4 {
        rig.flush().expect("flush");
        rig.tick();
    }
    assert_eq!(rig.storage.file[place], 0, "punched when its I/O has ended");
    lane.end(later);
    rig.close();
}

#[test]
fn a_resize_waits_for_the_fast_path() {
    let (mut rig, _, mut lane) = rig(16, 4096);
    rig.write(0, 16 * BLOCK).expect("write");
    let (ticket, parts) = begin(&mut lane, Access::Overwrite, 4 * BLOCK, BLOCK).expect("known");
    let size = 4 * BLOCK + 512;
    let resize = rig.submit(Request::Resize { size });
    for _ in 0..3 {
        rig.tick();
    }
    assert_eq!(rig.outcome(resize), None);
    assert!(begin(&mut lane, Access::Read, 0, BLOCK).is_none(), "held back with the others");
    let place = parts[0].offset as usize;
    rig.storage.file[place..place + BLOCK as usize].fill(9);
    lane.end(ticket);
    assert_eq!(rig.finish(resize), Ok(()));
    assert_eq!(rig.disk.info().virtual_size, size);
    // The cut block is not shown, neither now nor with what it held when the disk grows again.
    rig.request(Request::Read { offset: 4 * BLOCK, len: 512 }).expect("read");
    assert!(begin(&mut lane, Access::Read, 4 * BLOCK, BLOCK).is_none());
    rig.request(Request::Resize { size: 16 * BLOCK }).expect("grow");
    rig.request(Request::Read { offset: 4 * BLOCK, len: BLOCK }).expect("read");
    let (ticket, parts) = begin(&mut lane, Access::Read, 4 * BLOCK, BLOCK).expect("whole again");
    let place = parts[0].offset as usize;
    assert!(rig.storage.file[place..place + 512].iter().all(|byte| *byte == 9));
    assert!(rig.storage.file[place + 512..place + BLOCK as usize].iter().all(|byte| *byte == 0));
    lane.end(ticket);
    rig.close();
}

/// P5: nothing is overwritten after a failed sync.
#[test]
fn p5_after_a_failed_sync_only_reads_pass() {
    let (mut rig, _, mut lane) = rig(16, 4096);
    rig.write(0, BLOCK).expect("write");
    rig.storage.set_hook(|op| if *op == Op::Sync { Fate::Fail(EIO) } else { Fate::Proceed });
    // The engine may have synced the first one, to open a window.
    rig.write(0, BLOCK).expect("overwrite");
    rig.flush().expect_err("the sync fails");
    assert!(begin(&mut lane, Access::Overwrite, 0, BLOCK).is_none());
    let (ticket, _) = begin(&mut lane, Access::Read, 0, BLOCK).expect("reads go on");
    lane.end(ticket);
}

#[test]
fn closing_ends_the_fast_path() {
    let (mut rig, fast, mut lane) = rig(16, 4096);
    rig.write(0, BLOCK).expect("write");
    let mut other = Rig::new(&small_image(16 * BLOCK), window(128));
    other.disk.share(&fast).expect_err("one engine at a time");
    let (ticket, _) = begin(&mut lane, Access::Overwrite, 0, BLOCK).expect("it is written");
    rig.disk.close(&mut rig.storage).expect_err("I/O is under way");
    lane.end(ticket);
    rig.disk.close(&mut rig.storage).expect("nothing is under way");
    assert!(begin(&mut lane, Access::Read, 0, BLOCK).is_none());
    other.disk.share(&fast).expect("the first is gone");
    assert!(begin(&mut lane, Access::Read, 0, BLOCK).is_none(), "another image");
    other.write(0, BLOCK).expect("write");
    let (ticket, _) = begin(&mut lane, Access::Read, 0, BLOCK).expect("the other image's");
    lane.end(ticket);
}

#[test]
fn coarse_hosts_and_readers_only_read() {
    let storage = common::Memory { alignment: 4096, ..Default::default() };
    let mut rig = Rig::on(storage, &small_image(16 * BLOCK), window(128));
    let fast = Fast::new(4096);
    rig.disk.share(&fast).expect("share");
    let mut lane = fast.lane();
    rig.write(0, BLOCK).expect("write");
    assert!(begin(&mut lane, Access::Overwrite, 0, BLOCK).is_none());
    let (ticket, _) = begin(&mut lane, Access::Read, 512, 512).expect("reads do");
    lane.end(ticket);
    let storage = rig.close();
    let options = exd_image::OpenOptions { read_only: true, ..Default::default() };
    let mut rig = Rig::open(storage, options).expect("open");
    rig.disk.share(&fast).expect("share");
    rig.request(Request::Read { offset: 0, len: BLOCK }).expect("read");
    assert!(begin(&mut lane, Access::Overwrite, 0, BLOCK).is_none());
    let (ticket, _) = begin(&mut lane, Access::Read, 0, BLOCK).expect("reads do");
    lane.end(ticket);
}
