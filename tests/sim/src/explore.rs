//! Runs a workload, crashes it at every boundary in every way, and examines what is left.

use crate::engine::Engine;
use crate::host_file::mix;
use crate::model::Model;
use crate::session::{Session, Snapshot};
use crate::storage::{Choice, Death, Point, PointKind, SimStorage};
use crate::workload::{Next, Profile, Workload};
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How hard to look.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Its name, for repeating.
    pub name: &'static str,
    /// Up to so many optional effects every subset is made.
    pub full: usize,
    /// Beyond: so many random subsets, besides none, all, each missing, each alone, prefixes.
    pub samples: usize,
    /// Torn variants at each point.
    pub torn: usize,
    /// Crashes in a row: 1 is none during recovery.
    pub levels: usize,
    /// Of 1000 first-level images, how many have their recovery crashed at every point.
    pub recovery: u32,
    /// Of 1000 images, how many are used further after recovery.
    pub after: u32,
}

impl Limits {
    /// For the tests of every change.
    pub const STANDARD: Limits = Limits {
        name: "standard",
        full: 8,
        samples: 16,
        torn: 6,
        levels: 3,
        recovery: 4,
        after: 300,
    };
    /// A quick look, for finding seeded bugs.
    pub const QUICK: Limits =
        Limits { name: "quick", full: 5, samples: 6, torn: 3, levels: 2, recovery: 10, after: 300 };
    /// For long runs.
    pub const DEEP: Limits = Limits {
        name: "deep",
        full: 8,
        samples: 64,
        torn: 24,
        levels: 3,
        recovery: 60,
        after: 500,
    };
    /// The first level only: every boundary, no crash of recovery.
    pub const FLAT: Limits =
        Limits { name: "flat", full: 8, samples: 16, torn: 6, levels: 1, recovery: 0, after: 100 };

    /// By name.
    pub fn named(name: &str) -> Option<Limits> {
        [Self::STANDARD, Self::QUICK, Self::DEEP, Self::FLAT].into_iter().find(|l| l.name == name)
    }

    fn at_level(&self, level: usize) -> Limits {
        if level == 0 {
            return *self;
        }
        // Recovery has many points: below the first level a few choices at each are enough.
        Limits { full: 3, samples: 2, torn: 1, ..*self }
    }
}

/// Honest counts.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counters {
    /// Workloads run to their end.
    pub workloads: u64,
    /// Crash points passed (boundaries of storage operations, at all levels).
    pub points: u64,
    /// Crash images made.
    pub made: u64,
    /// Distinct ones, by hash of content (durable and cached) and completion log.
    pub distinct: u64,
    /// Of these: after the death of the host.
    pub host: u64,
    /// After the death of the process.
    pub process: u64,
    /// Left by a crash during recovery or during use after a crash.
    pub nested: u64,
    /// At points where nothing was left to chance.
    pub settled: u64,
    /// Opened and compared, with their expectations (the same image may serve two expectations).
    pub verified: u64,
}

impl Counters {
    fn add(&mut self, other: &Counters) {
        self.workloads += other.workloads;
        self.points += other.points;
        self.made += other.made;
        self.distinct += other.distinct;
        self.host += other.host;
        self.process += other.process;
        self.nested += other.nested;
        self.settled += other.settled;
        self.verified += other.verified;
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} workloads, {} crash points, {} crash images made, {} distinct \
             ({} host deaths, {} process deaths; {} of them nested, {} with nothing left to chance), \
             {} opened and compared",
            self.workloads,
            self.points,
            self.made,
            self.distinct,
            self.host,
            self.process,
            self.nested,
            self.settled,
            self.verified
        )
    }
}

/// Where in a tree of crashes something happened: at each level the point and the choice.
pub type Path = Vec<(u64, Choice)>;

/// A violation, and how to see it again.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What was found.
    pub what: String,
    /// Which engine.
    pub engine: &'static str,
    /// The workload's seed.
    pub seed: u64,
    /// The profile.
    pub profile: String,
    /// How hard was looked.
    pub limits: &'static str,
    /// Where.
    pub path: Path,
}

