//! The copying of `convert`: one thread reads and looks for zeroes, the other writes.

use crate::failure::{Context, During, Failure, Result};
use crate::formats::Image;
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::size::SECTOR;
use std::io::Read;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

/// Bytes that are read at once.
pub const CHUNK_BYTES: usize = 2 << 20;
/// Chunks on their way from the reader to the writer.
const CHUNKS_IN_FLIGHT: usize = 6;
/// Longest run of zeroes that travels as one chunk, so that interrupts and progress are not late.
const ZERO_RUN_BYTES: u64 = 1 << 30;
/// Holes shorter than this are read with the data around them.
const SKIPPED_BYTES: usize = 64 << 10;
/// A target that must grow with a stream grows at least by so much.
const GROWTH_BYTES: u64 = 1 << 30;

/// What is copied, one after another.
pub enum Source {
    /// An image.
    Image(PathBuf, Box<dyn Image>),
    /// Raw data of unknown length.
    Stream(PathBuf, Box<dyn Read + Send>),
}

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Runs of so many zero bytes become holes; 0: everything is written.
    pub sparse: u64,
    /// The target reads as zeroes where nothing was written.
    pub target_is_zero: bool,
    /// The target grows as needed.
    pub grow: bool,
    /// Progress counts data only, not holes; see [`data_bytes`].
    pub count_data_only: bool,
}

/// A part of the disk. What is in no run is zeroes.
struct Chunk {
    offset: u64,
    len: u64,
    buffer: Vec<u8>,
    runs: Vec<Range<usize>>,
}

/// Bytes of `image` that are stored as data, for progress.
pub fn data_bytes(image: &mut dyn Image) -> Result<u64> {
    let (mut offset, mut data) = (0, 0);
    while offset < image.size() {
        let piece = image.piece(offset, image.size() - offset)?;
        if !piece.state.is_zero() {
            data += piece.len;
        }
        offset += piece.len;
    }
    Ok(data)
}

/// Copies the sources to the target.
pub fn copy(
    sources: Vec<Source>,
    target: &mut dyn Image,
    plan: Plan,
    interrupt: &Interrupt,
    progress: &mut Progress,
) -> Result<()> {
    let (chunk_sender, chunk_receiver) = sync_channel(CHUNKS_IN_FLIGHT);
    let (buffer_sender, buffer_receiver) = channel();
    thread::scope(|scope| {
        let reader = thread::Builder::new()
            .name("reader".to_owned())
            .spawn_scoped(scope, move || {
                let mut reader =
                    Reader { plan, chunks: chunk_sender, buffers: buffer_receiver, position: 0 };
                sources
                    .into_iter()
                    .try_for_each(|source| reader.read(source))
                    .map(|()| reader.position)
            })
            .during("could not start a thread")?;
        // The receiver is dropped with the writer's error, which ends the reader too.
        let written = write_all(target, plan, chunk_receiver, &buffer_sender, interrupt, progress);
        let end = match reader.join() {
            Ok(end) => end,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        written?;
        let end = end?.next_multiple_of(SECTOR);
        if plan.grow && target.size() != end {
            target.resize(end)?;
        }
        Ok(())
    })
}

struct Reader {
    plan: Plan,
    chunks: SyncSender<Chunk>,
    buffers: Receiver<Vec<u8>>,
    position: u64,
}

impl Reader {
    fn read(&mut self, source: Source) -> Result<()> {
        match source {
            Source::Image(path, mut image) => self.read_image(image.as_mut()).about(&path),
            Source::Stream(path, mut stream) => self.read_stream(stream.as_mut()).about(&path),
        }
    }

    fn read_image(&mut self, image: &mut dyn Image) -> Result<()> {
        let base = self.position;
        let mut offset = 0;
        while offset < image.size() {
            let rest = image.size() - offset;
            let chunk = rest.min(self.until_boundary(base + offset));
            let piece = image.piece(offset, rest)?;
            let len = if piece.state.is_zero() && piece.len >= chunk && self.plan.sparse > 0 {
                let len = piece.len.min(ZERO_RUN_BYTES);
                self.send(Chunk { offset: base + offset, len, buffer: Vec::new(), runs: vec![] })?;
                len
            } else {
                let mut buffer = self.buffer(chunk as usize);
                let parts = self.read_parts(image, offset, &mut buffer)?;
                self.send_data(base + offset, buffer, &parts)?;
                chunk
            };
            offset += len;
        }
        self.position = base + image.size();
        Ok(())
    }

    /// Reads the parts of a chunk that may hold data, and returns where they are; what is in none of
    /// them is zeroes and was not touched. Short holes between data are read with it.
    fn read_parts(
        &self,
        image: &mut dyn Image,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<Vec<Range<usize>>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut at = 0;
        while at < buffer.len() {
            let piece = image.piece(offset + at as u64, (buffer.len() - at) as u64)?;
            let end = at + piece.len as usize;
            let skipped =
                piece.state.is_zero() && self.plan.sparse > 0 && end - at >= SKIPPED_BYTES;
            match parts.last_mut() {
                _ if skipped => {}
                Some(last) if last.end == at => last.end = end,
                _ => parts.push(at..end),
            }
            at = end;
        }
        for part in &parts {
            image.read(offset + part.start as u64, &mut buffer[part.clone()])?;
        }
        Ok(parts)
    }

    fn read_stream(&mut self, stream: &mut dyn Read) -> Result<()> {
        loop {
            let mut buffer = self.buffer(self.until_boundary(self.position) as usize);
            let mut filled = 0;
            while filled < buffer.len() {
                match stream.read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        let offset = self.position + filled as u64;
                        return Err(error)
                            .during(format_args!("could not read at offset {offset}"));
                    }
                }
            }
            let ended = filled < buffer.len();
            // A disk has whole sectors.
            let len = filled.next_multiple_of(SECTOR as usize);
            buffer[filled..len].fill(0);
            buffer.truncate(len);
            if len > 0 {
                let whole = 0..len;
                self.send_data(self.position, buffer, &[whole])?;
                self.position += len as u64;
            }
            if ended {
                return Ok(());
            }
        }
    }

    /// Bytes until the next multiple of the chunk size: chunks are aligned, so that writes are.
    fn until_boundary(&self, position: u64) -> u64 {
        CHUNK_BYTES as u64 - position % CHUNK_BYTES as u64
    }

    /// A buffer of this length, used before or new.
    fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.buffers.try_recv().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Sends a chunk of which only `parts` were read.
    fn send_data(&self, offset: u64, buffer: Vec<u8>, parts: &[Range<usize>]) -> Result<()> {
        let runs = match usize::try_from(self.plan.sparse).unwrap_or(usize::MAX) {
            0 => parts.to_vec(),
            cell => {
                let cell = cell.clamp(SECTOR as usize, CHUNK_BYTES);
                parts.iter().flat_map(|part| data_runs(&buffer, part.clone(), cell)).collect()
            }
        };
        self.send(Chunk { offset, len: buffer.len() as u64, buffer, runs })
    }

    fn send(&self, chunk: Chunk) -> Result<()> {
        // Only the writer's own failure, which is the one reported, closes the channel.
        self.chunks.send(chunk).map_err(|_| Failure::new("the copy was ended"))
    }
}

