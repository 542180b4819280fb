//! A storage with a volatile cache, out-of-order completion, injected errors and crash points.
//!
//! What the host may do is exactly what [`crate::api::Storage`] says it may:
//! * an operation takes effect at some moment between its submission and its completion, a write
//!   sector by sector; overlapping ones in any order;
//! * a sync makes durable what completed before the sync was submitted, nothing else surely;
//! * until then a crash of the host keeps any subset of the effects, writes and punches torn at 512
//!   bytes, length changes apart from data;
//! * a failed sync drops or keeps each unsynced effect; reads may still show what was dropped, and no
//!   later sync brings it back;
//! * the death of the process loses nothing that took effect, and operations under way may still land.

use crate::api::{
    Completion, Done, Geometry, Op, RequestId, SECTOR, Segment, Storage, StorageError, Token,
};
use crate::host_file::{HostFile, PAGE, mix};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Kinds of calls that an error can be injected into.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[allow(missing_docs, reason = "each is named after its operation")]
pub enum CallKind {
    ReadBytes,
    ReadRequest,
    Write,
    Punch,
    Allocate,
    SetLen,
    Sync,
    NextData,
    FileLen,
    ReadLog,
    CreateLog,
}

impl CallKind {
    /// Every kind.
    pub const ALL: [CallKind; 11] = [
        CallKind::ReadBytes,
        CallKind::ReadRequest,
        CallKind::Write,
        CallKind::Punch,
        CallKind::Allocate,
        CallKind::SetLen,
        CallKind::Sync,
        CallKind::NextData,
        CallKind::FileLen,
        CallKind::ReadLog,
        CallKind::CreateLog,
    ];

    fn of(op: &Op) -> CallKind {
        match op {
            Op::ReadBytes { .. } => CallKind::ReadBytes,
            Op::ReadRequest { .. } => CallKind::ReadRequest,
            Op::Write { .. } => CallKind::Write,
            Op::Punch { .. } => CallKind::Punch,
            Op::Allocate { .. } => CallKind::Allocate,
            Op::SetLen { .. } => CallKind::SetLen,
            Op::Sync => CallKind::Sync,
            Op::NextData { .. } => CallKind::NextData,
        }
    }
}

/// An error to inject: the `nth` call of a kind from now (1 = the next) fails, and with
/// `persistent` all later ones of that kind too.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which calls.
    pub kind: CallKind,
    /// Which of them fails first, counted from 1.
    pub nth: u64,
    /// How.
    pub error: StorageError,
    /// All later ones too.
    pub persistent: bool,
}

/// An effect on the file.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes stored; the length is a change of its own.
    Write {
        /// Position.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The length becomes at least this.
    Extend(u64),
    /// The length becomes this.
    SetLen(u64),
    /// A range given back.
    Punch {
        /// Position.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Change {
    /// Applies all of it.
    pub fn apply(&self, file: &mut HostFile) {
        match self {
            Change::Write { offset, data } => file.write(*offset, data),
            Change::Extend(len) => file.extend(*len),
            Change::SetLen(len) => file.set_len(*len),
            Change::Punch { offset, len } => file.punch(*offset, *len),
        }
    }

    /// Number of sectors at which it may tear; 0 when it is atomic.
    pub fn sectors(&self) -> u64 {
        match self {
            Change::Write { data, .. } => data.len() as u64 / SECTOR,
            Change::Punch { len, .. } => len / SECTOR,
            Change::Extend(_) | Change::SetLen(_) => 0,
        }
    }

    /// Applies the sectors for which `keep` is true.
    pub fn apply_torn(&self, file: &mut HostFile, keep: &mut dyn FnMut(u64) -> bool) {
        for sector in 0..self.sectors() {
            if !keep(sector) {
                continue;
            }
            let from = sector * SECTOR;
            match self {
                Change::Write { offset, data } => {
                    file.write(offset + from, &data[from as usize..(from + SECTOR) as usize]);
                }
                Change::Punch { offset, .. } => file.punch(offset + from, SECTOR),
                Change::Extend(_) | Change::SetLen(_) => {}
            }
        }
    }
}

/// An effect that took place and is not surely durable.
#[derive(Clone, Debug)]
struct Effect {
    change: Change,
    op: u64,
    completed: Option<u64>,
    durable: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Submitted,
    Partly,
    Applied,
}

/// An operation under way.
#[derive(Clone, Debug)]
struct Pending {
    token: Token,
    serial: u64,
    submitted: u64,
    op: Op,
    data: Option<Arc<[u8]>>,
    fault: Option<StorageError>,
    stage: Stage,
    result: Result<Done, StorageError>,
}

impl Pending {
    /// What it does to the file, given the length it finds.
    fn changes(&self, file: &HostFile) -> Vec<Change> {
        match &self.op {
            Op::Write { offset, .. } => {
                let data = self.data.clone().unwrap_or_default();
                let end = offset + data.len() as u64;
                let mut changes = vec![Change::Write { offset: *offset, data }];
                if end > file.len() {
                    changes.push(Change::Extend(end));
                }
                changes
            }
            Op::Punch { offset, len } => vec![Change::Punch { offset: *offset, len: *len }],
            Op::SetLen { len } => vec![Change::SetLen(*len)],
            _ => Vec::new(),
        }
    }
}

/// The completion log: memory of the host.
#[derive(Clone)]
pub struct LogFile {
    /// Its bytes.
    pub bytes: HostFile,
    uuid: [u8; 16],
}

/// Where in the run of operations a crash point lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PointKind {
    /// An operation was just submitted.
    Submit(CallKind),
    /// In the middle of storing bytes into the completion log.
    StoreLog,
    /// Before the completion log is created or replaced.
    CreateLog,
    /// Before the completion log is removed.
    RemoveLog,
    /// After a step of the driver.
    Step,
}