impl Failure {
    /// The one command that repeats it.
    pub fn command(&self) -> String {
        let mut text = format!(
            "cargo run --release -p exd-sim --bin sim -- --seed {} --profile {} --limits {}",
            self.seed, self.profile, self.limits
        );
        if self.engine != "exd" {
            text += &format!(" --engine {}", self.engine);
        }
        if !self.path.is_empty() {
            let points: Vec<String> = self.path.iter().map(|(p, _)| p.to_string()).collect();
            let subsets: Vec<String> = self.path.iter().map(|(_, c)| c.to_string()).collect();
            text += &format!(" --point {} --subset {}", points.join("/"), subsets.join("/"));
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VIOLATION: {}\n  repeat: {}", self.what, self.command())
    }
}

thread_local! {
    static PATH: RefCell<Path> = const { RefCell::new(Vec::new()) };
}

/// Explores the crashes of one seed.
pub struct Explorer<E> {
    profile: Profile,
    seed: u64,
    limits: Limits,
    target: Option<Path>,
    /// Prints what happens on the way to the target.
    pub verbose: bool,
    images: HashSet<u64>,
    seen: HashSet<u64>,
    counters: Counters,
    engine: std::marker::PhantomData<E>,
}

impl<E: Engine> Explorer<E> {
    /// An explorer of one seed; with a target it goes there only.
    pub fn new(profile: Profile, seed: u64, limits: Limits, target: Option<Path>) -> Self {
        Explorer {
            profile,
            seed,
            limits,
            target,
            verbose: false,
            images: HashSet::new(),
            seen: HashSet::new(),
            counters: Counters::default(),
            engine: std::marker::PhantomData,
        }
    }

    /// Runs the workload and every crash of it. Yields the counts and the hash of the trace.
    pub fn run(&mut self) -> Result<(Counters, u64), String> {
        PATH.with_borrow_mut(Vec::clear);
        let mut st = self.profile.config.storage();
        st.seed(mix(self.seed));
        st.set_punch_unsupported(self.profile.name == "nopunch");
        if self.verbose {
            st.keep_trace_text();
        }
        let mut session = Session::<E>::create(st, &self.profile.config)?;
        session.st.record_points(true);
        let workload = Workload::new(&self.profile, self.seed, self.profile.requests);
        let mut index = 0;
        let trace = self.drive(session, workload, &mut index)?;
        self.counters.workloads += 1;
        Ok((self.counters, trace))
    }

    /// Runs a workload to its end; the points it passes are numbered from `index`.
    fn drive(
        &mut self,
        mut session: Session<E>,
        mut workload: Workload,
        index: &mut u64,
    ) -> Result<u64, String> {
        loop {
            let next = workload.next(&mut session);
            self.print_trace(&mut session.st);
            for snapshot in session.take_snapshots() {
                self.explore(&snapshot, index)?;
            }
            match next? {
                Next::More => {}
                Next::Reopen => session = self.reopen(session, index)?,
                Next::Done => break,
            }
        }
        let trace = session.st.trace();
        let (mut st, model, snapshots) = session.close()?;
        for snapshot in snapshots {
            self.explore(&snapshot, index)?;
        }
        st.record_points(false);
        E::closed_well(&st)?;
        self.open_and_compare(st, model, "after a clean close")?;
        Ok(trace)
    }

    fn reopen(&mut self, session: Session<E>, index: &mut u64) -> Result<Session<E>, String> {
        let (mut st, model, snapshots) = session.close()?;
        self.print_trace(&mut st);
        for snapshot in snapshots {
            self.explore(&snapshot, index)?;
        }
        E::closed_well(&st)?;
        self.check(&st, "after a clean close")?;
        let opened = Session::<E>::open(st, model, &self.profile.config);
        let mut session =
            opened.map_err(|r| format!("a cleanly closed image does not open: {}", r.1.text))?;
        session.keep_points();
        self.print_trace(&mut session.st);
        for snapshot in session.take_snapshots() {
            self.explore(&snapshot, index)?;
        }
        Ok(session)
    }

