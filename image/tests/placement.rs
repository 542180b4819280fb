//! Where the first writes of a misaligned guest go that have no prepared space: whole blocks of the host, and
//! one behind the other.

mod common;

use common::{EIO, Fate, Rig, check_killed, small_image};
use exd_image::blocking::BufferRegistry;
use exd_image::{
    CreateOptions, Op, OpenOptions, Preallocation, Request, RequestId, Segment, ZeroAhead,
};
use std::cell::RefCell;
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const START: u64 = 63 * 512;

/// Position and length of each write of a guest's data, and how much of it is data.
type Writes = Rc<RefCell<Vec<(u64, u64, u64)>>>;

/// Notes them, and lets them wait until they are released if `hold`.
fn data_writes(rig: &mut Rig, hold: bool) -> Writes {
    let seen = Writes::default();
    let writes = Rc::clone(&seen);
    rig.storage.set_hook(move |op| {
        let Op::Write { offset, segments } = op else { return Fate::Proceed };
        let is_data = |segment: &&Segment| matches!(segment, Segment::Request { .. });
        let data: u64 = segments.iter().filter(is_data).map(Segment::len).sum();
        if data == 0 {
            return Fate::Proceed;
        }
        let (mut offset, mut segments) = (*offset, segments.clone());
        Segment::trim(&mut offset, &mut segments);
        writes.borrow_mut().push((offset, segments.iter().map(Segment::len).sum(), data));
        if hold { Fate::Hold } else { Fate::Proceed }
    });
    seen
}

fn write(offset: u64, len: u64) -> Request {
    Request::Write { offset, len, durable: false }
}

/// Submits requests, each when nothing more happens to those before.
fn submit_in_turn(rig: &mut Rig, requests: impl Iterator<Item = Request>) -> Vec<RequestId> {
    let submit = |request| {
        let id = rig.submit(request);
        rig.run();
        id
    };
    requests.map(submit).collect()
}

/// Lets everything go on that was held: these requests end well.
fn release_all(rig: &mut Rig, ids: impl IntoIterator<Item = RequestId>) {
    rig.storage.release();
    rig.run();
    for id in ids {
        assert_eq!(rig.outcome(id), Some(Ok(())));
    }
}

/// What the guest reads.
fn read(rig: &mut Rig, offset: u64, len: u64) -> Vec<u8> {
    let id = RequestId(u64::MAX);
    rig.storage.put(id, vec![0; len as usize]);
    rig.disk.submit(&mut rig.storage, id, Request::Read { offset, len });
    while let Some((token, result)) = rig.storage.step() {
        rig.disk.complete(&mut rig.storage, token, result);
    }
    assert_eq!(rig.disk.pop_finished(), Some((id, Ok(()))));
    rig.storage.take(id)
}

fn options() -> OpenOptions {
    OpenOptions { window_bytes: 64 * MIB, ..Default::default() }
}

