//! Every completion order of a few overlapping requests (P7).
//!
//! A scenario is a state of the blocks, and requests submitted together. Each run takes one path
//! through the tree of "which of the operations under way ends next"; paths are enumerated depth
//! first, and where a scenario has too many, the rest is sampled.

use crate::api::{Request, SECTOR};
use crate::engine::{Engine, ImageConfig, Preallocation};
use crate::host_file::mix;
use crate::model::Model;
use crate::session::Session;
use crate::storage::{Choice, Death, PointKind, SimStorage};
use std::fmt;

/// What the blocks are before the requests come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum BlockState {
    Hole,
    Unwritten,
    Written,
    Zero,
    /// Written before, discarded, its old space waiting to be used again.
    Recycled,
    /// Written in its first sectors only.
    PartlyWritten,
    /// Written, and a discard of it is under way before the requests come.
    BeingDiscarded,
}

impl BlockState {
    /// All of them.
    pub const ALL: [BlockState; 7] = [
        BlockState::Hole,
        BlockState::Unwritten,
        BlockState::Written,
        BlockState::Zero,
        BlockState::Recycled,
        BlockState::PartlyWritten,
        BlockState::BeingDiscarded,
    ];
}

/// When an operation takes effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// At its end.
    Late,
    /// At its submission.
    Early,
}

/// Requests on blocks in a state.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Unit of written state in bytes.
    pub block_size: u32,
    /// The host's granularity in bytes.
    pub alignment: u64,
    /// The state of the blocks.
    pub state: BlockState,
    /// What is submitted together.
    pub requests: Vec<Request>,
    /// Issued one by one instead of as a batch.
    pub kick_each: bool,
    /// When operations take effect.
    pub effect: Effect,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let batch = if self.kick_each { "one by one" } else { "as a batch" };
        write!(
            f,
            "block {}, host alignment {}, blocks {:?}, effects {:?}, submitted {batch}: {:?}",
            self.block_size, self.alignment, self.state, self.effect, self.requests
        )
    }
}

/// The requests that scenarios are made of, around the second block of the disk.
pub fn menu(block_size: u32) -> Vec<Request> {
    let block = u64::from(block_size);
    let half = (block / 2).max(SECTOR);
    let write = |offset, len| Request::Write { offset, len, durable: false };
    let zeroes = |offset, len, unmap| Request::WriteZeroes { offset, len, unmap, durable: false };
    vec![
        write(block, half),
        write(block + half, half),
        write(block + half - SECTOR, 2 * SECTOR),
        write(block, block),
        write(block - SECTOR, 2 * SECTOR),
        write(block + SECTOR, 2 * block - 2 * SECTOR),
        Request::Write { offset: block + SECTOR, len: SECTOR, durable: true },
        zeroes(block + half - SECTOR, half, false),
        zeroes(block, block, true),
        Request::Discard { offset: block, len: block },
        Request::Discard { offset: half, len: 2 * block },
        Request::Read { offset: block - SECTOR, len: block + 2 * SECTOR },
        Request::Flush,
    ]
}

/// Counts of orders.
#[derive(Clone, Copy, Default, Debug)]
pub struct Orders {
    /// Scenarios.
    pub scenarios: u64,
    /// Of these, with every order run.
    pub exhaustive: u64,
    /// Orders run.
    pub orders: u64,
}

impl Orders {
    /// Adds another count.
    pub fn add(&mut self, other: Orders) {
        self.scenarios += other.scenarios;
        self.exhaustive += other.exhaustive;
        self.orders += other.orders;
    }
}

/// Takes one path through a tree of choices, and finds the next.
#[derive(Default)]
struct Chooser {
    taken: Vec<(usize, usize)>,
    at: usize,
    random: Option<fastrand::Rng>,
}

impl Chooser {
    fn choose(&mut self, among: usize) -> usize {
        if let Some(rng) = &mut self.random {
            let pick = rng.usize(0..among);
            self.taken.push((pick, among));
            return pick;
        }
        if self.at == self.taken.len() {
            self.taken.push((0, among));
        }
        self.at += 1;
        self.taken[self.at - 1].0
    }