    fn print_trace(&self, st: &mut SimStorage) {
        for line in st.take_trace_text() {
            eprintln!("{:indent$}{line}", "", indent = 2 * level() + 2);
        }
    }

    /// Crashes at one point, in every way the limits say.
    fn explore(&mut self, snapshot: &Snapshot, index: &mut u64) -> Result<(), String> {
        let number = *index;
        *index += 1;
        self.counters.points += 1;
        let level = level();
        if let Some(target) = &self.target {
            let Some((point, choice)) = target.get(level) else { return Ok(()) };
            if *point != number {
                return Ok(());
            }
            let choice = choice.clone();
            let model = snapshot.model.after(choice.death);
            if self.verbose {
                eprintln!(
                    "== point {number} ({:?}), crash {choice}\n{}",
                    snapshot.point.kind,
                    snapshot.point.describe(choice.death)
                );
            }
            let expected = model.expect().hash;
            return self.crash(&snapshot.point, number, choice, &model, expected);
        }
        let mut rng = fastrand::Rng::with_seed(mix(path_hash(self.seed) ^ mix(number)));
        let limits = self.limits.at_level(level);
        for death in [Death::Host, Death::Process] {
            if death == Death::Process && !self.profile.config.completion_log {
                continue;
            }
            let model = snapshot.model.after(death);
            let expected = model.expect().hash;
            for choice in choices(&snapshot.point, death, &limits, &mut rng) {
                self.crash(&snapshot.point, number, choice, &model, expected)?;
            }
        }
        Ok(())
    }

    fn crash(
        &mut self,
        point: &Point,
        number: u64,
        choice: Choice,
        model: &Model,
        expected: u64,
    ) -> Result<(), String> {
        let image = point.crash(&choice);
        self.counters.made += 1;
        let content = image.state_hash();
        if self.images.insert(content) {
            self.counters.distinct += 1;
            match choice.death {
                Death::Host => self.counters.host += 1,
                Death::Process => self.counters.process += 1,
            }
            self.counters.nested += u64::from(level() > 0);
            self.counters.settled += u64::from(choice.keep.is_empty());
        }
        let death = u64::from(choice.death == Death::Host);
        if !self.seen.insert(mix(content ^ expected).wrapping_add(death)) {
            return Ok(());
        }
        self.counters.verified += 1;
        PATH.with_borrow_mut(|path| path.push((number, choice)));
        let verdict = self.verify(image, model.clone());
        verdict?;
        PATH.with_borrow_mut(|path| path.pop());
        Ok(())
    }

    /// Examines a crash image: check, open, compare, check again, and what comes after.
    fn verify(&mut self, mut st: SimStorage, model: Model) -> Result<(), String> {
        let mut rng = fastrand::Rng::with_seed(path_hash(self.seed));
        let level = level();
        st.seed(rng.u64(..));
        let deeper = level < self.limits.levels;
        let mut crash_recovery = rng.u32(0..1000) < self.limits.recovery && deeper;
        if level > 1 {
            crash_recovery &= rng.u8(0..8) == 0;
        }
        let after = rng.u32(0..1000) < self.limits.after;
        let which = rng.u8(0..10);
        if self.verbose {
            st.keep_trace_text();
        }
        self.check(&st, "of the crash image")?;
        st.record_points(crash_recovery);
        let opened = Session::<E>::open(st, model, &self.profile.config);
        let mut session = opened.map_err(|mut r| {
            self.print_trace(&mut r.0);
            format!("P4: the crash image does not open: {}", r.1.text)
        })?;
        session.keep_points();
        self.print_trace(&mut session.st);
        let mut index = 0;
        for snapshot in session.take_snapshots() {
            self.explore(&snapshot, &mut index)?;
        }
        session.st.record_points(false);
        self.compare(&mut session, "after recovery")?;
        let now = whole(&session.st);
        self.check(&now, "after recovery")?;
        if !after {
            return Ok(());
        }
        match which {
            0..3 => {
                let (st, model, _) = session.close()?;
                self.open_and_compare(st, model, "recovered, then closed")?;
            }
            3..5 => {
                let model = session.model.after(Death::Process);
                self.open_and_compare(now, model, "recovered, then killed again")?;
            }
            5..8 => {
                let flushed = session.run(crate::api::Request::Flush)?;
                flushed.map_err(|error| format!("flush after recovery failed: {error}"))?;
                self.lose_power(&session, "recovered, flushed, then power lost")?;
            }
            _ => {
                let requests = rng.u32(3..9);
                let workload = Workload::new(&self.profile, rng.u64(..), requests);
                session.st.record_points(deeper && rng.u8(0..48) == 0);
                self.drive(session, workload, &mut index)?;
            }
        }
        Ok(())
    }

