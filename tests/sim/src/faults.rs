//! Runs a workload with one injected error and examines what comes of it.

use crate::api::{Request, RequestError, SECTOR, StorageError};
use crate::engine::Engine;
use crate::host_file::mix;
use crate::model::Model;
use crate::session::Session;
use crate::storage::{CallKind, Choice, Death, Fault, PointKind, SimStorage};
use crate::workload::{Next, Profile, Workload};

/// When the error strikes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// While the image is created.
    Create,
    /// While an image that was not closed is opened (recovery).
    Recovery,
    /// While it is used, checkpoints and close included.
    Use,
}

/// One injected error.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// The workload's seed.
    pub seed: u64,
    /// Its profile.
    pub profile: &'static str,
    /// When.
    pub phase: Phase,
    /// What.
    pub fault: Fault,
}

impl Trial {
    /// Runs it. Yields how often the error was delivered; an `Err` is a violation.
    pub fn run<E: Engine>(&self) -> Result<u64, String> {
        let run = || self.run_inner::<E>();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        result
            .unwrap_or_else(|_| Err("panic (see above)".to_owned()))
            .map_err(|why| format!("VIOLATION: {why}\n  trial: {self:?}"))
    }

    fn run_inner<E: Engine>(&self) -> Result<u64, String> {
        let profile = Profile::named(self.profile, self.seed).ok_or("no such profile")?;
        if !E::supports(&profile.config) {
            return Ok(0);
        }
        let mut st = profile.config.storage();
        st.seed(mix(self.seed));
        match self.phase {
            Phase::Create => self.create::<E>(st, &profile),
            Phase::Recovery => self.recover::<E>(st, &profile),
            Phase::Use => {
                let mut session = Session::<E>::create(st, &profile.config)?;
                session.st.inject(self.fault);
                self.use_it(session, &profile)
            }
        }
    }

    fn create<E: Engine>(&self, mut st: SimStorage, profile: &Profile) -> Result<u64, String> {
        st.inject(self.fault);
        let made = E::create(&mut st, &profile.config);
        let fired = st.fired();
        st.lift_faults();
        if let Err(refusal) = made {
            if refusal.storage != Some(self.fault.error) {
                return Err(format!("creating failed oddly: {}", refusal.text));
            }
            return Ok(fired);
        }
        drain(&mut st);
        if st.sync_failed() {
            return Err("create succeeded although a sync failed".to_owned());
        }
        let model = Model::new(profile.config.virtual_size, u64::from(profile.config.block_size));
        examine::<E>(st, model, profile, "after creation")?;
        Ok(fired)
    }

    fn recover<E: Engine>(&self, st: SimStorage, profile: &Profile) -> Result<u64, String> {
        let mut session = Session::<E>::create(st, &profile.config)?;
        let mut workload = Workload::new(profile, self.seed, profile.requests / 2);
        let steps = 20 + mix(self.seed) % 150;
        for _ in 0..steps {
            match workload.next(&mut session)? {
                Next::More => {}
                Next::Reopen | Next::Done => break,
            }
        }
        let death = if self.seed & 1 == 0 { Death::Host } else { Death::Process };
        let (mut st, model) = die(&session, death, self.seed);
        st.inject(self.fault);
        let session = match Session::<E>::open(st, model.clone(), &profile.config) {
            Ok(session) => session,
            Err(refused) => {
                let (mut st, refusal) = *refused;
                let fired = st.fired();
                if fired == 0 {
                    return Err(format!("recovery failed without an error: {}", refusal.text));
                }
                if refusal.corrupt {
                    return Err(format!("an error was taken for damage: {}", refusal.text));
                }
                st.lift_faults();
                let mut model = model;
                if st.sync_failed() {
                    model.note_lost_sync();
                }
                let (st, model) = die_of(&st, &model, Death::Process, self.seed);
                examine::<E>(st, model, profile, "after a failed recovery")?;
                return Ok(fired);
            }
        };
        self.use_it(session, profile)
    }

    fn use_it<E: Engine>(&self, mut session: Session<E>, profile: &Profile) -> Result<u64, String> {
        session.errors_allowed = true;
        if session.st.sync_failed() {
            session.model.note_lost_sync();
        }
        let mut workload = Workload::new(profile, self.seed ^ 1, profile.requests);
        while workload.next(&mut session)? != Next::Done {}
        // A checkpoint at the end of each, so that it meets every error too.
        session.run(Request::Checkpoint)?.ok();
        self.judge_errors(&mut session)?;
        let fired = session.st.fired();
        session.st.lift_faults();
        let lost = session.st.sync_failed();
        if lost {
            if session.run(Request::Flush)?.is_ok() {
                return Err("P5: a flush succeeded after a failed sync".to_owned());
            }
        } else if self.fault.error == StorageError::NoSpace {
            // Space was made: the same handle goes on.
            let size = session.model.size();
            let ranges = [(0, 4096.min(size)), (size / 2 / SECTOR * SECTOR, SECTOR)];
            for (offset, len) in ranges {
                let write = Request::Write { offset, len, durable: false };
                session.run(write)?.map_err(|e| format!("no write after ENOSPC: {e}"))?;
            }
            session.run(Request::Flush)?.map_err(|e| format!("no flush after ENOSPC: {e}"))?;
            let read = Request::Read { offset: 0, len: size };
            session.run(read)?.map_err(|e| format!("no read after ENOSPC: {e}"))?;
        }
        match mix(self.seed ^ self.fault.nth) % 3 {
            0 if !lost => self.close(session, profile)?,
            1 => {
                let (st, model) = die(&session, Death::Host, self.seed);
                examine::<E>(st, model, profile, "after errors and power loss")?;
            }
            _ => {
                let (st, model) = die(&session, Death::Process, self.seed);
                examine::<E>(st, model, profile, "after errors and a kill")?;
            }
        }
        Ok(fired)
    }

