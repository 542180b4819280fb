//! An open image, its model and its storage, driven together.

use crate::api::{
    Access, Completion, FilePart, Op, Request, RequestError, RequestId, SECTOR, Segment, Storage,
    Ticket, Token,
};
use crate::engine::{Engine, ImageConfig, Refusal};
use crate::host_file::mix;
use crate::model::Model;
use crate::stamp;
use crate::storage::{Point, SimStorage};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// A crash point and what the disk's user knew at that moment.
pub struct Snapshot {
    /// The storage.
    pub point: Point,
    /// The user's view.
    pub model: Rc<Model>,
}

/// A finished request.
pub type Finished = (RequestId, Request, Result<(), RequestError>);

/// An open image under test.
pub struct Session<E> {
    /// Its storage.
    pub st: SimStorage,
    /// The engine.
    pub disk: E,
    /// What the user knows.
    pub model: Model,
    /// Errors of requests are part of the test.
    pub errors_allowed: bool,
    now_ms: u64,
    snapshots: Vec<Snapshot>,
    shared: Option<Rc<Model>>,
    finished: Vec<Finished>,
    /// Of four requests that may pass the engine by, so many try it.
    pub fast_of_four: u64,
    /// Requests that passed the engine by.
    fast: BTreeMap<RequestId, FastRequest>,
    /// Their operations that are not submitted yet: a thread finds its place and then takes its time.
    fast_staged: VecDeque<(Token, Op)>,
    fast_turn: u64,
}

/// A request on the way past the engine.
struct FastRequest {
    ticket: Ticket,
    lane: usize,
    operations: usize,
    error: Option<RequestError>,
}

/// Marks the tokens of operations that the engine knows nothing of.
const FAST_TOKEN: u64 = 1 << 63;

impl<E: Engine> Session<E> {
    /// Makes an image and opens it.
    pub fn create(mut st: SimStorage, config: &ImageConfig) -> Result<Self, String> {
        E::create(&mut st, config).map_err(|r| format!("creating failed: {}", r.text))?;
        let model = Model::new(config.virtual_size, u64::from(config.block_size));
        st.settle();
        Self::open(st, model, config).map_err(|r| format!("opening failed: {}", r.1.text))
    }

    /// Opens an image whose history is `model`. What open did stays in the storage's points.
    pub fn open(
        mut st: SimStorage,
        model: Model,
        config: &ImageConfig,
    ) -> Result<Self, Box<(SimStorage, Refusal)>> {
        match E::open(&mut st, config) {
            Ok(disk) => Ok(Session {
                st,
                disk,
                model,
                errors_allowed: false,
                now_ms: 0,
                snapshots: Vec::new(),
                shared: None,
                finished: Vec::new(),
                fast_of_four: 3,
                fast: BTreeMap::new(),
                fast_staged: VecDeque::new(),
                fast_turn: 0,
            }),
            Err(refusal) => Err(Box::new((st, refusal))),
        }
    }

    /// The crash points passed since the last call.
    pub fn take_snapshots(&mut self) -> Vec<Snapshot> {
        std::mem::take(&mut self.snapshots)
    }