    fn lose_power(&mut self, session: &Session<E>, when: &str) -> Result<(), String> {
        let nothing =
            Choice { death: Death::Host, keep: Vec::new(), tear: 0, log: 0, reverse: false };
        let st = session.st.point(PointKind::Step).crash(&nothing);
        self.open_and_compare(st, session.model.after(Death::Host), when)
    }

    fn check(&self, st: &SimStorage, when: &str) -> Result<(), String> {
        let mut st = st.clone();
        st.record_points(false);
        st.take_trace_text();
        let before = st.state_hash();
        let verdict =
            E::check(&mut st).map_err(|r| format!("P4: check {when} failed: {}", r.text))?;
        if let Some(first) = verdict.corruptions.first() {
            return Err(format!(
                "P4: check {when} found {} corruptions, first: {first}",
                verdict.corruptions.len()
            ));
        }
        if verdict.leaks != 0 {
            return Err(format!("P4: check {when} found {} leaked bytes", verdict.leaks));
        }
        if st.state_hash() != before {
            return Err(format!("check {when} changed the image"));
        }
        Ok(())
    }

    fn compare(&self, session: &mut Session<E>, when: &str) -> Result<(), String> {
        let data = session.read_all()?;
        self.print_trace(&mut session.st);
        if let Some(breach) = session.st.violations().first() {
            return Err(format!("the engine broke the storage's contract: {breach}"));
        }
        let expect = session.model.expect();
        let size = session.disk.size();
        let found = expect
            .compare(size, &data)
            .map_err(|(sector, why)| format!("{when}: {why}{}", session.model.why(sector)))?;
        session.model.observe(size, &found);
        Ok(())
    }