    fn next_path(&mut self) -> bool {
        self.at = 0;
        while let Some((pick, among)) = self.taken.pop() {
            if pick + 1 < among {
                self.taken.push((pick + 1, among));
                return true;
            }
        }
        false
    }
}

impl Scenario {
    fn config(&self) -> ImageConfig {
        let mut config = ImageConfig::new(8 * u64::from(self.block_size), self.block_size);
        config.geometry.alignment = self.alignment;
        if self.state == BlockState::Unwritten {
            config.preallocation = Preallocation::Metadata;
        }
        config
    }

    /// Brings the blocks into their state.
    fn prepare<E: Engine>(&self) -> Result<(SimStorage, Model), String> {
        let config = self.config();
        let block = u64::from(self.block_size);
        let mut st = config.storage();
        st.seed(1);
        let mut session = Session::<E>::create(st, &config)?;
        let write = |len| Request::Write { offset: block, len, durable: false };
        let first: Vec<Request> = match self.state {
            BlockState::Hole | BlockState::Unwritten => vec![],
            BlockState::Written | BlockState::BeingDiscarded => vec![write(2 * block)],
            BlockState::PartlyWritten => vec![write(SECTOR)],
            BlockState::Zero => vec![Request::WriteZeroes {
                offset: block,
                len: 2 * block,
                unmap: false,
                durable: false,
            }],
            BlockState::Recycled => vec![
                write(2 * block),
                Request::Flush,
                Request::Discard { offset: block, len: 2 * block },
                Request::Flush,
            ],
        };
        for request in first {
            session.run(request)?.map_err(|error| format!("preparing failed: {error}"))?;
        }
        if self.state == BlockState::Recycled {
            for _ in 0..10 {
                session.tick()?;
                session.drain()?;
            }
        }
        let (st, model, _) = session.close()?;
        Ok((st, model))
    }

    /// Runs up to `most` orders, then `samples` random ones if there are more.
    pub fn run<E: Engine>(&self, most: u64, samples: u64) -> Result<Orders, String> {
        let mut config = self.config();
        config.preallocation = Preallocation::Off;
        if !E::supports(&config) {
            return Ok(Orders::default());
        }
        let (st, model) =
            self.prepare::<E>().map_err(|why| format!("{why}\n  preparing scenario: {self}"))?;
        let mut chooser = Chooser::default();
        let mut orders = Orders { scenarios: 1, ..Orders::default() };
        let mut exhaustive = false;
        for _ in 0..most {
            self.order::<E>(&st, &model, &config, &mut chooser)?;
            orders.orders += 1;
            if !chooser.next_path() {
                exhaustive = true;
                break;
            }
        }
        orders.exhaustive = u64::from(exhaustive);
        if !exhaustive {
            for sample in 0..samples {
                let random = Some(fastrand::Rng::with_seed(mix(sample)));
                let mut chooser = Chooser { random, ..Chooser::default() };
                self.order::<E>(&st, &model, &config, &mut chooser)?;
                orders.orders += 1;
            }
        }
        Ok(orders)
    }

