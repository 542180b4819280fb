//! What each sector may hold: the history of a disk as its user sees it.
//!
//! Each sector (and the size of the disk) is a register with versions. A version is a write with the
//! moment of its submission and of its end. Of two writes that were under way together either may
//! stay; a write submitted after another had ended supersedes it. From that follow the values that a
//! read may return, the values that may be there after the daemon died (P2: every completed write
//! counts) and after the host died (P1, P3: what a returned flush covered counts, later ones may).

use crate::api::{Request, RequestError, RequestId, SECTOR};
use crate::host_file::mix;
use crate::stamp::{self, Found};
use crate::storage::Death;
use std::collections::BTreeMap;

const UNDER_WAY: u64 = u64::MAX;

/// A value that a register was given.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// Generation; 0 is zeroes. For the size: bytes.
    value: u64,
    submit: u64,
    end: u64,
    /// It took place: what ended before it was submitted is superseded.
    solid: bool,
    /// It took place durably.
    durable: bool,
    request: u64,
}

#[derive(Clone, Debug, Default)]
struct Register {
    versions: Vec<Version>,
}

impl Register {
    fn new(value: u64) -> Self {
        let first = Version { value, submit: 0, end: 0, solid: true, durable: true, request: 0 };
        Register { versions: vec![first] }
    }

