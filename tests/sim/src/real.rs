//! The real engine behind the simulator's interface.

use crate::api::{
    Access, Done, FilePart, Request, RequestError, RequestId, StorageError, Ticket, Token,
};
use crate::engine::{Engine, ImageConfig, Preallocation, Refusal, Verdict};
use crate::storage::SimStorage;
use exd_image::fast::{Fast, Lane};
use exd_image::{CreateOptions, Error, ErrorKind, OpenOptions};

/// `exd_image::Disk`, and two lanes past it.
pub struct Disk(exd_image::Disk, [Lane; 2]);

fn refusal(error: Error) -> Refusal {
    let storage = match &error.kind {
        ErrorKind::Storage(storage) => Some(*storage),
        _ => None,
    };
    Refusal { storage, corrupt: error.kind == ErrorKind::Corrupt, text: error.to_string() }
}

impl Engine for Disk {
    fn create(st: &mut SimStorage, config: &ImageConfig) -> Result<(), Refusal> {
        let preallocation = match config.preallocation {
            Preallocation::Off => exd_image::Preallocation::Off,
            Preallocation::Metadata => exd_image::Preallocation::Metadata,
            Preallocation::Falloc => exd_image::Preallocation::Falloc,
            Preallocation::Full => exd_image::Preallocation::Full,
        };
        let options = CreateOptions {
            virtual_size: config.virtual_size,
            block_size: config.block_size,
            preallocation,
            uuid: config.uuid,
            created: 0,
            journal_bytes: config.journal_bytes,
            record_align: config.record_align,
        };
        exd_image::create(st, &options).map_err(refusal)
    }

    fn open(st: &mut SimStorage, config: &ImageConfig) -> Result<Self, Refusal> {
        let options = OpenOptions {
            read_only: false,
            cache_bytes: config.cache_bytes,
            completion_log: config.completion_log,
            window_bytes: config.window_bytes,
            zero_ahead: config.zero_ahead,
            zero_ahead_bytes: config.zero_ahead_bytes,
            zero_ahead_write_max: config.zero_ahead_write_max,
            zero_ahead_burst: config.zero_ahead_burst,
            zero_ahead_idle_ms: config.zero_ahead_idle_ms,
            journal_max: config.journal_max,
            overlay_max: config.overlay_max,
            clear_up_nodes: config.clear_up_nodes,
            log_slots: config.log_slots,
            ..OpenOptions::default()
        };
        #[cfg(feature = "seeded-bugs")]
        exd_image::bugs::set_detours(config.detours);
        let mut disk = exd_image::Disk::open(st, options).map_err(refusal)?;
        let fast = Fast::new(config.fast_bytes);
        disk.share(&fast).map_err(refusal)?;
        Ok(Disk(disk, [fast.lane(), fast.lane()]))
    }

    fn size(&self) -> u64 {
        self.0.info().virtual_size
    }

    fn submit(&mut self, st: &mut SimStorage, id: RequestId, request: Request) {
        self.0.submit(st, id, request);
        // Here and there a batch is sent in two portions.
        if id.0.is_multiple_of(3) {
            self.0.send_staged(st);
        }
    }

    fn kick(&mut self, st: &mut SimStorage) {
        self.0.kick(st);
    }

    fn complete(&mut self, st: &mut SimStorage, token: Token, result: Result<Done, StorageError>) {
        self.0.complete(st, token, result);
    }

    fn tick(&mut self, st: &mut SimStorage, now_ms: u64) {
        self.0.tick(st, now_ms);
    }

    fn pop_finished(&mut self) -> Option<(RequestId, Result<(), RequestError>)> {
        self.0.pop_finished()
    }

    fn begin_fast(
        &mut self,
        lane: usize,
        access: Access,
        offset: u64,
        len: u64,
        parts: &mut Vec<FilePart>,
    ) -> Option<Ticket> {
        self.1[lane].begin(access, offset, len, parts)
    }

    fn end_fast(&mut self, lane: usize, ticket: Ticket) {
        self.1[lane].end(ticket);
    }

    fn close(&mut self, st: &mut SimStorage) -> Result<(), Refusal> {
        self.0.close(st).map_err(refusal)
    }

    fn check(st: &mut SimStorage) -> Result<Verdict, Refusal> {
        let report = exd_image::check::check(st).map_err(refusal)?;
        Ok(Verdict {
            corruptions: report
                .corruptions
                .iter()
                .map(|finding| format!("at {:?}: {}", finding.offset, finding.what))
                .collect(),
            leaks: report.leaked_bytes,
        })
    }

    /// Both superblock slots hold the same generation when nothing is going on.
    fn closed_well(st: &SimStorage) -> Result<(), String> {
        let generation = |slot: u64| {
            let mut raw = [0; 8];
            st.view().read(slot * 4096 + 8, &mut raw);
            u64::from_le_bytes(raw)
        };
        let (first, second) = (generation(0), generation(1));
        if first == second {
            Ok(())
        } else {
            Err(format!("closed with superblocks of generations {first} and {second}"))
        }
    }
}

/// Switches a seeded bug on by its name; needs the feature `seeded-bugs`.
#[cfg(feature = "seeded-bugs")]
pub fn set_bug_by_name(name: &str) -> Result<(), String> {
    use exd_image::bugs::{Bug, set};
    let found = Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
    let bug = found.ok_or_else(|| format!("there is no bug {name:?}"))?;
    set(Some(bug));
    Ok(())
}

/// Switches a seeded bug on by its name; needs the feature `seeded-bugs`.
#[cfg(not(feature = "seeded-bugs"))]
pub fn set_bug_by_name(name: &str) -> Result<(), String> {
    Err(format!("built without seeded bugs, cannot switch {name:?} on"))
}