/// Everything a crash leaves something of.
#[derive(Clone)]
pub struct Point {
    /// Where the crash happens.
    pub kind: PointKind,
    durable: HostFile,
    view: HostFile,
    effects: VecDeque<Effect>,
    pending: Vec<Pending>,
    log: Option<LogFile>,
    log_store: Option<(u64, Arc<[u8]>)>,
    lost: bool,
    environment: Environment,
}

/// What outlives every crash.
#[derive(Clone, Debug)]
struct Environment {
    geometry: Geometry,
    boot: u64,
    capacity: Option<u64>,
    punch_unsupported: bool,
}

/// Host death or process death.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Death {
    /// The completion log is gone, any subset of unsynced effects survives.
    Host,
    /// Page cache and completion log stay; what was under way may or may not land.
    Process,
}

/// Which of the possible images a crash leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Who died.
    pub death: Death,
    /// Which optional effects survive, in order.
    pub keep: Vec<bool>,
    /// Not 0: effects that survive are torn as this seed says.
    pub tear: u64,
    /// How much of a log store under way survives: 0 nothing, 1 all, else a seed for a part.
    pub log: u64,
    /// What was under way lands in reverse order.
    pub reverse: bool,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let death = if self.death == Death::Host { 'h' } else { 'p' };
        let keep: String = self.keep.iter().map(|k| if *k { '1' } else { '0' }).collect();
        let reverse = if self.reverse { "r" } else { "" };
        write!(f, "{death}:{keep}:{:x}:{:x}{reverse}", self.tear, self.log)
    }
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let (text, reverse) = match text.strip_suffix('r') {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [death, keep, tear, log] = parts[..] else {
            return Err(format!("{text:?} is not death:keep:tear:log"));
        };
        let number = |s| u64::from_str_radix(s, 16).map_err(|e| e.to_string());
        Ok(Choice {
            death: if death == "h" { Death::Host } else { Death::Process },
            keep: keep.chars().map(|c| c == '1').collect(),
            tear: number(tear)?,
            log: number(log)?,
            reverse,
        })
    }
}

impl Point {
    /// Number of effects a crash may keep or lose.
    pub fn optional(&self, death: Death) -> usize {
        self.optional_changes(death).len()
    }

    /// True when the point is in the middle of a store into the completion log.
    pub fn storing_log(&self) -> bool {
        self.log_store.is_some()
    }

    /// True when several operations that change the file are under way.
    pub fn several_under_way(&self) -> bool {
        self.pending.iter().filter(|p| !p.changes(&self.view).is_empty()).count() > 1
    }

    fn optional_changes(&self, death: Death) -> Vec<Change> {
        let mut changes = Vec::new();
        if death == Death::Host {
            changes.extend(self.effects.iter().filter(|e| !e.durable).map(|e| e.change.clone()));
        }
        let mut len_file = self.view.clone();
        for pending in self.pending.iter().filter(|p| p.stage != Stage::Applied) {
            for change in pending.changes(&len_file) {
                if let Change::Extend(len) = change {
                    len_file.extend(len);
                    if death == Death::Process {
                        // A process that dies does not split a write from its length.
                        continue;
                    }
                }
                changes.push(change);
            }
        }
        changes
    }

    /// Describes the optional effects, for a failure's report.
    pub fn describe(&self, death: Death) -> String {
        let mut lines = Vec::new();
        for (index, change) in self.optional_changes(death).iter().enumerate() {
            let text = match change {
                Change::Write { offset, data } => format!("write {offset}+{}", data.len()),
                Change::Extend(len) => format!("length >= {len}"),
                Change::SetLen(len) => format!("length = {len}"),
                Change::Punch { offset, len } => format!("punch {offset}+{len}"),
            };
            lines.push(format!("    optional {index}: {text}"));
        }
        lines.join("\n")
    }