/// P7: who goes on in the last block of a write that is under way does not wait for it, and what the two
/// write is one piece on the host that begins and ends with its blocks.
#[test]
fn p7_a_stream_at_sector_63_is_aligned_and_waits_for_nobody() {
    const LEN: u64 = 64 << 10;
    let mut rig = Rig::new(&small_image(64 * MIB), options());
    assert_eq!(rig.write(START, LEN), Ok(()));
    let writes = data_writes(&mut rig, true);
    let ids = submit_in_turn(&mut rig, (1..64).map(|i| write(START + i * LEN, LEN)));
    assert_eq!(rig.disk.stats().edge_waits, 0);
    // Of the first two the ends do not meet: that the second would go on there was not known.
    let mut pieces: Vec<_> = writes.borrow()[2..].to_vec();
    assert_eq!(pieces.len(), 2 * 62, "a head and the rest of each");
    pieces.sort_unstable();
    let (begin, end) = (pieces[0].0, pieces.last().map_or(0, |last| last.0 + last.1));
    assert_eq!((begin % PAGE, end % PAGE), (0, 0));
    assert_eq!(end - begin, 62 * LEN, "nothing but data, in one piece");
    assert!(pieces.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
    let report = check_killed(&rig.storage);
    assert_eq!((report.corruption_count, report.leaked_bytes), (0, 0));
    release_all(&mut rig, ids);
    rig.close();
}

/// A write that stands alone has its blocks of the host for itself, and fills them: nobody has to write a part
/// of one first.
#[test]
fn long_writes_fill_whole_blocks_of_the_host() {
    let mut rig = Rig::new(&small_image(256 * MIB), options());
    let writes = data_writes(&mut rig, false);
    for i in 0..100 {
        assert_eq!(rig.write(START + i * MIB, 256 << 10), Ok(()));
    }
    let mut end = 0;
    for (offset, len, data) in writes.borrow().iter() {
        assert_eq!((offset % PAGE, *len, *data), (0, (256 << 10) + 2 * PAGE, 256 << 10));
        assert!(*offset >= end, "its blocks are its own");
        end = offset + len;
    }
    rig.close();
}

fn of_sectors(virtual_size: u64) -> CreateOptions {
    CreateOptions { block_size: 512, ..small_image(virtual_size) }
}

/// With blocks of a sector, a write of whole pages owns what it writes and nothing else, wherever the guest's
/// partition begins: whole blocks of the host, not a byte of padding, and nobody waits.
#[test]
fn p7_blocks_of_a_sector_need_no_padding_at_sector_63() {
    let mut rig = Rig::new(&of_sectors(256 * MIB), options());
    let writes = data_writes(&mut rig, true);
    let requests = (0..100).map(|i| write(START + i * 37 % 100 * PAGE, PAGE));
    let ids = submit_in_turn(&mut rig, requests);
    assert_eq!(rig.disk.stats().edge_waits, 0);
    assert_eq!(writes.borrow().len(), 100);
    assert!(writes.borrow().iter().all(|(at, len, _)| at % PAGE == 0 && *len == PAGE));
    release_all(&mut rig, ids);
    rig.close();
}

/// P7: a short write takes the 4 KiB around it that nobody has, so that its neighbours are not scattered: written
/// later, they are overwrites. Until it has ended they wait for it.
#[test]
fn p7_short_writes_keep_their_neighbours_together() {
    let mut rig = Rig::new(&of_sectors(MIB + 1024), options());
    // One around which all is free; one beside a page that is written; one at the end of the disk.
    let page = 16 * PAGE;
    assert_eq!(rig.write(page + PAGE + 1536, PAGE), Ok(()));
    let before = rig.disk.stats().first_writes;
    for (at, around) in [
        (5 * 512, 0..PAGE),
        (page + PAGE + 512, page + PAGE..page + PAGE + 1536),
        (MIB + 512, MIB..MIB + 1024),
    ] {
        let writes = data_writes(&mut rig, true);
        let first = rig.submit(write(at, 512));
        rig.run();
        rig.storage.set_hook(|_| Fate::Proceed);
        assert_eq!(writes.borrow().len(), 1);
        let others: Vec<u64> = around.clone().step_by(512).filter(|other| *other != at).collect();
        let waits = rig.disk.stats().edge_waits;
        let ids: Vec<_> = others.iter().map(|other| rig.submit(write(*other, 512))).collect();
        rig.run();
        assert_eq!(rig.disk.stats().edge_waits - waits, others.len() as u64, "{at}");
        release_all(&mut rig, [first].into_iter().chain(ids));
    }
    assert_eq!(rig.disk.stats().first_writes - before, 3);
    let report = check_killed(&rig.storage);
    assert_eq!((report.corruption_count, report.leaked_bytes), (0, 0));
    assert_eq!(report.extents, 4, "{report:?}");
    rig.close();
}

/// P7: in space that is allocated and not written, small blocks are written with those that fill the host's with
/// them, which wait.
#[test]
fn p7_allocated_space_is_written_in_whole_blocks_of_the_host() {
    let preallocation = Preallocation::Metadata;
    let mut rig = Rig::new(&CreateOptions { preallocation, ..of_sectors(MIB) }, options());
    let writes = data_writes(&mut rig, true);
    let first = rig.submit(write(START, PAGE));
    rig.run();
    rig.storage.set_hook(|_| Fate::Proceed);
    assert!(matches!(writes.borrow()[..], [(at, 8192, 4096)] if at % PAGE == 0));
    let others = [write(START + PAGE, PAGE), write(START - PAGE, PAGE), write(10 * PAGE, PAGE)];
    let ids = others.map(|request| rig.submit(request));
    rig.run();
    assert_eq!(rig.disk.stats().edge_waits, 2, "in the block before, and in the block behind");
    assert_eq!(ids.map(|id| rig.outcome(id)), [None, None, Some(Ok(()))]);
    release_all(&mut rig, [first, ids[0], ids[1]]);
    let content = read(&mut rig, 0, 16 * PAGE);
    for (sector, bytes) in content.chunks(512).enumerate() {
        let written = (55..79).contains(&sector) || (80..88).contains(&sector);
        assert!(bytes.iter().all(|byte| *byte == if written { 0xab } else { 0 }), "{sector}");
    }
    rig.close();
}

/// Where the guest does not flush, small writes are padded and not prepared for; where it does, they are.
#[test]
fn space_is_prepared_for_who_flushes() {
    let options = OpenOptions { zero_ahead: ZeroAhead::Zero, zero_ahead_burst: MIB, ..options() };
    let mut rig = Rig::new(&small_image(256 * MIB), options);
    for i in 0..2000 {
        assert_eq!(rig.write(START + i * 65536, PAGE), Ok(()));
    }
    let bursts = rig.disk.stats().zeroed_bytes;
    assert!((1..8 * MIB).contains(&bursts), "{bursts} bytes of zeroes for a burst");
    let writes = data_writes(&mut rig, false);
    for i in 2000..2100 {
        assert_eq!(rig.write(START + i * 65536, PAGE), Ok(()));
    }
    let whole = |(offset, len, _): &(u64, u64, u64)| offset % PAGE == 0 && *len == 2 * PAGE;
    assert!(writes.borrow().iter().all(whole), "padded to whole blocks");
    rig.storage.set_hook(|_| Fate::Proceed);
    for i in 2100..4000 {
        assert_eq!(rig.write(START + i * 65536, PAGE), Ok(()));
        assert_eq!(rig.flush(), Ok(()));
    }
    assert!(rig.disk.stats().zeroed_bytes > bursts + 8 * MIB, "for a load that flushes");
    rig.close();
}

/// P3, P7: the block that two writes share may be given up, moved and read while the first of them is on its way;
/// the first may fail.
#[test]
fn p3_p7_the_block_a_write_has_left_belongs_to_whoever_wants_it() {
    let len = 64 << 10;
    let last = (START + 3 * len) / PAGE * PAGE;
    let rewrite = write(last, PAGE);
    let discard = Request::Discard { offset: last, len: PAGE };
    let defragment = Request::Defragment { offset: 0, len: MIB };
    for (others, fails) in [
        (vec![rewrite], false),
        (vec![discard, Request::Read { offset: last, len: PAGE }], false),
        (vec![defragment], false),
        (vec![rewrite, discard], true),
    ] {
        let mut rig = Rig::new(&small_image(64 * MIB), options());
        for i in 0..2 {
            assert_eq!(rig.write(START + i * len, len), Ok(()));
        }
        data_writes(&mut rig, true);
        let first = rig.submit(write(START + 2 * len, len));
        rig.run();
        rig.storage.set_hook(|_| Fate::Proceed);
        let ids: Vec<_> = others.iter().map(|request| rig.submit(*request)).collect();
        rig.run();
        if fails {
            rig.storage.fail_held(EIO);
        }
        rig.storage.release();
        rig.run();
        assert_eq!(rig.outcome(first).map(|outcome| outcome.is_ok()), Some(!fails), "{others:?}");
        assert!(ids.into_iter().all(|id| rig.outcome(id) == Some(Ok(()))), "{others:?}");
        // The blocks around are written again, over and over.
        for i in 0..4 {
            assert_eq!(rig.write(START + i * len, len), Ok(()));
        }
        assert_eq!(rig.flush(), Ok(()));
        let report = check_killed(&rig.storage);
        assert_eq!((report.corruption_count, report.leaked_bytes), (0, 0), "{others:?}");
        rig.close();
    }
}

/// P7: between the pieces of one write that share its last block there are zeroes of ours. What somebody writes
/// there stays.
#[test]
fn p7_what_is_written_between_two_pieces_of_a_stream_stays() {
    let sectors = |from: u64, to: u64| write(from * 512, (to - from) * 512);
    let mut rig = Rig::new(&small_image(64 * MIB), options());
    for i in 0..2 {
        assert_eq!(rig.write(START + i * (64 << 10), 64 << 10), Ok(()));
    }
    let from = 63 + 2 * 128;
    let last = 50 * 8;
    data_writes(&mut rig, true);
    // One group: the last block has data in its sectors 0 and 1, and 4 to 6.
    let pieces = [rig.submit(sectors(from, last + 2)), rig.submit(sectors(last + 4, last + 7))];
    rig.run();
    rig.storage.set_hook(|_| Fate::Proceed);
    let between = rig.submit(sectors(last + 2, last + 4));
    rig.run();
    rig.storage.release();
    rig.run();
    assert!(pieces.into_iter().all(|id| rig.outcome(id) == Some(Ok(()))));
    assert_eq!(rig.outcome(between), Some(Ok(())));
    let content = read(&mut rig, last * 512, 7 * 512);
    assert!(content.iter().all(|byte| *byte == 0xab), "nothing is lost");
    rig.close();
}

/// P7: in the block that a short write leaves nothing is on its way but its data, though the zeroes before it
/// are longer than a block: what somebody writes there stays.
#[test]
fn p7_zeroes_before_a_short_write_are_not_in_the_block_it_leaves() {
    let image = CreateOptions { block_size: 2048, ..small_image(256 * MIB) };
    let options = OpenOptions {
        zero_ahead: ZeroAhead::Zero,
        zero_ahead_bytes: 4 * MIB,
        zero_ahead_write_max: 32 << 10,
        zero_ahead_burst: u64::MAX,
        ..options()
    };
    let mut rig = Rig::new(&image, options);
    rig.storage.keep_spare = true;
    // A stream in prepared space.
    for i in 0..2000 {
        assert_eq!(rig.write(i * PAGE, PAGE), Ok(()));
    }
    let at = 2000 * PAGE;
    data_writes(&mut rig, true);
    let first = rig.submit(write(at + 6 * 512, 512));
    rig.run();
    rig.storage.set_hook(|_| Fate::Proceed);
    let before = rig.submit(write(at + 4 * 512, 1024));
    rig.run();
    rig.storage.release();
    rig.run();
    assert_eq!((rig.outcome(first), rig.outcome(before)), (Some(Ok(())), Some(Ok(()))));
    let content = read(&mut rig, at + 4 * 512, 3 * 512);
    assert!(content.iter().all(|byte| *byte == 0xab), "nothing is lost");
    rig.close();
}

/// What a page shares with a short write before it is two writes, and none behind it: only requests that are
/// short take more than they need.
#[test]
fn a_short_write_does_not_cut_the_pages_behind_it() {
    let mut rig = Rig::new(&of_sectors(256 * MIB), options());
    // A boot sector, and then its page and those behind it.
    assert_eq!(rig.write(START, 512), Ok(()));
    let writes = data_writes(&mut rig, false);
    for i in 0..100 {
        assert_eq!(rig.write(START + i * PAGE, PAGE), Ok(()));
    }
    assert_eq!(writes.borrow().len(), 101);
    rig.close();
}
