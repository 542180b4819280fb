//! P4: open space in pieces too small for anything must not keep an image from being opened, closed and
//! opened again.

mod common;

use common::{EIO, Fate, Memory, Random, Rig, check_killed, small_image};
use exd_format::{SUPERBLOCK_SIZE, SpaceKind, SpaceList, Superblock};
use exd_image::{CreateOptions, OpenOptions, Request, ZeroAhead};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

fn options(random: &mut Random) -> OpenOptions {
    OpenOptions {
        zero_ahead: random.pick(&[ZeroAhead::Off, ZeroAhead::Off, ZeroAhead::Zero]),
        zero_ahead_bytes: MIB,
        window_bytes: random.pick(&[256 << 10, MIB, 8 * MIB]),
        overlay_max: random.pick(&[16, 256, 8192]),
        clear_up_nodes: random.pick(&[0, 1, 4]),
        log_slots: random.pick(&[128, 1024]),
        ..Default::default()
    }
}

/// Writes of 1 to 40 sectors at any sector from 63 on: each place is aligned to its data, and what lies
/// between two places is too small for a block. Discards leave single blocks.
fn fragment(rig: &mut Rig, random: &mut Random, size: u64, writes: u64) {
    for _ in 0..writes {
        let len = (1 + random.below(40)) * SECTOR;
        let offset = (63 + random.below((size - len) / SECTOR - 63)) * SECTOR;
        let request = match random.below(8) {
            0 => Request::Discard { offset, len },
            _ => Request::Write { offset, len, durable: false },
        };
        rig.submit(request);
        if random.one_in(16) {
            rig.run();
        }
        if random.one_in(64) {
            assert_eq!(rig.flush(), Ok(()));
        }
    }
    rig.run();
}

/// The newest superblock and its list.
fn read_list(file: &[u8]) -> (Superblock, SpaceList) {
    let slots = [0, 1].map(|slot| {
        let at = Superblock::slot_address(slot) as usize;
        Superblock::decode(&file[at..at + SUPERBLOCK_SIZE], slot, None)
    });
    let [first, second] = slots;
    let exd_format::Choice::Use { superblock, .. } = exd_format::choose(first, second) else {
        panic!("no superblock");
    };
    let pointer = superblock.space_list;
    let bytes = &file[pointer.address as usize..][..pointer.length as usize];
    let list = SpaceList::decode(bytes, &pointer, &superblock.geometry()).expect("a sound list");
    (*superblock, list)
}

/// Bytes of the longest piece of open space that metadata could be written to.
fn longest_run(list: &SpaceList) -> u64 {
    let open = list.ranges.iter().filter(|range| range.kind == SpaceKind::Open);
    let runs = open.map(|range| {
        let start = range.start.next_multiple_of(8);
        ((range.start + range.sectors) / 8 * 8).saturating_sub(start) * SECTOR
    });
    runs.max().unwrap_or(0)
}

/// Each superblock leaves a run for another list: recovery needs it when records show much more to be
/// free than the list did.
fn assert_run_is_left(storage: &Memory, when: &str) {
    let (superblock, list) = read_list(&storage.file);
    let (run, length) = (longest_run(&list), superblock.space_list.length);
    assert!(run >= length, "{when}: a list of {length} bytes, a run of {run}");
}

