//! P2: whichever store was the last before the process died, no request is lost and none runs again after
//! its completion was shown. All deaths in all short histories are tried, and each death of the recovery
//! that follows.

use super::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

const RING: u16 = 3;
const TRACKED: u16 = 4;
const START: u16 = 65534;

/// Picks stores by their place and value.
type Kind = fn(usize, u64) -> bool;

/// A store that is kept back until so many others were made: what a wrong order comes to.
#[derive(Clone, Copy, Debug)]
struct Late {
    what: Kind,
    by: usize,
}

/// What outlives the process: the region and the guest's rings.
#[derive(Clone, Debug)]
struct World {
    region: RefCell<Vec<u8>>,
    /// The used index, and all that was ever shown.
    used: Cell<u16>,
    shown: RefCell<Vec<u16>>,
    /// Heads ever offered; each is offered again only when it was shown.
    offered: RefCell<Vec<u16>>,
    /// Stores that are still made before the process dies.
    budget: Cell<usize>,
    late: Option<Late>,
    /// Kept back: place, bytes, and stores until it is made.
    kept: RefCell<Option<(usize, Vec<u8>, usize)>>,
}

impl World {
    fn new(late: Option<Late>) -> World {
        World {
            region: RefCell::new(vec![0; HEADER + ENTRY * usize::from(TRACKED)]),
            used: Cell::new(START),
            shown: RefCell::default(),
            offered: RefCell::default(),
            budget: Cell::new(usize::MAX),
            late,
            kept: RefCell::default(),
        }
    }

    /// One store: true if the process lives to make it.
    fn lives(&self) -> bool {
        let left = self.budget.get();
        self.budget.set(left.saturating_sub(1));
        left > 0
    }

    fn is_dead(&self) -> bool {
        self.budget.get() == 0
    }

