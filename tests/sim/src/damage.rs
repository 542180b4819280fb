//! Damages the metadata of small images bit by bit (P6): an error, or the same disk.

use crate::api::{Request, SECTOR};
use crate::engine::{Engine, ImageConfig};
use crate::host_file::{PAGE, mix};
use crate::model::Expect;
use crate::session::Session;
use crate::storage::{Choice, Death, PointKind, SimStorage};

/// An image to damage, and what its disk may look like.
pub struct Golden {
    /// The image.
    pub st: SimStorage,
    /// What it may hold.
    pub expect: Expect,
    config: ImageConfig,
}

/// What damage led to.
#[derive(Clone, Copy, Default, Debug)]
pub struct Outcomes {
    /// Damages made.
    pub damages: u64,
    /// `check` reported it, or failed.
    pub checked: u64,
    /// Opening failed.
    pub refused: u64,
    /// A read failed.
    pub unreadable: u64,
    /// It made no difference.
    pub harmless: u64,
}

impl Outcomes {
    /// Adds other counts.
    pub fn add(&mut self, other: &Outcomes) {
        self.damages += other.damages;
        self.checked += other.checked;
        self.refused += other.refused;
        self.unreadable += other.unreadable;
        self.harmless += other.harmless;
    }
}

fn some_requests(config: &ImageConfig, rng: &mut fastrand::Rng) -> Vec<Request> {
    let sectors = config.virtual_size / SECTOR;
    let mut requests = Vec::new();
    for index in 0..24 {
        let offset = rng.u64(0..sectors - 20) * SECTOR;
        let len = rng.u64(1..20) * SECTOR;
        requests.push(match index % 8 {
            5 => Request::Discard { offset, len: len * 2 },
            6 => Request::WriteZeroes { offset, len, unmap: false, durable: false },
            7 => Request::Flush,
            _ => Request::Write { offset, len, durable: false },
        });
        if index == 12 {
            requests.push(Request::Checkpoint);
        }
    }
    requests
}

/// Makes an image of a few extents; with `clean` it is closed, else its journal is live.
pub fn golden<E: Engine>(block_size: u32, clean: bool, seed: u64) -> Result<Golden, String> {
    let config = ImageConfig::new(128 << 10, block_size);
    let mut st = config.storage();
    st.seed(seed);
    let mut rng = fastrand::Rng::with_seed(mix(seed));
    let mut session = Session::<E>::create(st, &config)?;
    for request in some_requests(&config, &mut rng) {
        session.run(request)?.map_err(|e| e.to_string())?;
    }
    if clean {
        let (mut st, model, _) = session.close()?;
        st.settle();
        return Ok(Golden { st, expect: model.expect(), config });
    }
    session.run(Request::Flush)?.map_err(|e| e.to_string())?;
    // The last record of a log cannot be told from a torn one: what only it holds may be lost.
    let last = Request::Write { offset: SECTOR, len: 3 * SECTOR, durable: false };
    session.run(last)?.map_err(|e| e.to_string())?;
    let expect = session.model.after(Death::Host).expect();
    session.run(Request::Flush)?.map_err(|e| e.to_string())?;
    let choice = Choice { death: Death::Host, keep: Vec::new(), tear: 0, log: 0, reverse: false };
    let st = session.st.point(PointKind::Step).crash(&choice);
    Ok(Golden { st, expect, config })
}

impl Golden {
    /// Sectors of pages that hold metadata: everything with content that is no guest's.
    pub fn metadata(&self) -> Vec<u64> {
        let file = self.st.view();
        let mut sectors = Vec::new();
        let mut at = 0;
        while let Some(range) = file.next_data(at) {
            let mut page = range.start / PAGE * PAGE;
            while page < range.end {
                let mut bytes = vec![0; PAGE as usize];
                file.read(page, &mut bytes);
                let guest = |sector: &[u8]| sector.starts_with(b"EXDSTAMP");
                let own = |sector: &[u8]| !guest(sector) && sector.iter().any(|b| *b != 0);
                if bytes.chunks(SECTOR as usize).any(own) {
                    for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                        if !guest(sector) {
                            sectors.push(page / SECTOR + index as u64);
                        }
                    }
                }
                page += PAGE;
            }
            at = range.end;
        }
        sectors
    }

    /// Flips one bit and looks: an error, or what the disk may hold.
    pub fn flip<E: Engine>(&self, bit: u64) -> Result<Outcomes, String> {
        let mut byte = [0];
        self.st.view().read(bit / 8, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        let what = || format!("bit {} of byte {}", bit % 8, bit / 8);
        self.damaged::<E>(bit / 8, &byte, &what)
    }

    /// Replaces bytes and looks: an error, or what the disk may hold.
    pub fn damaged<E: Engine>(
        &self,
        offset: u64,
        bytes: &[u8],
        what: &dyn Fn() -> String,
    ) -> Result<Outcomes, String> {
        let run = || self.look::<E>(offset, bytes);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        result
            .unwrap_or_else(|_| Err("panic (see above)".to_owned()))
            .map_err(|why| format!("P6 VIOLATION after damage of {}: {why}", what()))
    }

    fn look<E: Engine>(&self, offset: u64, bytes: &[u8]) -> Result<Outcomes, String> {
        let mut outcomes = Outcomes { damages: 1, ..Outcomes::default() };
        let mut st = self.st.clone();
        st.damage(offset, bytes);
        match E::check(&mut st.clone()) {
            Ok(verdict) if verdict.corruptions.is_empty() => {}
            _ => outcomes.checked = 1,
        }
        let model = crate::model::Model::new(0, 512);
        let Ok(mut session) = Session::<E>::open(st, model, &self.config) else {
            outcomes.refused = 1;
            return Ok(outcomes);
        };
        let Ok(data) = session.read_all() else {
            outcomes.unreadable = 1;
            return Ok(outcomes);
        };
        let same = self.expect.compare(session.disk.size(), &data);
        same.map_err(|(_, why)| why)?;
        outcomes.harmless = 1;
        Ok(outcomes)
    }
}