/// What versions before left when they closed an image whose open space was fragmented: no piece of it is
/// long enough for a list, or for anything.
fn take_all_runs_away(storage: &mut Memory) {
    let (superblock, mut list) = read_list(&storage.file);
    for range in &mut list.ranges {
        if range.kind == SpaceKind::Open && range.sectors >= 8 {
            range.kind = SpaceKind::Zero;
            let bytes = range.start * SECTOR..(range.start + range.sectors) * SECTOR;
            let end = bytes.end.min(storage.file.len() as u64);
            storage.file[bytes.start as usize..end.max(bytes.start) as usize].fill(0);
        }
    }
    let length = superblock.space_list.length;
    let bytes = list.encode(Some(length));
    storage.file[list.address as usize..][..bytes.len()].copy_from_slice(&bytes);
    let superblock = Superblock { space_list: list.pointer(&bytes), ..superblock };
    for slot in 0..2 {
        let at = Superblock::slot_address(slot) as usize;
        storage.file[at..at + SUPERBLOCK_SIZE].copy_from_slice(&superblock.encode(slot));
    }
    let report = exd_image::check::check(storage).expect("the image can be examined");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn p4_fragmented_open_space_leaves_room_to_begin() {
    for seed in 0..16 {
        let random = &mut Random::new(seed);
        // The larger the disk, the more nodes the last checkpoint has to find room for.
        let (size, writes) = random.pick(&[(4 * MIB, 1000), (16 * MIB, 1500), (64 * MIB, 2500)]);
        let journal_bytes = random.pick(&[64 << 10, 256 << 10, MIB]);
        let image = CreateOptions { journal_bytes, ..small_image(size) };
        let mut rig = Rig::new(&image, options(random));
        for cycle in 0..12 {
            fragment(&mut rig, random, size, writes);
            let storage = if random.one_in(3) { rig.kill() } else { rig.close() };
            assert_run_is_left(&storage, &format!("seed {seed}, cycle {cycle}"));
            rig = Rig::open(storage, options(random))
                .unwrap_or_else(|error| panic!("seed {seed}, cycle {cycle}: {error}"));
        }
        rig.close();
    }
}

/// Opening and closing alone neither lengthens the file nor takes more superblocks than it must.
#[test]
fn p4_idle_sessions_leave_a_fragmented_image_as_it_is() {
    for seed in 0..8 {
        let random = &mut Random::new(seed);
        let options = OpenOptions { window_bytes: MIB, ..Default::default() };
        let mut rig = Rig::new(&small_image(16 * MIB), options.clone());
        fragment(&mut rig, random, 16 * MIB, 4000);
        let mut rig = Rig::open(rig.close(), options.clone()).expect("open");
        let (mut end, mut generation) = (0, rig.disk.info().generation);
        for cycle in 0..6 {
            let storage = rig.close();
            if cycle == 1 {
                end = storage.file.len();
            }
            assert!(cycle < 1 || storage.file.len() <= end, "seed {seed}, cycle {cycle}: it grew");
            rig = Rig::open(storage, options.clone()).expect("open");
            let now = rig.disk.info().generation;
            assert!(
                now - generation <= 3,
                "seed {seed}, cycle {cycle}: {} commits",
                now - generation
            );
            generation = now;
        }
    }
}

/// Opens an image on a storage that dies before each operation in turn, and what is left of each again.
fn die_while_opening(storage: &Memory, options: &OpenOptions, what: &str) {
    for operations in 0u32.. {
        let mut dying = storage.killed();
        let mut left = operations;
        dying.set_hook(move |_| {
            let dead = left == 0;
            left = left.saturating_sub(1);
            if dead { Fate::Fail(EIO) } else { Fate::Proceed }
        });
        let opened = exd_image::Disk::open(&mut dying, options.clone());
        let report = check_killed(&dying);
        assert_eq!(report.corruption_count, 0, "{what}, after {operations}: {report:?}");
        let again = Rig::open(dying.killed(), options.clone());
        again.unwrap_or_else(|e| panic!("{what}, after {operations}: {e}")).close();
        if opened.is_ok() {
            assert!(operations > 5, "{what}: it died nowhere");
            return;
        }
    }
}

/// Opening writes only where a crash is harmless.
#[test]
fn p4_a_death_while_a_fragmented_image_is_opened() {
    for seed in 0..4 {
        let random = &mut Random::new(seed);
        let options = OpenOptions { window_bytes: MIB, ..Default::default() };
        let size = 4 * MIB;
        let mut rig = Rig::new(&small_image(size), options.clone());
        fragment(&mut rig, random, size, 1200);
        assert_eq!(rig.discard(MIB / 2, size / 2), Ok(()));
        let storage = if seed % 2 == 0 { rig.close() } else { rig.kill() };
        die_while_opening(&storage, &options, &format!("seed {seed}"));
    }
}

/// A cleanly closed image was "full": it had no run for a list, and opening wanted one for a list that
/// shows more room.
#[test]
fn p4_an_image_without_any_run_of_open_space_opens() {
    // All data is aligned on the host, at the price of gaps.
    let options = OpenOptions { window_bytes: MIB, zero_ahead_write_max: 0, ..Default::default() };
    for (seed, size) in [(0, MIB), (1, 4 * MIB), (2, 16 * MIB)] {
        let mut rig = Rig::new(&small_image(size), options.clone());
        fragment(&mut rig, &mut Random::new(seed), size, 1200);
        let mut storage = rig.close();
        take_all_runs_away(&mut storage);
        let (_, list) = read_list(&storage.file);
        assert!(longest_run(&list) == 0 && list.ranges.len() > 100, "it is fragmented");
        die_while_opening(&storage, &options, &format!("{size} bytes"));
        let storage = Rig::open(storage, options.clone()).expect("it opens").close();
        assert_run_is_left(&storage, "closed again");
    }
}

/// The longer the list, the longer the run: more than what closing keeps at least.
#[test]
fn p4_a_long_list_leaves_room_for_the_next() {
    /// What is discarded at a time, and a block that stays.
    const PIECE: u64 = 4096 + SECTOR;
    let image = CreateOptions { block_size: 512, journal_bytes: MIB, ..small_image(128 * MIB) };
    for seed in 0..4 {
        let mut random = Random::new(seed);
        let window_bytes = random.pick(&[256 << 10, MIB, 64 * MIB]);
        let options = OpenOptions { window_bytes, ..Default::default() };
        let mut rig = Rig::new(&image, options.clone());
        for i in 0..128 {
            assert_eq!(rig.write(i * MIB, MIB), Ok(()));
        }
        for part in 0..4 {
            for i in 0..6_000 {
                assert_eq!(rig.discard((part * 6_000 + i) * PIECE, 4096), Ok(()));
            }
            let when = format!("seed {seed}, part {part}");
            let storage = if random.one_in(2) {
                assert_eq!(rig.checkpoint(), Ok(()));
                rig.kill()
            } else {
                rig.close()
            };
            assert_run_is_left(&storage, &when);
            rig = Rig::open(storage, options.clone()).unwrap_or_else(|e| panic!("{when}: {e}"));
            assert!(rig.disk.info().extents >= (part + 1) * 6_000, "{when}: it is fragmented");
        }
        rig.close();
    }
}

/// P4: a device that has been full, with most of it discarded again in pieces.
#[test]
fn p4_a_full_device_has_room_for_metadata_after_discards() {
    for seed in 0..3 {
        let random = &mut Random::new(seed);
        let mut device = Memory { fixed_length: true, ..Default::default() };
        device.file = vec![0; (24 * MIB) as usize];
        let options = OpenOptions { window_bytes: MIB, ..Default::default() };
        let image = CreateOptions { block_size: 512, ..small_image(48 * MIB) };
        let mut rig = Rig::on(device, &image, options.clone());
        for cycle in 0..4 {
            let when = format!("seed {seed}, cycle {cycle}");
            let mut full = 0;
            while full < 4 {
                let len = (1 + random.below(200)) * SECTOR;
                let offset = random.below((48 * MIB - len) / SECTOR) * SECTOR;
                full += u32::from(rig.write(offset, len).is_err());
            }
            for _ in 0..3000 {
                let offset = random.below(48 * MIB / SECTOR - 8) * SECTOR;
                assert_eq!(rig.discard(offset, 4096), Ok(()), "{when}");
            }
            assert_eq!(rig.discard(cycle * 2 * MIB, 2 * MIB), Ok(()), "{when}");
            assert_eq!(rig.flush(), Ok(()), "{when}");
            assert_eq!(rig.checkpoint(), Ok(()), "{when}");
            assert_eq!(rig.write(cycle * 2 * MIB, 64 << 10), Ok(()), "{when}");
            let storage = if random.one_in(2) { rig.kill() } else { rig.close() };
            rig = Rig::open(storage, options.clone()).unwrap_or_else(|e| panic!("{when}: {e}"));
        }
        rig.close();
    }
}

/// P4, P8: sixteen writers fill a device, nearly all of it, whatever each of them or the pool had put aside. Then
/// requests fail and none waits for ever; what is discarded can be written again.
#[test]
fn p4_writers_in_turns_fill_a_small_device() {
    const STREAMS: u64 = 16;
    for (seed, block_size, len) in
        [(1, 512, 64 << 10), (2, 4096, 64 << 10), (3, 512, 4096), (4, 4096, 4096), (5, 512, 20480)]
    {
        let mut device = Memory { fixed_length: true, ..Default::default() };
        device.file = vec![0; (12 * MIB) as usize];
        let image = CreateOptions { block_size, ..small_image(32 * MIB) };
        let zero_ahead = if seed == 5 { ZeroAhead::Off } else { ZeroAhead::Zero };
        let options = OpenOptions { zero_ahead, ..options(&mut Random::new(seed)) };
        let mut rig = Rig::on(device, &image, options);
        let each = 2 * MIB - 64 * SECTOR;
        for cycle in 0..3 {
            let mut failed = 0;
            for step in 0..each / len {
                let ids: Vec<_> = (0..STREAMS)
                    .map(|stream| stream * 2 * MIB + 63 * SECTOR + step * len)
                    .map(|offset| rig.submit(Request::Write { offset, len, durable: false }))
                    .collect();
                rig.run();
                for id in ids {
                    let outcome = rig.outcome(id).expect("it ends");
                    failed += u64::from(outcome.is_err());
                }
            }
            let all = STREAMS * (each / len);
            let written = (all - failed) * len;
            assert!((10 * MIB..12 * MIB).contains(&written), "{written} bytes of 12 MiB");
            assert_eq!(rig.discard(0, 32 * MIB), Ok(()));
            assert_eq!(rig.flush(), Ok(()), "cycle {cycle}");
            assert_eq!(rig.checkpoint(), Ok(()), "cycle {cycle}");
            assert_eq!(rig.write(63 * SECTOR, MIB), Ok(()), "cycle {cycle}");
        }
        rig.close();
    }
}

/// P4: closing leaves room for lists to come, and that room has its place on the host: a session begins
/// even if the host got full meanwhile.
#[test]
fn p4_closing_leaves_room_for_a_session_on_a_full_host() {
    const PAGES: Option<u64> = Some(1 << 20);
    // One list to begin with, another for the place of the completion log, and one more.
    const LISTS: u64 = 3;
    for seed in 0..12 {
        let random = &mut Random::new(seed);
        let (size, writes) = random.pick(&[(4 * MIB, 1000), (16 * MIB, 1500), (64 * MIB, 2500)]);
        let image = CreateOptions { block_size: random.pick(&[512, 4096]), ..small_image(size) };
        // When the ring gets short again, what it leaves is a hole: no room on a full host.
        let storage = Memory { pages_left: PAGES, ..Default::default() };
        let mut rig = Rig::on(storage, &image, options(random));
        for cycle in 0..4 {
            let when = format!("seed {seed}, cycle {cycle}");
            fragment(&mut rig, random, size, writes);
            let mut storage = rig.close();
            let (superblock, list) = read_list(&storage.file);
            let (run, length) = (longest_run(&list), superblock.space_list.length);
            assert!(run >= LISTS * length, "{when}: a list of {length} bytes, a run of {run}");
            storage.pages_left = Some(0);
            rig = Rig::open(storage, options(random)).unwrap_or_else(|e| panic!("{when}: {e}"));
            rig.storage.pages_left = PAGES;
        }
        rig.close();
    }
}