    /// What a crash leaves: the storage that the next owner of the image finds.
    pub fn crash(&self, choice: &Choice) -> SimStorage {
        let mut keep = choice.keep.iter().copied().chain(std::iter::repeat(false));
        let mut tear = fastrand::Rng::with_seed(choice.tear);
        let mut land = |file: &mut HostFile, change: &Change| {
            if choice.tear != 0 && change.sectors() > 1 && tear.bool() {
                tear_change(file, change, &mut tear);
            } else {
                change.apply(file);
            }
        };
        let mut environment = self.environment.clone();
        if choice.death == Death::Host {
            let mut file = self.durable.clone();
            for effect in &self.effects {
                if effect.durable {
                    effect.change.apply(&mut file);
                } else if keep.next() == Some(true) {
                    land(&mut file, &effect.change);
                }
            }
            for change in self.under_way(choice, &mut keep) {
                land(&mut file, &change);
            }
            file.cut();
            environment.boot += 1;
            return SimStorage::from_parts(file.clone(), file, VecDeque::new(), None, environment);
        }
        // A new owner's sync covers what its predecessor left behind.
        let mut effects = self.effects.clone();
        for effect in &mut effects {
            (effect.op, effect.completed) = (u64::MAX, Some(0));
        }
        let mut view = self.view.clone();
        if self.lost && mix(choice.tear ^ choice.log ^ self.effects.len() as u64) & 1 == 1 {
            // What a failed sync dropped has left the page cache too.
            view = self.durable.clone();
            effects.iter().for_each(|e| e.change.apply(&mut view));
            view.cut();
        }
        for change in self.under_way(choice, &mut keep) {
            let torn = choice.tear != 0 && change.sectors() > 1 && tear.bool();
            let change = if torn { some_part(&change, &mut tear) } else { change };
            let end = match &change {
                Change::Write { offset, data } if !data.is_empty() => offset + data.len() as u64,
                _ => 0,
            };
            let length = (end > view.len()).then_some(Change::Extend(end));
            for change in std::iter::once(change).chain(length) {
                change.apply(&mut view);
                effects.push_back(landed(change));
            }
        }
        view.cut();
        let log = self.log_after(choice);
        SimStorage::from_parts(self.durable.clone(), view, effects, log, environment)
    }

    /// The changes under way that land, in the order in which they do.
    fn under_way(&self, choice: &Choice, keep: &mut dyn Iterator<Item = bool>) -> Vec<Change> {
        let mut len_file = self.view.clone();
        let mut landing = Vec::new();
        for pending in self.pending.iter().filter(|p| p.stage != Stage::Applied) {
            let mut kept = Vec::new();
            for change in pending.changes(&len_file) {
                if let Change::Extend(len) = change {
                    len_file.extend(len);
                    if choice.death == Death::Process {
                        continue;
                    }
                }
                if keep.next() == Some(true) {
                    kept.push(change);
                }
            }
            landing.push(kept);
        }
        if choice.reverse {
            landing.reverse();
        }
        landing.into_iter().flatten().collect()
    }

    fn log_after(&self, choice: &Choice) -> Option<LogFile> {
        let mut log = self.log.clone()?;
        let Some((offset, bytes)) = &self.log_store else { return Some(log) };
        match choice.log {
            0 => {}
            1 => log.bytes.write(*offset, bytes),
            seed => {
                let mut rng = fastrand::Rng::with_seed(seed);
                let prefix = rng.bool().then(|| rng.usize(0..=bytes.len()));
                for (index, byte) in bytes.iter().enumerate() {
                    if prefix.map_or_else(|| rng.bool(), |p| index < p) {
                        log.bytes.write(offset + index as u64, &[*byte]);
                    }
                }
            }
        }
        Some(log)
    }
}

fn landed(change: Change) -> Effect {
    Effect { change, op: u64::MAX, completed: Some(0), durable: false }
}

/// The given sectors of a change.
fn part_of(change: &Change, sectors: Range<u64>) -> Change {
    let (from, to) = (sectors.start * SECTOR, sectors.end * SECTOR);
    match change {
        Change::Write { offset, data } => {
            Change::Write { offset: offset + from, data: data[from as usize..to as usize].into() }
        }
        Change::Punch { offset, .. } => Change::Punch { offset: offset + from, len: to - from },
        Change::Extend(len) => Change::Extend(*len),
        Change::SetLen(len) => Change::SetLen(*len),
    }
}

/// Some run of a change's sectors, perhaps none.
fn some_part(change: &Change, rng: &mut fastrand::Rng) -> Change {
    let end = rng.u64(0..=change.sectors());
    let start = if rng.bool() { 0 } else { rng.u64(0..=end) };
    part_of(change, start..end)
}

/// Tears a change in one of the ways a host does: a prefix, single sectors, or whole pages.
fn tear_change(file: &mut HostFile, change: &Change, rng: &mut fastrand::Rng) {
    let sectors = change.sectors();
    match rng.u8(0..3) {
        0 => {
            let prefix = rng.u64(0..=sectors);
            change.apply_torn(file, &mut |sector| sector < prefix);
        }
        1 => change.apply_torn(file, &mut |_| rng.bool()),
        _ => {
            let salt = rng.u64(..);
            change.apply_torn(file, &mut |sector| mix(salt ^ (sector / 8)) & 1 == 1);
        }
    }
}

