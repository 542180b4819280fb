//! EXD images, through the engine's blocking face.

use super::{Format, Image, Piece, State};
use crate::device::WithheldStorage;
use crate::failure::{During, Failure, Result};
use crate::options::{EXD_BLOCK_SIZE, FormatOptions, Preallocation};
use crate::output::info::{ExdData, FormatSpecific, HolderData, ImageInfo};
use exd_file::lock::{conflict, read_holder};
use exd_file::storage::Notes;
use exd_file::{FileStorage, HostFile, LockMode};
use exd_format::{Choice, SUPERBLOCK_SIZE, Superblock, choose};
use exd_image::blocking::{self, MapPiece};
use exd_image::{CreateOptions, HolderName, OpenOptions};
use serde::Serialize;
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

/// Allocation window while a new image is filled. Each window costs a sync, which waits for all that
/// was written; an image that is lost anyway if the copy does not end needs few.
const FILLING_WINDOW_BYTES: u64 = 256 << 20;

/// An EXD image.
struct ExdImage {
    image: blocking::Image<WithheldStorage>,
    map: MapWindow,
}

/// A part of the map, kept because callers walk through it piece by piece.
struct MapWindow {
    pieces: VecDeque<MapPiece>,
    /// Bytes of the disk to look up next time.
    len: u64,
}

/// The part of the map that is looked up at first, in bytes of the disk.
const MAP_WINDOW_BYTES: u64 = 1 << 30;
/// It is made longer if it has fewer pieces than this, and shorter if it has more than the maximum.
const MAP_PIECES_MIN: usize = 1 << 10;
const MAP_PIECES_MAX: usize = 1 << 16;

impl MapWindow {
    fn new() -> Self {
        MapWindow { pieces: VecDeque::new(), len: MAP_WINDOW_BYTES }
    }

    /// The piece that `offset` lies in, if it is known.
    fn find(&mut self, offset: u64) -> Option<&MapPiece> {
        while self.pieces.front().is_some_and(|piece| piece.offset + piece.len <= offset) {
            self.pieces.pop_front();
        }
        self.pieces.front().filter(|piece| piece.offset <= offset)
    }

    fn fill(&mut self, pieces: Vec<MapPiece>) {
        match pieces.len() {
            ..MAP_PIECES_MIN => self.len = self.len.saturating_mul(2),
            MAP_PIECES_MAX.. => self.len = (self.len / 2).max(1 << 20),
            _ => {}
        }
        self.pieces = pieces.into();
    }
}

/// An EXD image that was just made, and is opened only if something is written to it.
struct NewExdImage {
    size: u64,
    state: Option<NewState>,
}

enum NewState {
    Made(Box<WithheldStorage>),
    Open(Box<dyn Image>),
}

impl NewExdImage {
    fn open(&mut self) -> Result<&mut dyn Image> {
        let opened = match self.state.take() {
            Some(NewState::Made(storage)) => open_new(*storage)?,
            Some(NewState::Open(image)) => image,
            None => return Err(Failure::new("the new image could not be opened")),
        };
        match self.state.insert(NewState::Open(opened)) {
            NewState::Open(image) => Ok(image.as_mut()),
            NewState::Made(_) => unreachable!("just inserted"),
        }
    }
}

impl Image for NewExdImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&mut self, offset: u64, len: u64) -> Result<Piece> {
        self.open()?.piece(offset, len)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.open()?.read(offset, buffer)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.open()?.write(offset, data)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.open()?.write_zeroes(offset, len)
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.open()?.resize(size)?;
        self.size = size;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        match self.state {
            Some(NewState::Made(storage)) => storage.release(),
            Some(NewState::Open(image)) => image.finish(),
            None => Err(Failure::new("the new image could not be opened")),
        }
    }
}

/// Tells from the start of a file whether it is an EXD image, perhaps a damaged one.
pub fn is_exd(start: &[u8]) -> bool {
    (0..2).any(|slot| {
        let at = slot * SUPERBLOCK_SIZE;
        start.get(at..at + 4) == Some(b"EXDS")
    })
}