    fn open_and_compare(&mut self, st: SimStorage, model: Model, when: &str) -> Result<(), String> {
        self.check(&st, when)?;
        let opened = Session::<E>::open(st, model, &self.profile.config);
        let mut session =
            opened.map_err(|r| format!("P4: {when} the image does not open: {}", r.1.text))?;
        self.compare(&mut session, when)
    }
}

/// The storage as a killed process leaves it, everything under way having landed.
fn whole(st: &SimStorage) -> SimStorage {
    let point = st.point(PointKind::Step);
    point.crash(&Choice {
        death: Death::Process,
        keep: vec![true; point.optional(Death::Process)],
        tear: 0,
        log: 1,
        reverse: false,
    })
}

fn level() -> usize {
    PATH.with_borrow(Vec::len)
}

/// A number that stands for the way to here.
fn path_hash(seed: u64) -> u64 {
    PATH.with_borrow(|path| {
        path.iter().fold(mix(seed), |hash, (point, choice)| {
            let mut hash = mix(hash ^ point ^ (choice.death as u64) << 40);
            for (index, keep) in choice.keep.iter().enumerate() {
                hash = hash.wrapping_add(u64::from(*keep) * mix(index as u64));
            }
            mix(hash ^ mix(choice.tear) ^ choice.log << 1 ^ u64::from(choice.reverse))
        })
    })
}

/// The crash images to make at a point.
fn choices(point: &Point, death: Death, limits: &Limits, rng: &mut fastrand::Rng) -> Vec<Choice> {
    let n = point.optional(death);
    let plain = |keep: Vec<bool>| Choice { death, keep, tear: 0, log: 1, reverse: false };
    let mut all = Vec::new();
    if n <= limits.full {
        for mask in 0..1_u32 << n {
            all.push(plain((0..n).map(|bit| mask >> bit & 1 == 1).collect()));
        }
    } else {
        all.push(plain(vec![false; n]));
        all.push(plain(vec![true; n]));
        for one in 0..n {
            all.push(plain((0..n).map(|i| i != one).collect()));
            all.push(plain((0..n).map(|i| i == one).collect()));
            all.push(plain((0..n).map(|i| i < one).collect()));
        }
        for _ in 0..limits.samples {
            all.push(plain((0..n).map(|_| rng.bool()).collect()));
        }
    }
    let random = |rng: &mut fastrand::Rng| -> Vec<bool> {
        let most = rng.bool();
        (0..n).map(|_| rng.bool() || (most && rng.bool())).collect()
    };
    if n > 0 {
        for _ in 0..limits.torn {
            let tear = rng.u64(1..1 << 32);
            all.push(Choice { tear, ..plain(random(rng)) });
        }
        if point.several_under_way() {
            all.push(Choice { reverse: true, ..plain(vec![true; n]) });
            all.push(Choice { reverse: true, ..plain(random(rng)) });
        }
    }
    if death == Death::Process && point.storing_log() {
        for log in [0, rng.u64(2..1 << 32), rng.u64(2..1 << 32)] {
            all.push(Choice { log, ..plain(vec![false; n]) });
            all.push(Choice { log, ..plain(random(rng)) });
        }
    }
    all
}

/// Runs one seed; a panic of the engine counts as a violation.
pub fn run_seed<E: Engine>(
    engine: &'static str,
    profile: &str,
    seed: u64,
    limits: Limits,
    target: Option<Path>,
    verbose: bool,
) -> Result<(Counters, u64), Box<Failure>> {
    let fail = |what: String| {
        Box::new(Failure {
            what,
            engine,
            seed,
            profile: profile.to_owned(),
            limits: limits.name,
            path: PATH.with_borrow(Clone::clone),
        })
    };
    let Some(built) = Profile::named(profile, seed) else {
        return Err(fail(format!("there is no profile {profile:?}")));
    };
    if !E::supports(&built.config) {
        return Ok((Counters::default(), 0));
    }
    let run = || {
        let mut explorer = Explorer::<E>::new(built, seed, limits, target);
        explorer.verbose = verbose;
        explorer.run()
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(what)) => Err(fail(what)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(fail(format!("panic: {}", text.unwrap_or_default())))
        }
    }
}

/// Runs many seeds on all processors until `budget` distinct images were made (0: until the seeds
/// are used up) or a violation is found. `profiles` are taken in turn.
pub fn run_many<E: Engine>(
    engine: &'static str,
    profiles: &[&str],
    seeds: Range<u64>,
    limits: Limits,
    budget: u64,
) -> (Counters, Vec<Box<Failure>>) {
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((Counters::default(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let profile = profiles[seed as usize % profiles.len()];
                    let result = run_seed::<E>(engine, profile, seed, limits, None, false);
                    let mut total = total.lock().unwrap_or_else(|e| e.into_inner());
                    match result {
                        Ok((counters, _)) => total.0.add(&counters),
                        Err(failure) => {
                            total.1.push(failure);
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    if budget > 0 && total.0.distinct >= budget {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    total.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// The number of distinct crash images a test is to make: `share` percent of `EXD_SIM_BUDGET`
/// (default 300,000).
pub fn budget(share: u64) -> u64 {
    let all = std::env::var("EXD_SIM_BUDGET").ok().and_then(|text| text.parse().ok());
    all.unwrap_or(300_000_u64) * share / 100
}