/// The simulated storage.
#[derive(Clone)]
pub struct SimStorage {
    durable: HostFile,
    view: HostFile,
    effects: VecDeque<Effect>,
    pending: Vec<Pending>,
    log: Option<LogFile>,
    environment: Environment,
    buffers: BTreeMap<RequestId, Vec<u8>>,
    rng: fastrand::Rng,
    clock: u64,
    serial: u64,
    faults: Vec<Fault>,
    fired: u64,
    sync_failed: bool,
    sync_failure_known: bool,
    lost: bool,
    reserved: BTreeSet<u64>,
    recording: bool,
    points: Vec<Point>,
    trace: u64,
    trace_text: Option<Vec<String>>,
    violations: Vec<String>,
    calls: BTreeMap<CallKind, u64>,
}

impl SimStorage {
    /// An empty file on a host of this geometry. A device (`fixed_length`) needs [`Self::device`].
    pub fn new(geometry: Geometry) -> Self {
        let environment =
            Environment { geometry, boot: 1, capacity: None, punch_unsupported: false };
        Self::from_parts(HostFile::new(), HostFile::new(), VecDeque::new(), None, environment)
    }

    /// A block device of `len` bytes full of other people's data.
    pub fn device(geometry: Geometry, len: u64) -> Self {
        let environment =
            Environment { geometry, boot: 1, capacity: None, punch_unsupported: false };
        let file = HostFile::poisoned(len);
        Self::from_parts(file.clone(), file, VecDeque::new(), None, environment)
    }

    fn from_parts(
        durable: HostFile,
        view: HostFile,
        effects: VecDeque<Effect>,
        log: Option<LogFile>,
        environment: Environment,
    ) -> Self {
        SimStorage {
            durable,
            view,
            effects,
            pending: Vec::new(),
            log,
            environment,
            buffers: BTreeMap::new(),
            rng: fastrand::Rng::with_seed(1),
            clock: 1,
            serial: 0,
            faults: Vec::new(),
            fired: 0,
            sync_failed: false,
            sync_failure_known: false,
            lost: false,
            reserved: BTreeSet::new(),
            recording: false,
            points: Vec::new(),
            trace: 0,
            trace_text: None,
            violations: Vec::new(),
            calls: BTreeMap::new(),
        }
    }

    /// Seeds the order in which [`Storage::wait`] ends operations and everything else left to chance.
    pub fn seed(&mut self, seed: u64) {
        self.rng = fastrand::Rng::with_seed(seed);
    }

    /// Limits the host's space to this many pages of data; `None` lifts the limit.
    pub fn set_capacity(&mut self, pages: Option<u64>) {
        self.environment.capacity = pages;
    }

    /// Pages of data the file holds.
    pub fn data_pages(&self) -> u64 {
        self.view.data_pages()
    }

    /// Makes punches fail as on a host that cannot.
    pub fn set_punch_unsupported(&mut self, unsupported: bool) {
        self.environment.punch_unsupported = unsupported;
    }

    /// Adds an error to inject, counted from now.
    pub fn inject(&mut self, fault: Fault) {
        let so_far = self.calls.get(&fault.kind).copied().unwrap_or(0);
        self.faults.push(Fault { nth: so_far + fault.nth, ..fault });
    }

    /// Ends the injection.
    pub fn lift_faults(&mut self) {
        self.faults.clear();
    }

    /// How many injected errors were delivered.
    pub fn fired(&self) -> u64 {
        self.fired
    }

    /// True once a sync failed, whether or not its submitter knows already.
    pub fn sync_failed(&self) -> bool {
        self.sync_failed
    }

    /// True once the failure of a sync was delivered.
    pub fn sync_failure_known(&self) -> bool {
        self.sync_failure_known
    }

    /// How many calls of a kind were made.
    pub fn calls(&self, kind: CallKind) -> u64 {
        self.calls.get(&kind).copied().unwrap_or(0)
    }

    /// Switches the recording of crash points.
    pub fn record_points(&mut self, on: bool) {
        self.recording = on;
    }

    /// The crash points since the last call.
    pub fn take_points(&mut self) -> Vec<Point> {
        std::mem::take(&mut self.points)
    }

    /// Records a crash point here, between two steps of the driver.
    pub fn mark(&mut self) {
        self.record(PointKind::Step, None);
    }

    /// Breaches of the storage's contract by its user.
    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    /// Hash of everything that happened, in order.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// Keeps the trace as text too.
    pub fn keep_trace_text(&mut self) {
        self.trace_text = Some(Vec::new());
    }

    /// The text kept since the last call.
    pub fn take_trace_text(&mut self) -> Vec<String> {
        match &mut self.trace_text {
            Some(lines) => std::mem::take(lines),
            None => Vec::new(),
        }
    }

    /// Hash of what the storage holds, durable and not: equal hashes, equal fates.
    pub fn state_hash(&self) -> u64 {
        let log = self.log.as_ref().map_or(1, |log| log.bytes.hash());
        mix(self.durable.hash()) ^ self.view.hash() ^ mix(log ^ 77)
    }

