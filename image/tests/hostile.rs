//! Images that lie about themselves, every checksum correct: an error or a clean result, never a panic
//! and never a request that does not end (P6, P8). What `check` can see, it must say.

mod common;

use common::{Memory, Outcome, Rig, small_image, window};
use exd_format::{SpaceKind, SpaceList, SpaceRange, Superblock};
use exd_image::check::check;
use exd_image::{ErrorKind, OpenOptions, Request, SECTOR};

const SIZE: u64 = 64 << 20;
/// The largest counter that the format allows.
const COUNTER_MAX: u64 = 1 << 62;

/// A closed image, and the parts of it that are to be forged.
struct Forgery {
    storage: Memory,
    superblock: Superblock,
    list: SpaceList,
}

impl Forgery {
    /// Of an image with so many extents.
    fn new(extents: u64) -> Forgery {
        let mut rig = Rig::new(&small_image(SIZE), window(1024));
        rig.scatter(extents);
        let storage = rig.close();
        let slot = |index: usize| {
            let at = Superblock::slot_address(index) as usize;
            Superblock::decode(&storage.file[at..at + 4096], index, None).expect("a superblock")
        };
        let superblock = slot(0);
        assert_eq!(superblock, slot(1));
        let area = superblock.space_list;
        let bytes = &storage.file[area.address as usize..(area.address + area.length) as usize];
        let list = SpaceList::decode(bytes, &area, &superblock.geometry()).expect("a list");
        Forgery { storage, superblock, list }
    }

    fn of_superblock(extents: u64, forge: impl FnOnce(&mut Superblock)) -> Memory {
        let mut forgery = Forgery::new(extents);
        forge(&mut forgery.superblock);
        forgery.store()
    }

    /// Replaces what the list says of some sectors.
    fn claim(&mut self, start: u64, sectors: u64, kind: SpaceKind) {
        let end = start + sectors;
        self.list.ranges.retain(|range| range.start + range.sectors < start || range.start > end);
        self.list.ranges.push(SpaceRange { start, sectors, kind });
        self.list.ranges.sort_by_key(|range| range.start);
    }