    /// The requests finished since the last call.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.finished)
    }

    /// Turns the storage's crash points into snapshots: all of them lie in the user's present.
    pub fn keep_points(&mut self) {
        let points = self.st.take_points();
        if points.is_empty() {
            return;
        }
        let fresh = self.shared.as_ref().is_none_or(|m| m.clock() != self.model.clock());
        if fresh {
            self.shared = Some(Rc::new(self.model.clone()));
        }
        if let Some(model) = &self.shared {
            let model = Rc::clone(model);
            self.snapshots.extend(
                points.into_iter().map(|point| Snapshot { point, model: Rc::clone(&model) }),
            );
        }
    }

    fn after_call(&mut self) -> Result<(), String> {
        self.keep_points();
        if self.st.sync_failed() {
            self.model.note_lost_sync();
        }
        if let Some(breach) = self.st.violations().first() {
            return Err(format!("the engine broke the storage's contract: {breach}"));
        }
        let mut any = false;
        while let Some((id, result)) = self.disk.pop_finished() {
            any = true;
            self.ended(id, result)?;
        }
        if any {
            self.st.mark();
            self.keep_points();
        }
        Ok(())
    }

    fn ended(&mut self, id: RequestId, result: Result<(), RequestError>) -> Result<(), String> {
        let Some(request) = self.model.request(id) else {
            return Err(format!("request {} ended twice or was never submitted", id.0));
        };
        if let Err(error) = result
            && !self.errors_allowed
        {
            return Err(format!("request {} {request:?} failed: {error}", id.0));
        }
        let data = self.st.take_buffer(id);
        self.model.finish(id, result, &data)?;
        if request == Request::Flush && result.is_ok() && self.st.sync_failure_known() {
            return Err(format!("P5: flush {} was acknowledged after a sync had failed", id.0));
        }
        self.finished.push((id, request, result));
        Ok(())
    }

    /// Sends a request past the engine, if it may go there.
    fn begin_fast(&mut self, id: RequestId, request: Request) -> bool {
        let (access, offset, len) = match request {
            Request::Read { offset, len } => (Access::Read, offset, len),
            Request::Write { offset, len, durable: false } => (Access::Overwrite, offset, len),
            _ => return false,
        };
        let chance = mix(id.0 ^ 0xFA57);
        if chance % 4 >= self.fast_of_four {
            return false;
        }
        let (lane, mut parts) = ((chance >> 8) as usize % 2, Vec::new());
        let Some(ticket) = self.disk.begin_fast(lane, access, offset, len, &mut parts) else {
            return false;
        };
        let mut at = 0;
        for (index, FilePart { offset, len }) in parts.iter().copied().enumerate() {
            let op = match access {
                Access::Read => Op::ReadRequest { offset, request: id, buffer_offset: at, len },
                Access::Overwrite => {
                    let segments = vec![Segment::Request { request: id, offset: at, len }];
                    Op::Write { offset, segments }
                }
            };
            self.fast_staged.push_back((Token(FAST_TOKEN | id.0 << 8 | index as u64), op));
            at += len;
        }
        let request = FastRequest { ticket, lane, operations: parts.len(), error: None };
        self.fast.insert(id, request);
        true
    }

    /// Submits what passes the engine by, or, as chance has it, leaves some of it for later.
    fn submit_fast(&mut self, likely: bool) {
        for _ in 0..self.fast_staged.len() {
            self.fast_turn += 1;
            let Some((token, op)) = self.fast_staged.pop_front() else { return };
            if mix(self.fast_turn ^ token.0).is_multiple_of(4) != likely {
                self.st.submit(token, op);
            } else {
                self.fast_staged.push_back((token, op));
            }
        }
        self.keep_points();
    }

    /// An operation has ended that the engine knows nothing of.
    fn complete_fast(&mut self, completion: Completion) -> Result<(), String> {
        let (token, result) = completion;
        let id = RequestId((token.0 & !FAST_TOKEN) >> 8);
        let request = self.fast.get_mut(&id).ok_or("an operation ended that was not under way")?;
        request.operations -= 1;
        if let Err(error) = result {
            request.error.get_or_insert(error.into());
        }
        if request.operations > 0 {
            return Ok(());
        }
        if let Some(FastRequest { ticket, lane, error, .. }) = self.fast.remove(&id) {
            self.disk.end_fast(lane, ticket);
            self.ended(id, error.map_or(Ok(()), Err))?;
        }
        self.st.mark();
        self.after_call()
    }

    /// Starts a request; a write gets its stamped data.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, String> {
        let id = self.model.next_id();
        let buffer = match request {
            Request::Write { offset, len, .. } => stamp::data(offset / SECTOR, len / SECTOR, id.0),
            Request::Read { len, .. } => vec![0xC3; len as usize],
            _ => Vec::new(),
        };
        self.st.put_buffer(id, buffer);
        self.model.submit(id, request);
        if !self.begin_fast(id, request) {
            self.disk.submit(&mut self.st, id, request);
        }
        self.after_call()?;
        Ok(id)
    }

    /// Issues what was staged.
    pub fn kick(&mut self) -> Result<(), String> {
        self.submit_fast(true);
        self.disk.kick(&mut self.st);
        self.after_call()
    }

    /// Lets 100 ms go by.
    pub fn tick(&mut self) -> Result<(), String> {
        self.now_ms += 100;
        self.disk.tick(&mut self.st, self.now_ms);
        self.after_call()
    }

    /// Hands an operation's end to the engine.
    pub fn complete(&mut self, completion: Completion) -> Result<(), String> {
        if completion.0.0 & FAST_TOKEN != 0 {
            return self.complete_fast(completion);
        }
        let (token, result) = completion;
        self.disk.complete(&mut self.st, token, result);
        self.after_call()
    }

    /// Lets the storage do something, as chance has it.
    pub fn step(&mut self) -> Result<(), String> {
        self.submit_fast(false);
        match self.st.step() {
            Some(completion) => self.complete(completion),
            None => Ok(()),
        }
    }

    /// Runs until no request and no operation is under way.
    pub fn drain(&mut self) -> Result<(), String> {
        let mut idle = 0;
        while self.model.under_way() > 0 || !self.st.under_way().is_empty() {
            if self.st.under_way().is_empty() {
                idle += 1;
                if idle > 100 {
                    return Err(format!(
                        "requests hang, nothing is under way on the storage: {:?}",
                        self.model.requests()
                    ));
                }
                self.kick()?;
                if self.st.under_way().is_empty() {
                    self.tick()?;
                }
            } else {
                self.step()?;
            }
        }
        Ok(())
    }

    /// Runs one request to its end.
    pub fn run(&mut self, request: Request) -> Result<Result<(), RequestError>, String> {
        let id = self.submit(request)?;
        self.kick()?;
        self.drain()?;
        let found = self.finished.iter().rev().find(|(done, _, _)| *done == id);
        found.map(|(_, _, result)| *result).ok_or_else(|| format!("request {} is lost", id.0))
    }

    /// Reads the whole disk, without the model's judgement.
    pub fn read_all(&mut self) -> Result<Vec<u8>, String> {
        let size = self.disk.size();
        let mut all = Vec::with_capacity(size as usize);
        let piece = 256 << 10;
        while (all.len() as u64) < size {
            let offset = all.len() as u64;
            let len = piece.min(size - offset);
            let id = self.model.next_id();
            self.st.put_buffer(id, vec![0xC3; len as usize]);
            self.disk.submit(&mut self.st, id, Request::Read { offset, len });
            self.disk.kick(&mut self.st);
            let result = self.wait_for(id)?;
            result.map_err(|error| format!("reading {offset}+{len} failed: {error}"))?;
            all.extend_from_slice(&self.st.take_buffer(id));
        }
        self.keep_points();
        Ok(all)
    }

    fn wait_for(&mut self, id: RequestId) -> Result<Result<(), RequestError>, String> {
        let mut idle = 0;
        loop {
            if let Some((done, result)) = self.disk.pop_finished() {
                if done == id {
                    return Ok(result);
                }
                return Err(format!("request {} ended, but was not under way", done.0));
            }
            if let Some((token, result)) = self.st.step() {
                self.disk.complete(&mut self.st, token, result);
            } else if self.st.under_way().is_empty() {
                idle += 1;
                if idle > 100 {
                    return Err("a read hangs: nothing is under way on the storage".to_owned());
                }
                self.now_ms += 100;
                self.disk.tick(&mut self.st, self.now_ms);
            }
        }
    }

    /// Closes cleanly; hands back the storage and the history.
    pub fn close(mut self) -> Result<(SimStorage, Model, Vec<Snapshot>), String> {
        self.drain()?;
        let closed = self.disk.close(&mut self.st);
        self.keep_points();
        if self.st.sync_failed() {
            self.model.note_lost_sync();
        }
        closed.map_err(|refusal| format!("closing failed: {}", refusal.text))?;
        if !self.st.under_way().is_empty() {
            return Err("operations are under way after close".to_owned());
        }
        self.model.closed();
        self.st.mark();
        self.keep_points();
        Ok((self.st, self.model, self.snapshots))
    }
}