/// Reads the superblock that counts.
pub fn read_superblock(file: &HostFile) -> Result<Superblock> {
    let mut bytes = vec![0; 2 * SUPERBLOCK_SIZE];
    file.read_at(0, &mut bytes).during("could not read at offset 0")?;
    let slot = |slot: usize| {
        let at = slot * SUPERBLOCK_SIZE;
        let bytes = bytes.get(at..at + SUPERBLOCK_SIZE).unwrap_or_default();
        Superblock::decode(bytes, slot, None)
    };
    match choose(slot(0), slot(1)) {
        Choice::Use { superblock, .. } => Ok(*superblock),
        Choice::Unsupported { features } => Err(Failure::new(format_args!(
            "the image needs features this imgtool does not have: {}",
            features.join(", ")
        ))),
        Choice::Corrupt(error) => Err(Failure::new(format_args!(
            "neither superblock (offsets 0 and {SUPERBLOCK_SIZE}) is usable: {error}"
        ))),
        Choice::NotExd => Err(Failure::new("Image is not in exd format")),
    }
}

/// Opens an image. Opened for reading, nothing is written: a journal that was not written back is
/// replayed in memory.
pub fn open(file: HostFile, write: bool) -> Result<Box<dyn Image>> {
    open_storage(WithheldStorage::new(storage(file)?), write)
}

/// Makes an image.
pub fn create(file: HostFile, size: u64, options: &FormatOptions) -> Result<Box<dyn Image>> {
    let device = file.is_block_device();
    let below = storage(file)?;
    let storage = match device {
        true => WithheldStorage::withholding(below)?,
        false => WithheldStorage::new(below),
    };
    let create = CreateOptions {
        virtual_size: size,
        block_size: options.block_size.unwrap_or(EXD_BLOCK_SIZE),
        preallocation: match options.preallocation {
            Preallocation::Off => exd_image::Preallocation::Off,
            Preallocation::Metadata => exd_image::Preallocation::Metadata,
            Preallocation::Falloc => exd_image::Preallocation::Falloc,
            Preallocation::Full => exd_image::Preallocation::Full,
        },
        uuid: *uuid::Uuid::new_v4().as_bytes(),
        created: now(),
        ..CreateOptions::default()
    };
    let notes = storage.notes();
    let storage = blocking::Image::create(storage, &create)
        .map_err(|error| engine_failure(&error, &notes))?;
    Ok(Box::new(NewExdImage { size, state: Some(NewState::Made(Box::new(storage))) }))
}

/// The engine's storage on a file.
pub fn storage(file: HostFile) -> Result<FileStorage> {
    FileStorage::new(file).map_err(Failure::new)
}

/// The engine's error, with what the storage has to add.
pub fn engine_failure(error: &exd_image::Error, notes: &Notes) -> Failure {
    let mut text = error.to_string();
    for note in notes.take() {
        text += &format!("\n{note}");
    }
    Failure::new(text)
}

fn open_storage(storage: WithheldStorage, write: bool) -> Result<Box<dyn Image>> {
    let options = OpenOptions { read_only: !write, ..options() };
    open_with(storage, options)
}

/// Opens an image that is about to be filled.
fn open_new(storage: WithheldStorage) -> Result<Box<dyn Image>> {
    open_with(storage, OpenOptions { window_bytes: FILLING_WINDOW_BYTES, ..options() })
}

fn options() -> OpenOptions {
    OpenOptions { completion_log: false, holder: Some(ourselves()), ..OpenOptions::default() }
}

fn open_with(storage: WithheldStorage, options: OpenOptions) -> Result<Box<dyn Image>> {
    let notes = storage.notes();
    let image =
        blocking::Image::open(storage, options).map_err(|error| engine_failure(&error, &notes))?;
    Ok(Box::new(ExdImage { image, map: MapWindow::new() }))
}

/// Bytes of the disk that are defragmented before what was moved is made durable and the old space
/// given back.
const DEFRAG_STEP_BYTES: u64 = 64 << 20;

/// What a defragmentation did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Defragmented {
    /// Extents of the map before.
    pub extents_before: u64,
    /// Extents of the map now.
    pub extents_after: u64,
    /// Bytes moved.
    pub moved_bytes: u64,
}