fn write_all(
    target: &mut dyn Image,
    plan: Plan,
    chunks: Receiver<Chunk>,
    buffers: &Sender<Vec<u8>>,
    interrupt: &Interrupt,
    progress: &mut Progress,
) -> Result<()> {
    for chunk in chunks {
        interrupt.check()?;
        let end = chunk.offset + chunk.len;
        if plan.grow && end > target.size() {
            target.resize(end.max(target.size().saturating_mul(2)).max(GROWTH_BYTES))?;
        }
        write_chunk(target, plan, &chunk)?;
        if !(plan.count_data_only && chunk.buffer.is_empty()) {
            progress.advance(chunk.len);
        }
        if !chunk.buffer.is_empty() {
            // The reader may have ended.
            let _ = buffers.send(chunk.buffer);
        }
    }
    interrupt.check()
}

fn write_chunk(target: &mut dyn Image, plan: Plan, chunk: &Chunk) -> Result<()> {
    let mut position = chunk.offset;
    let zeroes = |target: &mut dyn Image, from: u64, to: u64| match from < to {
        true if !plan.target_is_zero => target.write_zeroes(from, to - from),
        _ => Ok(()),
    };
    for run in &chunk.runs {
        let start = chunk.offset + run.start as u64;
        zeroes(target, position, start)?;
        target.write(start, &chunk.buffer[run.clone()])?;
        position = start + run.len() as u64;
    }
    zeroes(target, position, chunk.offset + chunk.len)
}

/// The parts of `buffer[part]` that are not zero, in cells of `cell` bytes counted from the start of
/// the buffer.
fn data_runs(buffer: &[u8], part: Range<usize>, cell: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut start = part.start;
    while start < part.end {
        let end = ((start / cell + 1) * cell).min(part.end);
        if !is_zero(&buffer[start..end]) {
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        start = end;
    }
    runs
}

/// True if all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // In pieces long enough for the compiler to use vectors, short enough to stop early.
    let mut pieces = bytes.chunks_exact(256);
    pieces.by_ref().all(|piece| piece.iter().fold(0, |or, byte| or | byte) == 0)
        && pieces.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_found() {
        let mut bytes = vec![0; 1000];
        assert!(is_zero(&bytes));
        assert!(is_zero(&[]));
        for at in [0, 255, 256, 767, 768, 999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
            bytes[at] = 0;
        }
    }

    #[test]
    fn runs_are_whole_cells() {
        let mut buffer = vec![0; 10_000];
        let runs = |buffer: &[u8], cell| data_runs(buffer, 0..buffer.len(), cell);
        buffer[4096] = 1;
        buffer[8192] = 1;
        assert_eq!(runs(&buffer, 4096), std::iter::once(4096..10_000).collect::<Vec<_>>());
        buffer[4096] = 0;
        buffer[0] = 1;
        assert_eq!(runs(&buffer, 4096), vec![0..4096, 8192..10_000]);
        assert_eq!(runs(&buffer, 512), vec![0..512, 8192..8704]);
        assert!(runs(&[0; 512], 512).is_empty());
        // Cut at the part, counted from the start of the buffer.
        buffer.fill(1);
        assert_eq!(data_runs(&buffer, 512..1536, 1024).first(), Some(&(512..1536)));
        buffer[512..1024].fill(0);
        assert_eq!(data_runs(&buffer, 512..1536, 1024).first(), Some(&(1024..1536)));
    }
}