    /// The crash image's bytes as the next owner reads them.
    pub fn view(&self) -> &HostFile {
        &self.view
    }

    /// Changes a byte of the image behind everyone's back (damage).
    pub fn damage(&mut self, offset: u64, bytes: &[u8]) {
        for file in [&mut self.view, &mut self.durable] {
            file.write(offset, bytes);
        }
    }

    /// Makes everything durable, as if the host had been idle for long. Nothing may be under way.
    pub fn settle(&mut self) {
        assert!(self.pending.is_empty(), "operations under way cannot settle");
        self.effects.clear();
        self.durable = self.view.clone();
    }

    /// True when a log exists.
    pub fn has_log(&self) -> bool {
        self.log.is_some()
    }

    /// Lets what a dead predecessor had under way land now, over whatever was written since: what the
    /// lock prevents.
    pub fn land_late(&mut self, predecessor: &Point) {
        for change in predecessor.optional_changes(Death::Process) {
            change.apply(&mut self.view);
            self.effects.push_back(landed(change));
        }
    }

    /// Deletes the completion log, as an administrator might.
    pub fn delete_log(&mut self) {
        self.log = None;
    }

    /// This state as a crash point.
    pub fn point(&self, kind: PointKind) -> Point {
        Point {
            kind,
            durable: self.durable.clone(),
            view: self.view.clone(),
            effects: self.effects.clone(),
            pending: self.pending.iter().filter(|p| p.changes_file()).cloned().collect(),
            log: self.log.clone(),
            log_store: None,
            lost: self.lost,
            environment: self.environment.clone(),
        }
    }

    fn record(&mut self, kind: PointKind, store: Option<(u64, Arc<[u8]>)>) {
        if self.recording {
            let mut point = self.point(kind);
            point.log_store = store;
            self.points.push(point);
        }
    }

    fn note(&mut self, what: &dyn Fn() -> String, hash: u64) {
        self.trace = mix(self.trace ^ hash).wrapping_add(hash);
        if let Some(lines) = &mut self.trace_text {
            lines.push(what());
        }
    }

    fn fault(&mut self, kind: CallKind) -> Option<StorageError> {
        let count = self.calls.entry(kind).or_insert(0);
        *count += 1;
        let count = *count;
        let hit = self
            .faults
            .iter()
            .find(|f| f.kind == kind && (f.nth == count || f.persistent && count > f.nth))?;
        self.fired += 1;
        Some(hit.error)
    }

    fn breach(&mut self, what: String) {
        if self.violations.len() < 20 {
            self.violations.push(what);
        }
    }

    fn check_alignment(&mut self, op: &Op) {
        let alignment = self.environment.geometry.alignment;
        let (offset, len, unit) = match op {
            Op::ReadBytes { offset, len } => (*offset, *len, alignment),
            Op::ReadRequest { offset, len, .. } => (*offset, *len, SECTOR),
            Op::Write { offset, segments } => {
                (*offset, segments.iter().map(Segment::len).sum(), alignment)
            }
            Op::Punch { offset, len } | Op::Allocate { offset, len } => (*offset, *len, SECTOR),
            Op::SetLen { len } => (0, *len, 1),
            Op::Sync | Op::NextData { .. } => return,
        };
        if !offset.is_multiple_of(unit) || !len.is_multiple_of(unit) || len == 0 {
            self.breach(format!("operation is empty or not aligned to {unit}: {op:?}"));
        }
    }

    /// The bytes a write stores now.
    fn resolve(&mut self, segments: &[Segment]) -> Arc<[u8]> {
        let mut bytes = Vec::new();
        for segment in segments {
            match segment {
                Segment::Zero(len) | Segment::Spare(len) => {
                    bytes.resize(bytes.len() + *len as usize, 0)
                }
                Segment::Bytes(data) => bytes.extend_from_slice(data),
                Segment::Request { request, offset, len } => {
                    let range = *offset as usize..(*offset + *len) as usize;
                    match self.buffers.get(request).and_then(|buffer| buffer.get(range)) {
                        Some(data) => bytes.extend_from_slice(data),
                        None => {
                            self.breach(format!("write uses a buffer that is gone: {segment:?}"));
                            bytes.resize(bytes.len() + *len as usize, 0xEE);
                        }
                    }
                }
            }
        }
        bytes.into()
    }

    /// Tokens of the operations under way, in order of submission.
    pub fn under_way(&self) -> Vec<Token> {
        self.pending.iter().map(|p| p.token).collect()
    }

    /// The kind of an operation under way and where it lies, for schedules.
    pub fn op(&self, token: Token) -> Option<&Op> {
        self.pending.iter().find(|p| p.token == token).map(|p| &p.op)
    }

    fn index(&self, token: Token) -> usize {
        let found = self.pending.iter().position(|p| p.token == token);
        found.expect("the token is under way")
    }