    /// The image with the forged parts.
    fn store(mut self) -> Memory {
        let area = self.superblock.space_list;
        let bytes = self.list.encode(Some(area.length));
        let at = area.address as usize;
        self.storage.file[at..at + bytes.len()].copy_from_slice(&bytes);
        self.superblock.space_list = self.list.pointer(&bytes);
        for slot in 0..2 {
            let at = Superblock::slot_address(slot) as usize;
            let bytes = self.superblock.encode(slot);
            self.storage.file[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        self.storage
    }
}

/// Does to an image what may break on it: each request must end, however. Says how the last checkpoint
/// ended, or `None` if the image is refused as damaged.
fn attack(storage: Memory) -> Option<Outcome> {
    let mut rig = match Rig::open(storage, window(1024)) {
        Ok(rig) => rig,
        Err(error) => {
            assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
            return None;
        }
    };
    for i in 0..50 {
        let _ = rig.write((i + 3000) * 8192, 4096);
    }
    let _ = rig.request(Request::Read { offset: 0, len: 1 << 20 });
    let _ = rig.discard(0, SIZE);
    let _ = rig.flush();
    let _ = rig.checkpoint();
    for i in 0..50 {
        let _ = rig.write(i * 8192, 4096);
    }
    let outcome = rig.checkpoint();
    let _ = rig.disk.close(&mut rig.storage);
    Some(outcome)
}

/// `check` must find something.
fn assert_found(storage: &mut Memory) {
    let report = check(storage).expect("the image can be examined");
    assert!(report.corruption_count > 0, "check finds nothing");
}

/// Reading must work, whatever a writer says.
fn assert_readable(storage: Memory) {
    let options = OpenOptions { read_only: true, ..Default::default() };
    let mut rig = Rig::open(storage, options).expect("it opens read-only");
    assert_eq!(rig.request(Request::Read { offset: 0, len: 4096 }), Ok(()));
}

// --- Counters that a session cannot count on from. ---

#[test]
fn p8_generation_at_its_limit() {
    let forged = || Forgery::of_superblock(0, |sb| sb.generation = COUNTER_MAX);
    assert_eq!(attack(forged()), None);
    assert_readable(forged());
}

#[test]
fn p8_epoch_at_its_limit() {
    let forged = || Forgery::of_superblock(10, |sb| sb.epoch = COUNTER_MAX);
    assert_eq!(attack(forged()), None);
    assert_readable(forged());
}

#[test]
fn p8_sequence_at_its_limit() {
    let forged = || Forgery::of_superblock(10, |sb| sb.tail_sequence = COUNTER_MAX);
    assert_eq!(attack(forged()), None);
    assert_readable(forged());
}

#[test]
fn p8_applied_at_its_limit() {
    let forged = || Forgery::of_superblock(10, |sb| sb.applied = COUNTER_MAX);
    assert_eq!(attack(forged()), None);
    assert_readable(forged());
}

// --- Counts that are not those of the tree: `check` says so, a session copes. ---

/// Forges counts, and goes on with an image of more levels than one.
fn forged_counts(extents: u64, forge: impl Fn(&mut Superblock)) {
    let mut forged = Forgery::of_superblock(extents, &forge);
    assert_found(&mut forged);
    attack(forged);
}

#[test]
fn p6_p8_too_few_extents_counted() {
    forged_counts(400, |sb| sb.extent_count = 1);
}

/// Fewer are left than the superblock counts, but not none.
#[test]
fn p8_some_of_too_few_extents_discarded() {
    let forged = Forgery::of_superblock(400, |sb| sb.extent_count = 1);
    let mut rig = Rig::open(forged, window(1024)).expect("it opens");
    assert_eq!(rig.discard(0, 1 << 20), Ok(()));
    let _ = rig.checkpoint();
    let _ = rig.disk.close(&mut rig.storage);
}

#[test]
fn p6_p8_too_many_extents_counted() {
    forged_counts(400, |sb| sb.extent_count = u64::MAX);
}

#[test]
fn p6_p8_too_few_nodes_counted() {
    forged_counts(1000, |sb| sb.node_count = u64::from(sb.root.level) + 1);
}

#[test]
fn p6_p8_too_many_nodes_counted() {
    forged_counts(400, |sb| sb.node_count = u64::MAX);
}

// --- Space that is not what it is said to be. ---

#[test]
fn p8_end_of_used_space_far_away() {
    attack(Forgery::of_superblock(10, |sb| sb.data_end = 1 << 57));
}

#[test]
fn p6_p8_journal_said_to_be_open_space() {
    let mut forgery = Forgery::new(10);
    let ring = forgery.superblock.segments[0].offset / SECTOR;
    forgery.claim(ring, 64, SpaceKind::Open);
    let mut forged = forgery.store();
    assert_found(&mut forged);
    assert_eq!(attack(forged), None);
}

#[test]
fn p6_p8_root_said_to_be_open_space() {
    let mut forgery = Forgery::new(10);
    let root = forgery.superblock.root.address / SECTOR;
    forgery.claim(root, 8, SpaceKind::Open);
    let mut forged = forgery.store();
    assert_found(&mut forged);
    assert_eq!(attack(forged), None);
}

#[test]
fn p6_p8_space_list_said_to_be_open_space() {
    let mut forgery = Forgery::new(10);
    let list = forgery.superblock.space_list;
    forgery.claim(list.address / SECTOR, list.length / SECTOR, SpaceKind::Open);
    let mut forged = forgery.store();
    assert_found(&mut forged);
    assert_eq!(attack(forged), None);
}

/// A writer cannot know without reading the tree; `check` must.
#[test]
fn p6_p8_extents_said_to_be_free_and_zero() {
    let mut forgery = Forgery::new(10);
    let end = forgery.superblock.data_end / SECTOR;
    forgery.claim(end - 80, 40, SpaceKind::Zero);
    let mut forged = forgery.store();
    assert_found(&mut forged);
    attack(forged);
}

#[test]
fn p6_p8_everything_behind_the_list_said_to_be_free_and_zero() {
    let mut forgery = Forgery::new(10);
    let open = forgery.list.ranges.iter().filter(|range| range.kind == SpaceKind::Open);
    let start = open.map(|range| range.start + range.sectors).max().expect("a reserve");
    let end = forgery.superblock.data_end / SECTOR;
    forgery.list.ranges.retain(|range| range.kind == SpaceKind::Open);
    forgery.list.ranges.push(SpaceRange { start, sectors: end - start, kind: SpaceKind::Zero });
    let mut forged = forgery.store();
    assert_found(&mut forged);
    attack(forged);
}

/// P3: free space that is said to be zero and is not would show through.
#[test]
fn p3_p6_free_space_that_is_not_zero() {
    let mut forgery = Forgery::new(10);
    let end = forgery.superblock.data_end;
    forgery.superblock.data_end = end + (1 << 16);
    forgery.storage.file.resize((end + (1 << 16)) as usize, 0);
    forgery.claim(end / SECTOR, (1 << 16) / SECTOR, SpaceKind::Zero);
    let mut forged = forgery.store();
    let report = check(&mut forged).expect("the image can be examined");
    assert!(report.is_clean(), "{report:?}");
    forged.file[end as usize + 5000] = 1;
    assert_found(&mut forged);
}