    fn store(&self, at: usize, bytes: &[u8]) {
        let mut kept = self.kept.borrow_mut();
        if kept.is_none()
            && let Some(late) = self.late
            && (late.what)(at, bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
        {
            *kept = Some((at, bytes.to_vec(), late.by));
            return;
        }
        self.make(at, bytes);
        self.release(&mut kept);
    }

    fn make(&self, at: usize, bytes: &[u8]) {
        if self.lives() {
            self.region.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn release(&self, kept: &mut Option<(usize, Vec<u8>, usize)>) {
        if let Some((_, _, left)) = kept {
            *left -= 1;
        }
        if let Some((at, bytes, 0)) = kept.clone() {
            *kept = None;
            self.make(at, &bytes);
        }
    }

    /// The store of the used index.
    fn show(&self, heads: &[u16]) -> u16 {
        let used = self.used.get().wrapping_add(heads.len() as u16);
        if self.lives() {
            self.used.set(used);
            self.shown.borrow_mut().extend(heads);
        }
        self.release(&mut self.kept.borrow_mut());
        used
    }

    /// What was offered and not shown, in the order of the offers.
    fn outstanding(&self) -> Vec<u16> {
        let mut left = self.offered.borrow().clone();
        for head in self.shown.borrow().iter() {
            let at =
                left.iter().position(|other| other == head).expect("shown once for each offer");
            left.remove(at);
        }
        left
    }
}

impl Cells for &World {
    fn u8(&self, at: usize) -> u8 {
        self.region.borrow()[at]
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(*self.region.borrow()[at..].first_chunk().expect("inside"))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.region.borrow()[at..].first_chunk().expect("inside"))
    }
    fn set_u8(&self, at: usize, value: u8) {
        self.store(at, &[value]);
    }
    fn set_u16(&self, at: usize, value: u16) {
        self.store(at, &value.to_le_bytes());
    }
    fn set_u64(&self, at: usize, value: u64) {
        self.store(at, &value.to_le_bytes());
    }
}

/// What a process does.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Step {
    /// The guest offers this head, and the process takes it.
    Take(u16),
    /// The process completes this batch.
    Complete(Vec<u16>),
}

/// Every order of every choice of at least one of the heads.
fn batches(heads: &[u16]) -> Vec<Vec<u16>> {
    let mut all = Vec::new();
    for (at, head) in heads.iter().enumerate() {
        let rest: Vec<u16> = [&heads[..at], &heads[at + 1..]].concat();
        all.push(vec![*head]);
        all.extend(batches(&rest).into_iter().map(|tail| [vec![*head], tail].concat()));
    }
    all
}

/// All histories of so many steps, one after another.
fn histories(len: usize, visit: &mut impl FnMut(&[Step])) {
    fn grow(done: &mut Vec<Step>, in_flight: &[u16], len: usize, visit: &mut impl FnMut(&[Step])) {
        if done.len() == len {
            return visit(done);
        }
        for head in (0..RING).filter(|head| !in_flight.contains(head)) {
            done.push(Step::Take(head));
            grow(done, &[in_flight, &[head]].concat(), len, visit);
            done.pop();
        }
        for batch in batches(in_flight) {
            let left: Vec<u16> =
                in_flight.iter().copied().filter(|head| !batch.contains(head)).collect();
            done.push(Step::Complete(batch));
            grow(done, &left, len, visit);
            done.pop();
        }
    }
    grow(&mut Vec::new(), &[], len, visit);
}

/// Runs a history until its end or the process's death.
fn run(world: &World, steps: &[Step], counter: u64) {
    let found = Tracker::recover(world, TRACKED, RING, world.used.get());
    let (mut tracker, heads) = found.expect("an unused region is usable");
    assert!(heads.is_empty());
    tracker.counter = counter;
    for step in steps {
        if world.is_dead() {
            return;
        }
        match step {
            Step::Take(head) => {
                world.offered.borrow_mut().push(*head);
                tracker.take(*head);
            }
            Step::Complete(batch) => {
                let show = || Ok::<u16, ()>(world.show(batch));
                tracker.complete(batch.iter().copied(), show).expect("shown");
            }
        }
    }
}

/// What a new process finds: the heads it submits again and those it takes from the available ring.
fn recovered(world: &World) -> Result<(Vec<u16>, Vec<u16>), Unusable> {
    let (_, again) = Tracker::recover(world, TRACKED, RING, world.used.get())?;
    let next = world.used.get().wrapping_add(again.len() as u16);
    let taken = usize::from(next.wrapping_sub(START));
    let offered = world.offered.borrow();
    let fresh = offered.get(taken..).unwrap_or(&[0xdead]);
    Ok((again, fresh.to_vec()))
}

/// Nothing is lost, nothing is there twice, and what runs again does so in the order it was taken.
fn is_right(world: &World) -> bool {
    recovered(world).is_ok_and(|(again, fresh)| [again, fresh].concat() == world.outstanding())
}

/// Tries every death of a history, and every death of the recovery after it. False if one goes wrong.
fn survives(steps: &[Step], late: Option<Late>, counter: u64) -> bool {
    for budget in 0.. {
        let mut world = World::new(late);
        world.budget.set(budget);
        run(&world, steps, counter);
        let ended = !world.is_dead();
        world.kept.take();
        world.late = None;
        for second in 0.. {
            let world = world.clone();
            world.budget.set(second);
            let _ = recovered(&world);
            let ended = !world.is_dead();
            world.budget.set(usize::MAX);
            if !is_right(&world) || !is_right(&world) {
                return false;
            }
            if ended {
                break;
            }
        }
        if ended {
            return true;
        }
    }
    true
}

#[test]
fn no_death_loses_or_repeats_a_request() {
    let mut count = 0;
    for len in 0..=5 {
        histories(len, &mut |steps| {
            count += 1;
            // The counter wraps in the middle of each.
            assert!(survives(steps, None, u64::MAX - 1), "{steps:?}");
        });
    }
    assert_eq!(count, 928, "histories of up to 5 steps");
}

/// The test above can fail: stores in another order lose or repeat requests.
#[test]
fn every_wrong_order_is_noticed() {
    fn is_mark(at: usize) -> bool {
        at >= HEADER && (at - HEADER).is_multiple_of(ENTRY)
    }
    let wrong: [(&str, Kind, usize); 6] = [
        ("marked after the next one was", |at, value| is_mark(at) && value == 1, 2),
        ("counted after it was marked", |at, _| at >= HEADER && (at - HEADER) % ENTRY == 8, 1),
        ("linked after it was shown", |at, _| at >= HEADER && (at - HEADER) % ENTRY == 6, 2),
        ("named last after it was shown", |at, _| at == LAST_HEAD, 1),
        ("cleared after that was noted", |at, value| is_mark(at) && value == 0, 1),
        ("noted after the next was linked", |at, _| at == USED_INDEX, 3),
    ];
    for (name, what, by) in wrong {
        let mut noticed = false;
        for len in 0..=5 {
            histories(len, &mut |steps| {
                noticed = noticed || !survives(steps, Some(Late { what, by }), 7);
            });
        }
        assert!(noticed, "{name}");
    }
}

fn fresh(world: &World, used: u16) -> Tracker<&World> {
    Tracker::recover(world, TRACKED, RING, used).expect("usable").0
}

/// A region that is new to a ring that is not: nothing is cleared that is in flight.
#[test]
fn a_new_region_begins_with_the_rings_index() {
    let world = World::new(None);
    let mut tracker = fresh(&world, 500);
    tracker.take(1);
    let (_, heads) = Tracker::recover(&world, TRACKED, RING, 500).expect("usable");
    assert_eq!(heads, [1]);
}

/// A driver that begins its ring anew, with nothing in flight.
#[test]
fn a_ring_may_begin_anew() {
    let world = World::new(None);
    let mut tracker = fresh(&world, 500);
    tracker.take(1);
    tracker.complete([1].into_iter(), || Ok::<u16, ()>(501)).expect("shown");
    let (mut tracker, heads) = Tracker::recover(&world, TRACKED, RING, 0).expect("usable");
    assert!(heads.is_empty());
    tracker.take(2);
    let (_, heads) = Tracker::recover(&world, TRACKED, RING, 0).expect("usable");
    assert_eq!(heads, [2]);
}

#[test]
fn every_descriptor_in_flight() {
    let world = World::new(None);
    let mut tracker = fresh(&world, 0);
    tracker.counter = u64::MAX - 1;
    for head in [2, 0, 1] {
        tracker.take(head);
    }
    let (tracker, heads) = Tracker::recover(&world, TRACKED, RING, 0).expect("usable");
    assert_eq!((heads.as_slice(), tracker.counter), (&[2, 0, 1][..], 1));
}

/// P8: the front-end writes what it likes. It gets an error or heads of the ring, each once.
#[test]
fn hostile_content_is_refused() {
    let world = World::new(None);
    let mut tracker = fresh(&world, 7);
    tracker.take(0);
    tracker.take(2);
    let found = |change: &dyn Fn(&&World)| {
        let world = world.clone();
        change(&&world);
        let before = world.region.borrow().clone();
        let found = Tracker::recover(&world, TRACKED, RING, 7).map(|(_, heads)| heads);
        if found.is_err() {
            assert_eq!(before, *world.region.borrow(), "nothing was changed");
        }
        found
    };
    assert_eq!(found(&|_| {}), Ok(vec![0, 2]));
    assert_eq!(found(&|cells| cells.set_u16(VERSION, 2)), Err(Unusable::Version(2)));
    assert_eq!(found(&|cells| cells.set_u64(FEATURES, 1)), Err(Unusable::Features(1)));
    assert_eq!(found(&|cells| cells.set_u16(ENTRIES, 128)), Err(Unusable::Entries(128)));
    assert_eq!(
        found(&|cells| cells.set_u16(USED_INDEX, 2)),
        Err(Unusable::UsedIndex { noted: 2, ring: 7 })
    );
    assert_eq!(found(&|cells| cells.set_u8(mark_of(3), 1)), Err(Unusable::Head(3)));
    // A list of one, that leaves the table; a list of two that is a circle.
    let leaves = |cells: &&World| {
        cells.set_u16(USED_INDEX, 6);
        cells.set_u16(LAST_HEAD, TRACKED);
    };
    assert_eq!(found(&leaves), Err(Unusable::LastBatch));
    let circle = |cells: &&World| {
        cells.set_u16(USED_INDEX, 5);
        cells.set_u16(LAST_HEAD, 2);
        cells.set_u16(next_of(2), 2);
    };
    assert_eq!(found(&circle), Err(Unusable::LastBatch));
    assert_eq!(
        Tracker::recover(&world, TRACKED, 8, 7).map(|_| ()),
        Err(Unusable::RingSize(8)),
        "the region is too small for the ring"
    );
    // Whatever the counters are, the order is one.
    for counters in [[0, u64::MAX / 2 + 1], [u64::MAX, 0], [5, 5], [1 << 63, 0]] {
        let heads = found(&|cells| {
            cells.set_u64(counter_of(0), counters[0]);
            cells.set_u64(counter_of(2), counters[1]);
        });
        let heads: BTreeSet<u16> = heads.expect("usable").into_iter().collect();
        assert_eq!(heads, BTreeSet::from([0, 2]));
    }
}

/// The layout is the document's, in a mapping that another process has.
#[test]
fn the_region_is_laid_out_as_documented() {
    let layout = Layout { queues: 2, entries: 128 };
    // As QEMU's own library spaces it, and our note behind.
    assert_eq!((layout.stride(), layout.bytes()), (2112, 2 * 2112 + TRAILER));
    let (region, fd) = Region::create(layout).expect("made");
    let inflight = Inflight::default();
    inflight.set(Some(Arc::new(region)));
    let used = UsedRing::default();
    let attached = inflight.attach(1, 128, used).expect("usable").expect("there is a region");
    let mut tracker = attached.0;
    tracker.take(5);
    tracker.take(100);
    tracker.complete([5].into_iter(), || Ok::<u16, ()>(1)).expect("shown");
    let mut bytes = vec![0; layout.bytes()];
    let file = std::fs::File::from(fd.try_clone().expect("dup"));
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("read");
    let queue = &bytes[2112..];
    assert!(bytes[..2112].iter().all(|byte| *byte == 0));
    assert_eq!(queue[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 128, 0, 5, 0, 1, 0]);
    assert_eq!(queue[16 + 5 * 16..][..16], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(queue[16 + 100 * 16..][..16], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(inflight.attach(2, 128, used), Err(Unusable::NoQueue)));
    let again = Region::map(fd, 0, layout).expect("mapped");
    inflight.set(Some(Arc::new(again)));
    let attached = inflight.attach(1, 128, used);
    assert!(matches!(attached, Err(Unusable::UsedIndex { noted: 1, ring: 0 })));
}