    /// Lets an operation under way take part of its effect: some sectors of a write.
    pub fn apply_part(&mut self, token: Token) {
        let index = self.index(token);
        let pending = &self.pending[index];
        if pending.stage != Stage::Submitted || pending.fault.is_some() {
            return;
        }
        let serial = pending.serial;
        let Some(change) = pending.changes(&self.view).into_iter().next() else { return };
        if change.sectors() > 1 && self.room_for(&change) {
            let part = some_part(&change, &mut self.rng);
            self.land_part(part, serial);
            self.pending[index].stage = Stage::Partly;
        }
    }

    /// Stores a part of an operation, as far as it lies inside the file.
    fn land_part(&mut self, part: Change, op: u64) {
        let part = match &part {
            Change::Write { offset, data } => {
                let end = offset + data.len() as u64;
                let inside = end.min(self.view.len()).saturating_sub(*offset) / SECTOR;
                part_of(&part, 0..inside)
            }
            _ => part,
        };
        if part.sectors() > 0 {
            part.apply(&mut self.view);
            self.effects.push_back(Effect { change: part, op, completed: None, durable: false });
        }
    }

    /// Lets an operation under way take effect.
    pub fn apply(&mut self, token: Token) {
        let index = self.index(token);
        if self.pending[index].stage == Stage::Applied {
            return;
        }
        let pending = self.pending[index].clone();
        self.pending[index].stage = Stage::Applied;
        self.pending[index].result = self.carry_out(&pending);
    }

    fn carry_out(&mut self, pending: &Pending) -> Result<Done, StorageError> {
        if let Some(error) = pending.fault {
            self.fail(pending);
            return Err(error);
        }
        match &pending.op {
            Op::ReadBytes { offset, len } => {
                let mut bytes = vec![0; *len as usize];
                self.view.read(*offset, &mut bytes);
                Ok(Done::Bytes(bytes))
            }
            Op::ReadRequest { offset, request, buffer_offset, len } => {
                let range = *buffer_offset as usize..(*buffer_offset + *len) as usize;
                match self.buffers.get_mut(request).and_then(|buffer| buffer.get_mut(range)) {
                    Some(buffer) => self.view.read(*offset, buffer),
                    None => self.breach(format!("read into a buffer that is gone: {pending:?}")),
                }
                Ok(Done::Ok)
            }
            Op::Write { segments, .. } => {
                let again = self.resolve(segments);
                if Some(&again) != pending.data.as_ref() {
                    self.breach(format!("data of a write changed under way: {:?}", pending.op));
                }
                self.take_effect(pending)
            }
            Op::Punch { .. } if self.environment.punch_unsupported => {
                Err(StorageError::Unsupported)
            }
            Op::Punch { .. } => self.take_effect(pending),
            Op::SetLen { .. } if self.environment.geometry.fixed_length => {
                Err(StorageError::Unsupported)
            }
            Op::SetLen { .. } => self.take_effect(pending),
            Op::Allocate { offset, len } => self.reserve(*offset, *len),
            Op::Sync => {
                for effect in &mut self.effects {
                    effect.durable |= effect.completed.is_some_and(|at| at <= pending.submitted);
                }
                self.fold();
                Ok(Done::Ok)
            }
            Op::NextData { offset } => Ok(Done::Data(self.view.next_data(*offset))),
        }
    }

    fn take_effect(&mut self, pending: &Pending) -> Result<Done, StorageError> {
        for change in pending.changes(&self.view) {
            if !self.room_for(&change) {
                return Err(StorageError::NoSpace);
            }
            change.apply(&mut self.view);
            self.effects.push_back(Effect {
                change,
                op: pending.serial,
                completed: None,
                durable: false,
            });
        }
        Ok(Done::Ok)
    }

    /// A failed operation may have done a part of its work.
    fn fail(&mut self, pending: &Pending) {
        match &pending.op {
            Op::Sync => self.fail_sync(pending.serial),
            Op::Write { .. } | Op::Punch { .. } => {
                let Some(change) = pending.changes(&self.view).into_iter().next() else { return };
                if self.room_for(&change) {
                    let part = some_part(&change, &mut self.rng);
                    self.land_part(part, pending.serial);
                }
            }
            _ => {}
        }
    }

    fn fail_sync(&mut self, failed: u64) {
        self.sync_failed = true;
        self.lost = true;
        // Another sync under way that will succeed keeps its promise.
        let promised = self
            .pending
            .iter()
            .filter(|p| p.op == Op::Sync && p.serial != failed && p.fault.is_none())
            .map(|p| p.submitted)
            .max()
            .unwrap_or(0);
        let mut kept = VecDeque::new();
        for mut effect in std::mem::take(&mut self.effects) {
            let dropped = !effect.durable
                && effect.completed.is_some_and(|at| at > promised)
                && self.rng.bool();
            if !dropped {
                effect.durable |= effect.completed.is_some();
                kept.push_back(effect);
            }
        }
        self.effects = kept;
        self.fold();
    }

