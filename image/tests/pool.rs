//! Space prepared ahead of small first writes: where blocks go, how much is held, what is given back.

mod common;

use common::{Fate, Memory, Rig, check_killed, small_image};
use exd_image::{Op, OpenOptions, Segment, ZeroAhead};
use std::cell::RefCell;
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn options() -> OpenOptions {
    OpenOptions {
        window_bytes: 16 * MIB,
        zero_ahead: ZeroAhead::Zero,
        zero_ahead_bytes: 4 * MIB,
        zero_ahead_write_max: 32 << 10,
        zero_ahead_burst: u64::MAX,
        zero_ahead_idle_ms: 2000,
        // The reserve for a checkpoint of more would hide what the pool takes.
        overlay_max: 8192,
        ..Default::default()
    }
}

/// A host that counts the pages it has given.
fn host() -> Memory {
    Memory { pages_left: Some(1 << 40), ..Default::default() }
}

type Writes = Rc<RefCell<Vec<(u64, u64)>>>;

/// Notes place and length of every write that carries a guest's data.
fn data_writes(rig: &mut Rig) -> Writes {
    let seen = Writes::default();
    let writes = Rc::clone(&seen);
    rig.storage.set_hook(move |op| {
        if let Op::Write { offset, segments } = op
            && segments.iter().any(|segment| matches!(segment, Segment::Request { .. }))
        {
            let (mut offset, mut segments) = (*offset, segments.clone());
            Segment::trim(&mut offset, &mut segments);
            let len = segments.iter().map(Segment::len).sum();
            writes.borrow_mut().push((offset, len));
        }
        Fate::Proceed
    });
    seen
}

/// P3: at sector 63 a first write of 4 KiB is one write of 4 KiB, aligned on the host, and the places
/// follow each other.
#[test]
fn p3_misaligned_first_writes_are_aligned_on_the_host() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    let writes = data_writes(&mut rig);
    for i in 0..2000 {
        assert_eq!(rig.write(63 * 512 + i * 65536, PAGE), Ok(()));
    }
    let writes = writes.borrow();
    let late = &writes[500..];
    // Where a piece of the pool ends, a write may be cut in two.
    let aligned = late.iter().filter(|(offset, len)| offset % PAGE == 0 && *len == PAGE).count();
    assert!(aligned * 100 > late.len() * 98, "{aligned} of {} are aligned", late.len());
    let next = late.windows(2).filter(|pair| pair[1].0 == pair[0].0 + 2 * PAGE).count();
    assert!(next * 100 > late.len() * 98, "{next} of {} lie one behind the other", late.len());
    rig.close();
}

/// Blocks that follow each other on the disk lie behind each other, though others come between.
#[test]
fn streams_stay_together() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    for i in 0..2000 {
        for stream in 0..4 {
            assert_eq!(rig.write(stream * 32 * MIB + i * PAGE, PAGE), Ok(()));
        }
    }
    assert_eq!(rig.checkpoint(), Ok(()));
    let extents = rig.disk.info().extents;
    // 8000 blocks; runs of 64 KiB and then 256 KiB.
    assert!(extents < 400, "{extents} extents");
    rig.close();
}

/// Nothing is prepared for a few writes, and large ones go where nothing was written before.
#[test]
fn nothing_is_prepared_without_need() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    for i in 0..8 {
        assert_eq!(rig.write(i * MIB, PAGE), Ok(()));
    }
    assert_eq!(rig.disk.stats().zeroed_bytes, 0);
    for i in 0..100 {
        assert_eq!(rig.write((100 + i) * MIB, MIB), Ok(()));
    }
    assert_eq!(rig.disk.stats().zeroed_bytes, 0);
    rig.close();
}

/// What is held ahead is bounded, goes when it is not needed, and is gone after closing. P4: it is no leak
/// if the process dies.
#[test]
fn p4_what_is_held_is_bounded_and_given_back() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    let before = rig.storage.pages.len() as u64;
    let blocks = 8192;
    for i in 0..blocks {
        assert_eq!(rig.write((i * 7919 % 65536) * PAGE, PAGE), Ok(()));
        let ahead = rig.disk.stats().zeroed_bytes.saturating_sub(i * PAGE);
        assert!(ahead <= 4 * MIB, "{ahead} bytes ahead");
    }
    assert!(rig.disk.stats().zeroed_bytes > 24 * MIB, "most of it went through the pool");
    assert_eq!(rig.flush(), Ok(()));
    let report = check_killed(&rig.storage);
    assert_eq!((report.corruption_count, report.leaked_bytes), (0, 0));
    let busy = rig.storage.pages.len() as u64;
    for _ in 0..20 {
        rig.tick();
    }
    let idle = rig.storage.pages.len() as u64;
    assert!(idle + 256 < busy, "{busy} pages with the pool, {idle} when it is idle");
    // The pool, and the journal, which grows.
    let room = (before + blocks) * 105 / 100 + 8 * MIB / PAGE;
    assert!(busy <= room, "{busy} pages while open");
    // After the rest it is used again.
    for i in 0..1000 {
        assert_eq!(rig.write((i * 7919 % 65536) * PAGE, PAGE), Ok(()));
    }
    let storage = rig.close();
    let closed = storage.pages.len() as u64;
    assert!(closed <= blocks * 102 / 100 + 128, "{closed} pages after closing");
}

/// A zeroing write that fails costs nothing but the head start: the space is recycled, writes go on.
#[test]
fn p3_zeroing_that_fails_is_given_up() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    rig.storage.set_hook(|op| match op {
        Op::Write { segments, .. } if matches!(segments[..], [Segment::Zero(_)]) => {
            Fate::Fail(exd_image::StorageError::NoSpace)
        }
        _ => Fate::Proceed,
    });
    for i in 0..1000 {
        assert_eq!(rig.write(i * 65536, PAGE), Ok(()));
    }
    assert_eq!(rig.disk.stats().zeroed_bytes, 0);
    rig.storage.release();
    rig.tick();
    for i in 1000..2000 {
        assert_eq!(rig.write(i * 65536, PAGE), Ok(()));
    }
    assert!(rig.disk.stats().zeroed_bytes > 0);
    rig.close();
}

/// A host too slow for zeroes and data gets the data.
#[test]
fn zeroing_that_comes_too_late_stops() {
    let mut rig = Rig::on(host(), &small_image(256 * MIB), options());
    let zeroing = |op: &Op| {
        let Op::Write { segments, .. } = op else { return false };
        matches!(segments[..], [Segment::Zero(_)])
    };
    let begun = Rc::new(RefCell::new(0));
    let count = Rc::clone(&begun);
    rig.storage.set_hook(move |op| {
        if !zeroing(op) {
            return Fate::Proceed;
        }
        *count.borrow_mut() += 1;
        Fate::Hold
    });
    for round in 0..10 {
        for i in 0..200 {
            assert_eq!(rig.write((round * 200 + i) * 65536, PAGE), Ok(()));
        }
        rig.tick();
        if round == 2 {
            // Three ticks behind: what was under way ends, and nothing new begins for two seconds.
            rig.storage.release_only(zeroing);
            rig.run();
            *begun.borrow_mut() = 0;
        }
        if round == 3 {
            assert_eq!(*begun.borrow(), 0);
        }
    }
    assert!(*begun.borrow() > 0, "it is tried again");
    rig.storage.release();
    rig.close();
}