/// Moves scattered data together. `step` is told the size of the disk and how many bytes of it have
/// been dealt with since the last call, and says whether to go on.
pub fn defragment(file: HostFile, mut step: impl FnMut(u64, u64) -> bool) -> Result<Defragmented> {
    let storage = WithheldStorage::new(storage(file)?);
    let notes = storage.notes();
    let failed = |error: exd_image::Error| engine_failure(&error, &notes);
    let mut image = blocking::Image::open(storage, options()).map_err(failed)?;
    image.checkpoint().map_err(failed)?;
    let size = image.virtual_size();
    let extents_before = image.info().extents;
    let mut at = 0;
    let mut go_on = step(size, 0);
    while go_on && at < size {
        let len = DEFRAG_STEP_BYTES.min(size - at);
        let moved = image.disk().stats().moved_bytes;
        image.defragment(at, len).map_err(failed)?;
        if image.disk().stats().moved_bytes != moved {
            image.flush().map_err(failed)?;
        }
        at += len;
        go_on = step(size, len);
    }
    image.checkpoint().map_err(failed)?;
    let extents_after = image.info().extents;
    let moved_bytes = image.disk().stats().moved_bytes;
    image.close().map_err(failed)?.release()?;
    Ok(Defragmented { extents_before, extents_after, moved_bytes })
}

/// The holder record of this process.
fn ourselves() -> HolderName {
    let host = nix::unistd::gethostname().unwrap_or_default();
    HolderName {
        pid: std::process::id().into(),
        started: now(),
        host: host.to_string_lossy().into_owned(),
        program: "imgtool".to_owned(),
        detail: String::new(),
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Image for ExdImage {
    fn size(&self) -> u64 {
        self.image.info().virtual_size
    }

    fn piece(&mut self, offset: u64, len: u64) -> Result<Piece> {
        if self.map.find(offset).is_none() {
            let window = len.min(self.map.len);
            let pieces = self.image.map(offset, window).map_err(Failure::new)?;
            self.map.fill(pieces);
        }
        let Some(piece) = self.map.find(offset) else {
            return Err(Failure::new(format_args!("offset {offset} is not in the map")));
        };
        let state = match piece.state {
            exd_image::State::Hole => State::Hole,
            exd_image::State::Unwritten => State::Unwritten,
            exd_image::State::Written => State::Data,
            exd_image::State::Zero => State::Zero,
        };
        let skip = offset - piece.offset;
        let physical = piece.physical.map(|place| place + skip);
        Ok(Piece { len: (piece.len - skip).min(len), state, physical, depth: 0 })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.image.read(offset, buffer).map_err(Failure::new)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.map.pieces.clear();
        self.image.write(offset, data).map_err(Failure::new)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<()> {
        self.map.pieces.clear();
        self.image.write_zeroes(offset, len, true).map_err(Failure::new)
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.map.pieces.clear();
        self.image.resize(size).map_err(Failure::new)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.image.close().map_err(Failure::new)?.release()
    }
}

/// What the superblock tells `info`.
pub fn describe(superblock: &Superblock, info: &mut ImageInfo) {
    info.virtual_size = superblock.virtual_size;
    info.cluster_size = Some(1 << superblock.block_bits);
    info.format = Format::Exd.name().to_owned();
    info.dirty_flag = superblock.state == exd_format::State::InUse;
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    info.backing_filename = text(&superblock.backing_path);
    info.backing_filename_format = text(&superblock.backing_format);
    info.format_specific = Some(FormatSpecific::Exd(Box::new(ExdData {
        version: "1.0".to_owned(),
        uuid: uuid::Uuid::from_bytes(superblock.uuid).to_string(),
        generation: superblock.generation,
        epoch: superblock.epoch,
        extents: superblock.extent_count,
        nodes: superblock.node_count,
        journal_size: superblock.ring_length(),
        preallocation: format!("{:?}", superblock.preallocation).to_lowercase(),
        created: superblock.created,
        incompatible_features: Vec::new(),
        read_only_reasons: superblock.read_only_reasons(),
        holder: None,
    })));
}

/// Who has the image open for writing, if somebody has.
pub fn holder(file: &HostFile) -> Result<Option<HolderData>> {
    if conflict(file, LockMode::Reader).map_err(Failure::new)?.is_none() {
        return Ok(None);
    }
    Ok(read_holder(file).map(|holder| HolderData {
        pid: holder.pid,
        host: holder.host,
        program: holder.program,
        detail: holder.detail,
        since: holder.started,
    }))
}

/// Refuses what is no EXD image at all before a check; damage is for the check to report.
pub fn read_superblock_for_check(file: &HostFile) -> Result<()> {
    let mut bytes = vec![0; 2 * SUPERBLOCK_SIZE];
    file.read_at(0, &mut bytes).during("could not read at offset 0")?;
    if is_exd(&bytes) { Ok(()) } else { Err(Failure::new("Image is not in exd format")) }
}