    /// Moves what is durable, oldest first, into the durable file.
    fn fold(&mut self) {
        while self.effects.front().is_some_and(|e| e.durable) {
            if let Some(effect) = self.effects.pop_front() {
                effect.change.apply(&mut self.durable);
            }
        }
        if self.effects.is_empty() {
            self.durable.cut();
        }
    }

    fn room_for(&self, change: &Change) -> bool {
        let Change::Write { offset, data } = change else { return true };
        let end = offset + data.len() as u64;
        if self.environment.geometry.fixed_length {
            return end <= self.view.len();
        }
        let Some(capacity) = self.environment.capacity else { return true };
        let pages = offset / PAGE..end.div_ceil(PAGE);
        let fresh = |p: &u64| !self.view.has_data(p * PAGE) && !self.reserved.contains(p);
        let used = self.view.data_pages() + self.reserved_holes();
        used + pages.filter(fresh).count() as u64 <= capacity
    }

    fn reserved_holes(&self) -> u64 {
        self.reserved.iter().filter(|p| !self.view.has_data(**p * PAGE)).count() as u64
    }

    fn reserve(&mut self, offset: u64, len: u64) -> Result<Done, StorageError> {
        let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
        if let Some(capacity) = self.environment.capacity {
            let fresh = |p: &u64| !self.view.has_data(p * PAGE) && !self.reserved.contains(p);
            let used = self.view.data_pages() + self.reserved_holes();
            if used + pages.clone().filter(fresh).count() as u64 > capacity {
                return Err(StorageError::NoSpace);
            }
            self.reserved.extend(pages);
        }
        Ok(Done::Ok)
    }

    /// Ends an operation under way (letting it take effect first) and yields its completion.
    pub fn finish(&mut self, token: Token) -> Completion {
        self.apply(token);
        let pending = self.pending.remove(self.index(token));
        self.clock += 1;
        for effect in self.effects.iter_mut().filter(|e| e.op == pending.serial) {
            effect.completed = Some(self.clock);
        }
        let failed = u64::from(pending.result.is_err());
        self.sync_failure_known |= failed == 1 && pending.op == Op::Sync;
        let (token, result) = (pending.token, pending.result);
        self.note(
            &|| format!("end {} {}", token.0, brief(&result)),
            mix(token.0.wrapping_mul(2) ^ failed),
        );
        (token, result)
    }

    /// Lets chance choose: some operation under way takes effect in part or in whole, or ends.
    pub fn step(&mut self) -> Option<Completion> {
        if self.pending.is_empty() {
            return None;
        }
        let token = self.pending[self.rng.usize(0..self.pending.len())].token;
        match self.rng.u8(0..8) {
            0 => self.apply_part(token),
            1 => self.apply(token),
            _ => return Some(self.finish(token)),
        }
        None
    }
}

impl Pending {
    fn changes_file(&self) -> bool {
        matches!(self.op, Op::Write { .. } | Op::Punch { .. } | Op::SetLen { .. })
    }
}

fn brief(result: &Result<Done, StorageError>) -> String {
    match result {
        Ok(Done::Bytes(bytes)) => format!("{} bytes", bytes.len()),
        Ok(done) => format!("{done:?}"),
        Err(error) => format!("failed: {error:?}"),
    }
}

fn brief_op(op: &Op) -> String {
    match op {
        Op::Write { offset, segments } => {
            let parts: Vec<String> = segments
                .iter()
                .map(|segment| match segment {
                    Segment::Zero(len) | Segment::Spare(len) => format!("zero {len}"),
                    Segment::Bytes(bytes) => {
                        let tag = bytes.get(..4).map(String::from_utf8_lossy);
                        format!("bytes {} {:?}", bytes.len(), tag.unwrap_or_default())
                    }
                    Segment::Request { request, offset, len } => {
                        format!("request {} {offset}+{len}", request.0)
                    }
                })
                .collect();
            format!("Write {offset} [{}]", parts.join(", "))
        }
        other => format!("{other:?}"),
    }
}

/// What of a write may be left out is, or is not, before and behind, in turns.
fn leave_out(token: Token, op: Op) -> Op {
    let Op::Write { mut offset, mut segments } = op else { return op };
    let (first, len) = (offset, segments.iter().map(Segment::len).sum::<u64>());
    let (before, behind) = Segment::trim(&mut offset, &mut segments);
    if before > 0 && token.0.is_multiple_of(2) {
        offset = first;
        segments.insert(0, Segment::Zero(before));
    }
    if behind > 0 && (token.0 / 2).is_multiple_of(2) {
        segments.push(Segment::Zero(behind));
    }
    debug_assert!(segments.iter().map(Segment::len).sum::<u64>() <= len);
    Op::Write { offset, segments }
}