    /// Closes without errors under way; a handle that met EIO may refuse, ENOSPC must not last.
    fn close<E: Engine>(&self, mut session: Session<E>, profile: &Profile) -> Result<(), String> {
        let closed = session.disk.close(&mut session.st);
        match closed {
            Ok(()) => {
                drain(&mut session.st);
                let mut model = session.model;
                model.closed();
                let mut look = session.st.clone();
                look.settle();
                examine::<E>(look, model, profile, "after errors and a clean close")
            }
            Err(refusal) if self.fault.error == StorageError::NoSpace => {
                Err(format!("close failed after ENOSPC was lifted: {}", refusal.text))
            }
            Err(_) => {
                let (st, model) = die(&session, Death::Process, self.seed);
                examine::<E>(st, model, profile, "after errors and a failed close")
            }
        }
    }

    fn judge_errors<E: Engine>(&self, session: &mut Session<E>) -> Result<(), String> {
        for (id, request, result) in session.take_finished() {
            match result {
                Ok(()) | Err(RequestError::Failed) => {}
                Err(RequestError::Storage(error)) if error == self.fault.error => {}
                Err(RequestError::OutOfRange) if session.errors_allowed => {
                    // A failed resize leaves the size in doubt.
                }
                Err(error) => {
                    return Err(format!("request {} {request:?} failed oddly: {error}", id.0));
                }
            }
        }
        Ok(())
    }
}

fn drain(st: &mut SimStorage) {
    while !st.under_way().is_empty() {
        st.step();
    }
}

fn die<E: Engine>(session: &Session<E>, death: Death, seed: u64) -> (SimStorage, Model) {
    die_of(&session.st, &session.model, death, seed)
}

fn die_of(st: &SimStorage, model: &Model, death: Death, seed: u64) -> (SimStorage, Model) {
    let mut rng = fastrand::Rng::with_seed(mix(seed ^ 0xD1E));
    let point = st.point(PointKind::Step);
    let choice = Choice {
        death,
        keep: (0..point.optional(death)).map(|_| rng.bool()).collect(),
        tear: rng.u64(0..3),
        log: 1,
        reverse: false,
    };
    let mut left = point.crash(&choice);
    left.seed(rng.u64(..));
    (left, model.after(death))
}

/// Checks, opens, compares, flushes, closes, checks.
fn examine<E: Engine>(
    st: SimStorage,
    model: Model,
    profile: &Profile,
    when: &str,
) -> Result<(), String> {
    let check = |st: &SimStorage, when: &str| {
        let mut look = st.clone();
        let verdict =
            E::check(&mut look).map_err(|r| format!("{when}: check failed: {}", r.text))?;
        if let Some(first) = verdict.corruptions.first() {
            return Err(format!("{when}: check found corruption: {first}"));
        }
        if verdict.leaks > 0 {
            return Err(format!("{when}: check found {} leaked bytes", verdict.leaks));
        }
        Ok(())
    };
    check(&st, when)?;
    let opened = Session::<E>::open(st, model, &profile.config);
    let mut session =
        opened.map_err(|r| format!("{when}: the image does not open: {}", r.1.text))?;
    let data = session.read_all()?;
    let expect = session.model.expect();
    let size = session.disk.size();
    let found = expect
        .compare(size, &data)
        .map_err(|(sector, why)| format!("{when}: {why}{}", session.model.why(sector)))?;
    session.model.observe(size, &found);
    let write = Request::Write { offset: 0, len: SECTOR, durable: false };
    session.run(write)?.map_err(|e| format!("{when}: writing failed: {e}"))?;
    session.run(Request::Flush)?.map_err(|e| format!("{when}: flushing failed: {e}"))?;
    let (st, _, _) = session.close()?;
    check(&st, when)
}

/// Counts of a loop over all calls.
#[derive(Clone, Copy, Default, Debug)]
pub struct Injections {
    /// Trials run.
    pub trials: u64,
    /// Errors delivered.
    pub delivered: u64,
}

/// Fails the first, second, ... call of a kind until there is none left to fail, or `most` trials
/// were made.
pub fn every_call<E: Engine>(
    seed: u64,
    profile: &'static str,
    phase: Phase,
    kind: CallKind,
    error: StorageError,
    persistent: bool,
    most: u64,
) -> Result<Injections, String> {
    let mut sum = Injections::default();
    for nth in 1..=most {
        let fault = Fault { kind, nth, error, persistent };
        let delivered = Trial { seed, profile, phase, fault }.run::<E>()?;
        sum.trials += 1;
        sum.delivered += delivered;
        if delivered == 0 {
            break;
        }
    }
    Ok(sum)
}