    fn order<E: Engine>(
        &self,
        st: &SimStorage,
        model: &Model,
        config: &ImageConfig,
        chooser: &mut Chooser,
    ) -> Result<(), String> {
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.one_order::<E>(st, model, config, chooser)
        }));
        let result = run.unwrap_or_else(|_| Err("panic (see above)".to_owned()));
        result.map_err(|why| {
            let picks: Vec<usize> = chooser.taken.iter().map(|(pick, _)| *pick).collect();
            format!("P7 VIOLATION: {why}\n  scenario: {self}\n  order: {picks:?}")
        })
    }

    fn one_order<E: Engine>(
        &self,
        st: &SimStorage,
        model: &Model,
        config: &ImageConfig,
        chooser: &mut Chooser,
    ) -> Result<(), String> {
        let mut st = st.clone();
        st.seed(7);
        let opened = Session::<E>::open(st, model.clone(), config);
        let mut session = opened.map_err(|r| format!("opening failed: {}", r.1.text))?;
        // What open leaves under way is no part of the scenario.
        session.drain()?;
        let block = u64::from(self.block_size);
        if self.state == BlockState::BeingDiscarded {
            session.submit(Request::Discard { offset: block, len: 2 * block })?;
            session.kick()?;
        }
        for request in &self.requests {
            session.submit(*request)?;
            if self.kick_each {
                session.kick()?;
            }
        }
        session.kick()?;
        self.finish_all(&mut session, chooser)?;
        self.judge(session, config)
    }

    fn finish_all<E: Engine>(
        &self,
        session: &mut Session<E>,
        chooser: &mut Chooser,
    ) -> Result<(), String> {
        let mut idle = 0;
        while session.model.under_way() > 0 {
            let mut under_way = session.st.under_way();
            if under_way.is_empty() {
                idle += 1;
                if idle > 100 {
                    return Err(format!("{} requests hang", session.model.under_way()));
                }
                session.kick()?;
                session.tick()?;
                continue;
            }
            if self.effect == Effect::Early {
                under_way.iter().for_each(|token| session.st.apply(*token));
            }
            let pick = if under_way.len() > 1 { chooser.choose(under_way.len()) } else { 0 };
            let completion = session.st.finish(under_way.swap_remove(pick));
            session.complete(completion)?;
        }
        session.drain()
    }

    fn judge<E: Engine>(
        &self,
        mut session: Session<E>,
        config: &ImageConfig,
    ) -> Result<(), String> {
        // Reads settle which of two overlapping writes stayed.
        let read = Request::Read { offset: 0, len: config.virtual_size };
        session.run(read)?.map_err(|error| format!("reading back failed: {error}"))?;
        let process = session.st.point(PointKind::Step);
        let choice =
            Choice { death: Death::Process, keep: Vec::new(), tear: 0, log: 1, reverse: false };
        let killed = session.model.after(Death::Process);
        expect::<E>(process.crash(&choice), killed, config, "after the daemon was killed")?;
        session.run(Request::Flush)?.map_err(|error| format!("flush failed: {error}"))?;
        let host = session.st.point(PointKind::Step);
        let choice = Choice { death: Death::Host, ..choice };
        let lost = session.model.after(Death::Host);
        expect::<E>(host.crash(&choice), lost, config, "flushed, then power lost")
    }
}

fn expect<E: Engine>(
    mut st: SimStorage,
    model: Model,
    config: &ImageConfig,
    when: &str,
) -> Result<(), String> {
    let mut look = st.clone();
    let verdict = E::check(&mut look).map_err(|r| format!("{when} check failed: {}", r.text))?;
    if let Some(first) = verdict.corruptions.first() {
        return Err(format!("{when} check found corruption: {first}"));
    }
    if verdict.leaks > 0 {
        return Err(format!("{when} check found {} leaked bytes", verdict.leaks));
    }
    st.seed(3);
    let opened = Session::<E>::open(st, model, config);
    let mut session =
        opened.map_err(|r| format!("{when} the image does not open: {}", r.1.text))?;
    let data = session.read_all()?;
    let expect = session.model.expect();
    expect
        .compare(session.disk.size(), &data)
        .map(|_| ())
        .map_err(|(sector, why)| format!("{when}: {why}{}", session.model.why(sector)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chooser_takes_every_path_once() {
        let mut chooser = Chooser::default();
        let mut paths = Vec::new();
        loop {
            let first = chooser.choose(3);
            let second = if first == 1 { chooser.choose(2) } else { 9 };
            paths.push((first, second));
            if !chooser.next_path() {
                break;
            }
        }
        assert_eq!(paths, [(0, 9), (1, 0), (1, 1), (2, 9)]);
    }
}