/// A hash of an operation, for the trace.
fn op_hash(op: &Op, data: Option<&Arc<[u8]>>) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write_u8(CallKind::of(op) as u8);
    match op {
        Op::ReadBytes { offset, len }
        | Op::Punch { offset, len }
        | Op::Allocate { offset, len } => {
            hasher.write_u64(*offset);
            hasher.write_u64(*len);
        }
        Op::ReadRequest { offset, request, buffer_offset, len } => {
            for value in [*offset, request.0, *buffer_offset, *len] {
                hasher.write_u64(value);
            }
        }
        Op::Write { offset, .. } => {
            hasher.write_u64(*offset);
            if let Some(data) = data {
                hasher.write(data);
            }
        }
        Op::SetLen { len } => hasher.write_u64(*len),
        Op::NextData { offset } => hasher.write_u64(*offset),
        Op::Sync => {}
    }
    hasher.finish()
}

impl Storage for SimStorage {
    fn submit(&mut self, token: Token, op: Op) {
        let op = leave_out(token, op);
        self.check_alignment(&op);
        if self.pending.iter().any(|p| p.token == token) {
            self.breach(format!("token {} is used twice", token.0));
        }
        let data = match &op {
            Op::Write { segments, .. } => Some(self.resolve(segments)),
            _ => None,
        };
        let kind = CallKind::of(&op);
        let fault = self.fault(kind);
        let hash = op_hash(&op, data.as_ref());
        self.note(&|| format!("submit {} {}", token.0, brief_op(&op)), mix(hash ^ token.0));
        self.clock += 1;
        self.serial += 1;
        self.pending.push(Pending {
            token,
            serial: self.serial,
            submitted: self.clock,
            op,
            data,
            fault,
            stage: Stage::Submitted,
            result: Ok(Done::Ok),
        });
        self.record(PointKind::Submit(kind), None);
    }

    fn wait(&mut self) -> Completion {
        assert!(!self.pending.is_empty(), "waited while nothing is under way");
        loop {
            if let Some(completion) = self.step() {
                return completion;
            }
        }
    }

    fn zero_request(&mut self, request: RequestId, offset: u64, len: u64) {
        let range = offset as usize..(offset + len) as usize;
        match self.buffers.get_mut(&request).and_then(|buffer| buffer.get_mut(range)) {
            Some(buffer) => buffer.fill(0),
            None => self.breach(format!("zeroed a buffer that is gone: {request:?}")),
        }
    }

    fn geometry(&self) -> Geometry {
        self.environment.geometry
    }

    fn file_len(&mut self) -> Result<u64, StorageError> {
        match self.fault(CallKind::FileLen) {
            Some(error) => Err(error),
            None => Ok(self.view.len()),
        }
    }

    fn identity(&self) -> [u8; 16] {
        *b"simulated image "
    }

    fn boot_id(&self) -> [u8; 16] {
        let mut id = *b"boot            ";
        id[8..].copy_from_slice(&self.environment.boot.to_le_bytes());
        id
    }

    fn read_log(&mut self, uuid: [u8; 16], _path: &str) -> Result<Option<Vec<u8>>, StorageError> {
        if let Some(error) = self.fault(CallKind::ReadLog) {
            return Err(error);
        }
        Ok(self.log.as_ref().filter(|log| log.uuid == uuid).map(|log| {
            let mut bytes = vec![0; log.bytes.len() as usize];
            log.bytes.read(0, &mut bytes);
            bytes
        }))
    }

    fn create_log(
        &mut self,
        uuid: [u8; 16],
        bytes: &[u8],
        len: usize,
    ) -> Result<String, StorageError> {
        if let Some(error) = self.fault(CallKind::CreateLog) {
            return Err(error);
        }
        self.record(PointKind::CreateLog, None);
        let mut file = HostFile::new();
        file.write(0, bytes);
        file.extend(len.max(bytes.len()) as u64);
        self.log = Some(LogFile { bytes: file, uuid });
        self.note(&|| format!("create log of {len} bytes"), mix(len as u64));
        self.record(PointKind::Step, None);
        Ok("simulated.log".to_owned())
    }

    fn store_log(&mut self, offset: usize, bytes: &[u8]) {
        self.record(PointKind::StoreLog, Some((offset as u64, bytes.into())));
        let fits = self
            .log
            .as_ref()
            .is_some_and(|log| offset as u64 + bytes.len() as u64 <= log.bytes.len());
        if !fits {
            self.breach(format!("stored {} bytes at {offset} outside the log", bytes.len()));
            return;
        }
        if let Some(log) = &mut self.log {
            log.bytes.write(offset as u64, bytes);
        }
        self.note(&|| format!("log {offset}+{}", bytes.len()), mix(offset as u64 ^ 0x106));
    }

    fn remove_log(&mut self) {
        self.record(PointKind::RemoveLog, None);
        self.log = None;
        self.note(&|| "remove log".to_owned(), 0x0FF);
    }
}

/// Buffers of requests, as the driver of an image holds them.
impl SimStorage {
    /// Gives a request its buffer.
    pub fn put_buffer(&mut self, id: RequestId, data: Vec<u8>) {
        self.buffers.insert(id, data);
    }

    /// Takes the buffer of a finished request.
    pub fn take_buffer(&mut self, id: RequestId) -> Vec<u8> {
        self.buffers.remove(&id).unwrap_or_default()
    }
}
