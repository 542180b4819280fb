//! What the simulator drives: the interface of `exd_image::Disk`, so that a toy can stand in for it.

use crate::api::{
    Access, Done, FilePart, Geometry, Request, RequestError, RequestId, Storage, StorageError,
    Ticket, Token,
};
use crate::storage::SimStorage;

/// How much of an image's space is allocated when it is created.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "named as in the engine")]
pub enum Preallocation {
    Off,
    Metadata,
    Falloc,
    Full,
}

/// An image to make and the host to make it on.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Unit of written state in bytes.
    pub block_size: u32,
    /// Space allocated at creation.
    pub preallocation: Preallocation,
    /// Length of the journal in bytes.
    pub journal_bytes: u64,
    /// Alignment of journal records in bytes.
    pub record_align: u32,
    /// Bound of the metadata cache in bytes.
    pub cache_bytes: u64,
    /// Bytes of an allocation window.
    pub window_bytes: u64,
    /// How space is prepared ahead of the allocator, ...
    pub zero_ahead: exd_image::ZeroAhead,
    /// ... how much of it, ...
    pub zero_ahead_bytes: u64,
    /// ... for writes up to this length, ...
    pub zero_ahead_write_max: u64,
    /// ... so many bytes of them between two flushes, ...
    pub zero_ahead_burst: u64,
    /// ... and how long it is kept for nothing.
    pub zero_ahead_idle_ms: u64,
    /// Bound of the journal's growth in bytes.
    pub journal_max: u64,
    /// Changes of the map after which a checkpoint is due.
    pub overlay_max: u64,
    /// Nodes given back with each step after one.
    pub clear_up_nodes: u64,
    /// Slots of the completion log.
    pub log_slots: u32,
    /// Bytes of the table of the way past the engine.
    pub fast_bytes: u64,
    /// With a completion log.
    pub completion_log: bool,
    /// Sessions begin as if the image had no room for that.
    pub detours: bool,
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// The host.
    pub geometry: Geometry,
    /// Length of the device when `geometry.fixed_length`.
    pub device_len: u64,
}

impl ImageConfig {
    /// An image on an ordinary file.
    pub fn new(virtual_size: u64, block_size: u32) -> Self {
        ImageConfig {
            virtual_size,
            block_size,
            preallocation: Preallocation::Off,
            journal_bytes: 65536,
            record_align: 4096,
            cache_bytes: 1 << 20,
            window_bytes: 128 << 10,
            zero_ahead: exd_image::ZeroAhead::Zero,
            zero_ahead_bytes: 64 << 10,
            zero_ahead_write_max: 16 << 10,
            zero_ahead_burst: 4 << 20,
            zero_ahead_idle_ms: 1000,
            journal_max: 256 << 10,
            overlay_max: 64,
            clear_up_nodes: 0,
            log_slots: 256,
            fast_bytes: 4096,
            completion_log: true,
            detours: false,
            uuid: *b"simulated image1",
            geometry: Geometry { alignment: 512, host_block: 4096, fixed_length: false },
            device_len: 4 << 20,
        }
    }

    /// The storage the image is to be made on.
    pub fn storage(&self) -> SimStorage {
        if self.geometry.fixed_length {
            SimStorage::device(self.geometry, self.device_len)
        } else {
            SimStorage::new(self.geometry)
        }
    }
}

/// Why an image could not be opened or closed.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The error of the host behind it, if that was the reason.
    pub storage: Option<StorageError>,
    /// The engine says that metadata is damaged.
    pub corrupt: bool,
    /// In words.
    pub text: String,
}

/// The verdict of a check.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What is damaged.
    pub corruptions: Vec<String>,
    /// Bytes of host space that nothing owns.
    pub leaks: u64,
}

/// An open image.
pub trait Engine: Sized {
    /// Makes an image.
    fn create(st: &mut SimStorage, config: &ImageConfig) -> Result<(), Refusal>;
    /// Opens it for writing.
    fn open(st: &mut SimStorage, config: &ImageConfig) -> Result<Self, Refusal>;
    /// Current size in bytes.
    fn size(&self) -> u64;
    /// Starts a request.
    fn submit(&mut self, st: &mut SimStorage, id: RequestId, request: Request);
    /// Issues what was staged.
    fn kick(&mut self, st: &mut SimStorage);
    /// An operation ended.
    fn complete(&mut self, st: &mut SimStorage, token: Token, result: Result<Done, StorageError>);
    /// Time goes by.
    fn tick(&mut self, st: &mut SimStorage, now_ms: u64);
    /// A request that finished.
    fn pop_finished(&mut self) -> Option<(RequestId, Result<(), RequestError>)>;
    /// The way past the engine, by one of two lanes: where the I/O goes, if it may begin.
    fn begin_fast(
        &mut self,
        _lane: usize,
        _access: Access,
        _offset: u64,
        _len: u64,
        _parts: &mut Vec<FilePart>,
    ) -> Option<Ticket> {
        None
    }
    /// It has ended.
    fn end_fast(&mut self, _lane: usize, _ticket: Ticket) {}
    /// Closes cleanly.
    fn close(&mut self, st: &mut SimStorage) -> Result<(), Refusal>;
    /// Examines an image that is not open, or is open elsewhere.
    fn check(st: &mut SimStorage) -> Result<Verdict, Refusal>;
    /// What must hold of the file of a cleanly closed image, besides what `check` says.
    fn closed_well(_st: &SimStorage) -> Result<(), String> {
        Ok(())
    }
    /// True when the engine can use this host's geometry at all.
    fn supports(_config: &ImageConfig) -> bool {
        true
    }
}

/// Runs one operation to its end.
pub fn blocking(
    st: &mut SimStorage,
    token: Token,
    op: crate::api::Op,
) -> Result<Done, StorageError> {
    st.submit(token, op);
    loop {
        let (done, result) = st.wait();
        if done == token {
            return result;
        }
    }
}