    /// The values that may be read by a read submitted at `since`, or later.
    fn readable(&self, since: u64) -> Vec<u64> {
        if let [only] = self.versions[..] {
            return vec![only.value];
        }
        let over = |w: &Version| {
            let beats = |x: &Version| x.solid && x.end < since && w.end < x.submit;
            self.versions.iter().any(beats)
        };
        let mut values: Vec<u64> =
            self.versions.iter().filter(|w| !over(w)).map(|w| w.value).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    /// Forgets what can never be seen again; `horizon` is when the oldest read under way began.
    fn prune(&mut self, horizon: u64) {
        if self.versions.len() > 1 {
            let copy = self.versions.clone();
            self.versions
                .retain(|w| !copy.iter().any(|x| x.durable && x.end < horizon && w.end < x.submit));
        }
    }

    fn quiet(&self) -> bool {
        self.versions.iter().all(|v| v.end != UNDER_WAY)
    }

    /// From now on this value is what is there.
    fn settle_on(&mut self, value: u64, now: u64) {
        let candidates = self.readable(now);
        if candidates.len() > 1 {
            let durable =
                self.versions.iter().filter(|v| candidates.contains(&v.value)).all(|v| v.durable);
            self.versions.push(Version {
                value,
                submit: now,
                end: now,
                solid: true,
                durable,
                request: 0,
            });
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    request: Request,
    submit: u64,
}

/// What an image may look like: per sector the values allowed. Sectors not named hold zeroes.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Sizes allowed, in bytes.
    pub sizes: Vec<u64>,
    /// Sectors that were ever touched, and what they may hold.
    pub sectors: BTreeMap<u64, Vec<u64>>,
    /// Equal hashes, equal expectations.
    pub hash: u64,
}

/// The history of one disk.
#[derive(Clone, Debug)]
pub struct Model {
    block_sectors: u64,
    clock: u64,
    next_id: u64,
    size: Register,
    sectors: BTreeMap<u64, Register>,
    under_way: BTreeMap<RequestId, UnderWay>,
    /// A sync failed: what was not durable is uncertain for ever.
    sync_lost: bool,
}

impl Model {
    /// A new disk, all zeroes.
    pub fn new(size: u64, block_size: u64) -> Self {
        Model {
            block_sectors: block_size / SECTOR,
            clock: 1,
            next_id: 1,
            size: Register::new(size),
            sectors: BTreeMap::new(),
            under_way: BTreeMap::new(),
            sync_lost: false,
        }
    }

    /// A number that changes with every event.
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// A name for the next request; a write's generation is its name.
    pub fn next_id(&mut self) -> RequestId {
        self.next_id += 1;
        RequestId(self.next_id)
    }

    /// The size, when there is no doubt about it.
    pub fn size(&self) -> u64 {
        self.size.readable(self.clock + 1).first().copied().unwrap_or(0)
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// The requests under way.
    pub fn requests(&self) -> Vec<(u64, Request)> {
        self.under_way.iter().map(|(id, under_way)| (id.0, under_way.request)).collect()
    }

    /// A request under way.
    pub fn request(&self, id: RequestId) -> Option<Request> {
        self.under_way.get(&id).map(|u| u.request)
    }

    /// True when a sync has failed in this history.
    pub fn sync_lost(&self) -> bool {
        self.sync_lost
    }

    /// Notes that a sync of the storage failed.
    pub fn note_lost_sync(&mut self) {
        self.sync_lost = true;
    }

    fn register(&mut self, sector: u64) -> &mut Register {
        self.sectors.entry(sector).or_insert_with(|| Register::new(0))
    }

    fn add(&mut self, sector: u64, value: u64, id: RequestId) {
        let version = Version {
            value,
            submit: self.clock,
            end: UNDER_WAY,
            solid: false,
            durable: false,
            request: id.0,
        };
        self.register(sector).versions.push(version);
    }

    /// A request is about to be submitted.
    pub fn submit(&mut self, id: RequestId, request: Request) {
        self.clock += 1;
        match request {
            Request::Write { offset, len, .. } => {
                for sector in offset / SECTOR..(offset + len) / SECTOR {
                    self.add(sector, id.0, id);
                }
            }
            Request::WriteZeroes { offset, len, .. } => {
                for sector in offset / SECTOR..(offset + len) / SECTOR {
                    self.add(sector, 0, id);
                }
            }
            Request::Discard { offset, len } => {
                for sector in self.discarded(offset, len) {
                    self.add(sector, 0, id);
                }
            }
            Request::Resize { size } => {
                self.clock += 1;
                let version = Version {
                    value: size,
                    submit: self.clock,
                    end: UNDER_WAY,
                    solid: false,
                    durable: false,
                    request: id.0,
                };
                self.size.versions.push(version);
                let cut: Vec<u64> = self.sectors.range(size / SECTOR..).map(|(s, _)| *s).collect();
                for sector in cut {
                    self.add(sector, 0, id);
                }
            }
            Request::Read { .. }
            | Request::Flush
            | Request::Checkpoint
            | Request::Freeze
            | Request::Defragment { .. } => {}
        }
        self.under_way.insert(id, UnderWay { request, submit: self.clock });
    }

    /// Sectors that a discard makes zero: those of whole blocks, and of the block that the end of the
    /// disk cuts.
    fn discarded(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let block = self.block_sectors;
        let (start, end) = (offset / SECTOR, (offset + len) / SECTOR);
        let first = start.next_multiple_of(block);
        let last = end / block * block;
        // The last block of a disk may be cut: whether it counts as whole is left open.
        let last = if end == self.size() / SECTOR { end } else { last };
        first.min(last)..last
    }

    fn in_cut_block(&self, sector: u64) -> bool {
        let end = self.size() / SECTOR;
        sector >= end / self.block_sectors * self.block_sectors && sector < end
    }

    /// A request ended; `data` is what a read got. An `Err` is a violation.
    pub fn finish(
        &mut self,
        id: RequestId,
        result: Result<(), RequestError>,
        data: &[u8],
    ) -> Result<(), String> {
        self.clock += 1;
        let ended = self.under_way.remove(&id);
        let Some(UnderWay { request, submit }) = ended else {
            return Err(format!("request {} ended that was not under way", id.0));
        };
        let ok = result.is_ok();
        match request {
            Request::Read { offset, .. } => {
                if ok {
                    self.check_read(offset / SECTOR, data, submit)?;
                }
            }
            Request::Flush => {
                if ok {
                    self.made_durable(submit);
                }
            }
            Request::Checkpoint | Request::Freeze | Request::Defragment { .. } => {}
            Request::Write { offset, len, durable }
            | Request::WriteZeroes { offset, len, durable, .. } => {
                self.end_versions(offset / SECTOR..(offset + len) / SECTOR, id, ok, durable);
            }
            Request::Discard { offset, len } => {
                let range = self.discarded(offset, len);
                for sector in range {
                    let sure = ok
                        && (!self.in_cut_block(sector)
                            || (self.size() / SECTOR).is_multiple_of(self.block_sectors));
                    self.end_versions(sector..sector + 1, id, sure, false);
                }
            }
            Request::Resize { size } => {
                let end = self.clock;
                for version in &mut self.size.versions {
                    if version.request == id.0 {
                        version.end = end;
                        version.solid = ok;
                    }
                }
                self.end_versions(size / SECTOR..u64::MAX, id, ok, false);
            }
        }
        self.prune();
        Ok(())
    }

    fn end_versions(
        &mut self,
        range: std::ops::Range<u64>,
        id: RequestId,
        ok: bool,
        durable: bool,
    ) {
        let end = self.clock;
        for (_, register) in self.sectors.range_mut(range) {
            for version in &mut register.versions {
                if version.request == id.0 && version.end == UNDER_WAY {
                    version.end = end;
                    version.solid = ok;
                    version.durable = ok && durable;
                }
            }
        }
    }

    /// What ended before `before` is durable.
    fn made_durable(&mut self, before: u64) {
        for register in self.sectors.values_mut().chain([&mut self.size]) {
            for version in &mut register.versions {
                version.durable |= version.solid && version.end < before;
            }
        }
    }

    /// The image was closed cleanly: all is durable.
    pub fn closed(&mut self) {
        self.clock += 1;
        self.made_durable(self.clock);
        self.prune();
    }

    fn prune(&mut self) {
        let reads = self.under_way.values().filter(|u| matches!(u.request, Request::Read { .. }));
        let horizon = reads.map(|u| u.submit).min().unwrap_or(u64::MAX);
        for register in self.sectors.values_mut().chain([&mut self.size]) {
            register.prune(horizon);
        }
    }

    fn check_read(&mut self, first: u64, data: &[u8], submit: u64) -> Result<(), String> {
        let zero = [0];
        for (index, bytes) in data.chunks_exact(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            let allowed = self.sectors.get(&sector).map_or(zero.to_vec(), |r| r.readable(submit));
            let value = judge(sector, bytes, &allowed)
                .map_err(|why| format!("a read returned wrong data: {why}{}", self.why(sector)))?;
            let (now, lost) = (self.clock, self.sync_lost);
            if let Some(register) = self.sectors.get_mut(&sector)
                && !lost
                && register.quiet()
                && register.versions.iter().all(|v| v.end < submit)
            {
                register.settle_on(value, now);
            }
        }
        Ok(())
    }

    /// The history of a sector, for a failure's report.
    pub fn why(&self, sector: u64) -> String {
        let Some(register) = self.sectors.get(&sector) else { return String::new() };
        let mut text = format!("\n  history of sector {sector} (now {}):", self.clock);
        for v in &register.versions {
            let end = if v.end == UNDER_WAY { "-".to_owned() } else { v.end.to_string() };
            let state = match (v.durable, v.solid) {
                (true, _) => "durable",
                (false, true) => "complete",
                (false, false) => "uncertain",
            };
            text += &format!("\n    value {} submitted {} ended {end} {state}", v.value, v.submit);
        }
        text
    }

    /// The history as it is after a death.
    pub fn after(&self, death: Death) -> Model {
        let mut model = self.clone();
        model.clock += 1;
        let now = model.clock;
        model.under_way.clear();
        let keeps = death == Death::Process && !self.sync_lost;
        for register in model.sectors.values_mut().chain([&mut model.size]) {
            for version in &mut register.versions {
                version.end = version.end.min(now);
                version.solid = version.durable || (version.solid && keeps);
            }
            register.prune(u64::MAX);
        }
        model
    }

    /// What may be read now, nothing being under way.
    pub fn expect(&self) -> Expect {
        let since = self.clock + 1;
        let sizes = self.size.readable(since);
        let mut hash = sizes.iter().fold(0, |h, s| mix(h ^ s));
        let mut sectors = BTreeMap::new();
        for (sector, register) in &self.sectors {
            let values = register.readable(since);
            hash = values.iter().fold(mix(hash ^ sector), |h, v| mix(h ^ v));
            sectors.insert(*sector, values);
        }
        Expect { sizes, sectors, hash }
    }

    /// What was found after a death becomes what is there, until the next write.
    pub fn observe(&mut self, size: u64, found: &[(u64, u64)]) {
        if self.sync_lost {
            return;
        }
        self.clock += 1;
        let now = self.clock;
        self.size.settle_on(size, now);
        for (sector, value) in found {
            if let Some(register) = self.sectors.get_mut(sector) {
                register.settle_on(*value, now);
            }
        }
        // What lies past the end is zero if the disk grows again.
        for (_, register) in self.sectors.range_mut(size / SECTOR..) {
            register.versions.push(Version {
                value: 0,
                submit: now,
                end: now,
                solid: true,
                durable: false,
                request: 0,
            });
        }
    }
}

fn judge(sector: u64, bytes: &[u8], allowed: &[u64]) -> Result<u64, String> {
    let found = stamp::identify(sector, bytes);
    let value = match found {
        Found::Zero => 0,
        Found::Generation(generation) => generation,
        Found::Misplaced { sector: owner, generation } => {
            return Err(format!(
                "sector {sector} holds the data of sector {owner}, generation {generation} \
                 (allowed: {allowed:?})"
            ));
        }
        Found::Garbage => {
            return Err(format!(
                "sector {sector} holds what no guest wrote (allowed: {allowed:?}): {:02x?}",
                &bytes[..32]
            ));
        }
    };
    if allowed.contains(&value) {
        Ok(value)
    } else {
        let what = if value == 0 { "zeroes".to_owned() } else { format!("generation {value}") };
        Err(format!("sector {sector} holds {what}, allowed are {allowed:?} (0 is zeroes)"))
    }
}

impl Expect {
    /// Compares a whole disk; yields what touched sectors hold.
    pub fn compare(&self, size: u64, data: &[u8]) -> Result<Vec<(u64, u64)>, (u64, String)> {
        if !self.sizes.contains(&size) {
            let text = format!("the disk has {size} bytes, allowed are {:?}", self.sizes);
            return Err((u64::MAX, text));
        }
        let mut found = Vec::new();
        for (index, bytes) in data.chunks_exact(SECTOR as usize).enumerate() {
            let sector = index as u64;
            match self.sectors.get(&sector) {
                Some(allowed) => {
                    let value = judge(sector, bytes, allowed).map_err(|why| (sector, why))?;
                    found.push((sector, value));
                }
                None => {
                    judge(sector, bytes, &[0]).map_err(|why| (sector, why))?;
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64) -> Request {
        Request::Write { offset, len: 512, durable: false }
    }

    fn allowed(model: &Model, sector: u64) -> Vec<u64> {
        model.expect().sectors.get(&sector).cloned().unwrap_or(vec![0])
    }

    fn done(model: &mut Model, id: u64) {
        model.finish(RequestId(id), Ok(()), &[]).expect("was under way");
    }

    #[test]
    fn flushed_values_stay_later_ones_may_come() {
        let mut model = Model::new(1 << 20, 4096);
        model.submit(RequestId(2), write(0));
        done(&mut model, 2);
        assert_eq!(allowed(&model.after(Death::Process), 0), [2]);
        assert_eq!(allowed(&model.after(Death::Host), 0), [0, 2]);
        model.submit(RequestId(3), Request::Flush);
        model.submit(RequestId(4), write(0));
        done(&mut model, 3);
        assert_eq!(allowed(&model.after(Death::Host), 0), [2, 4]);
        done(&mut model, 4);
        assert_eq!(allowed(&model.after(Death::Host), 0), [2, 4]);
        assert_eq!(allowed(&model.after(Death::Process), 0), [4]);
    }

    #[test]
    fn a_flush_covers_only_what_ended_before_it() {
        let mut model = Model::new(1 << 20, 4096);
        model.submit(RequestId(2), write(0));
        model.submit(RequestId(3), Request::Flush);
        done(&mut model, 2);
        done(&mut model, 3);
        assert_eq!(allowed(&model.after(Death::Host), 0), [0, 2]);
    }

    #[test]
    fn writes_under_way_together_land_in_either_order() {
        let mut model = Model::new(1 << 20, 4096);
        model.submit(RequestId(2), write(0));
        model.submit(RequestId(3), write(0));
        done(&mut model, 3);
        done(&mut model, 2);
        assert_eq!(allowed(&model.after(Death::Process), 0), [2, 3]);
        model.submit(RequestId(4), write(0));
        done(&mut model, 4);
        assert_eq!(allowed(&model.after(Death::Process), 0), [4]);
    }

    #[test]
    fn what_was_found_stays() {
        let mut model = Model::new(1 << 20, 4096);
        model.submit(RequestId(2), write(0));
        let mut model = model.after(Death::Process);
        assert_eq!(allowed(&model, 0), [0, 2]);
        model.observe(1 << 20, &[(0, 2)]);
        assert_eq!(allowed(&model, 0), [2]);
        assert_eq!(allowed(&model.after(Death::Host), 0), [0, 2]);
    }

    #[test]
    fn a_discard_spares_parts_of_blocks() {
        let mut model = Model::new(1 << 20, 4096);
        model.submit(RequestId(2), Request::Write { offset: 0, len: 16384, durable: true });
        done(&mut model, 2);
        model.submit(RequestId(3), Request::Discard { offset: 512, len: 8192 });
        done(&mut model, 3);
        assert_eq!(allowed(&model, 7), [2]);
        assert_eq!(allowed(&model, 8), [0]);
        assert_eq!(allowed(&model, 16), [2]);
        assert_eq!(allowed(&model.after(Death::Host), 8), [0, 2]);
    }

    #[test]
    fn a_read_sees_old_or_new_but_nothing_older() {
        let mut model = Model::new(1 << 20, 4096);
        for id in 2..4 {
            model.submit(RequestId(id), write(0));
            done(&mut model, id);
        }
        model.submit(RequestId(4), write(0));
        let read = Request::Read { offset: 0, len: 512 };
        for (id, generation, good) in [(5, 3, true), (6, 4, true), (7, 2, false), (8, 0, false)] {
            model.submit(RequestId(id), read);
            let data = match generation {
                0 => vec![0; 512],
                generation => stamp::data(0, 1, generation),
            };
            assert_eq!(model.finish(RequestId(id), Ok(()), &data).is_ok(), good, "{generation}");
        }
    }
}
