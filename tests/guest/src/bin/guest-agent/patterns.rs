//! Writing patterns known to break disks, re-created for a disk or a file.
//!
//! `neighbours` is the hazard of xfstests generic/240 and `fresh` that of generic/239; both are written
//! here from the description of the hazard. Everything written is stamped (see the stamp module), so a
//! failure names the sector and what was found in it.

use crate::aio::{Buffer, Context};
use crate::init;
use exd_guest_tests::stamp::{self, Found, SECTOR};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

const SECTOR_BYTES: u64 = SECTOR as u64;
/// Bytes that `scan` and the verifications read at a time.
const READ_BYTES: usize = 1 << 20;

/// Where a pattern works: bytes `start .. start + length` of a disk or file, both multiples of 512.
#[derive(Debug, Clone)]
pub struct Place {
    pub path: String,
    pub start: u64,
    pub length: u64,
}

/// What is done to a place before it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Nothing: the place is as it was, a hole if it was never written.
    Nothing,
    /// BLKZEROOUT: a write-zeroes request.
    Zeroes,
    /// BLKDISCARD: a discard request.
    Discard,
}

impl Place {
    /// Opens with O_DIRECT; a path that does not exist becomes a file.
    pub fn open(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        options.custom_flags(libc::O_DIRECT).open(&self.path)
    }
}

/// Concurrent asynchronous writes of one block's size each, side by side and 512 bytes off the block
/// grid, into a place not yet written: neighbours share a block, and each must keep its sectors.
/// Returns the number of rounds.
pub fn neighbours(
    place: &Place,
    block: u64,
    writers: usize,
    before: Before,
) -> io::Result<serde_json::Value> {
    let file = place.open()?;
    let step = (block * (writers as u64 + 1)).next_multiple_of(65536);
    let round_count = place.length / step;
    let threads = processors().min(writers);
    let barrier = Barrier::new(threads);
    let failed = AtomicBool::new(false);
    // Each thread writes its share of a round; the first one prepares the place and verifies it.
    let work = |thread: usize, context: &mut Context, round: u64| -> io::Result<()> {
        let base = place.start + round * step;
        let prepared = if thread == 0 { prepare(&file, before, base, step) } else { Ok(()) };
        let mine = (thread..writers).step_by(threads).map(|writer| {
            let offset = base + SECTOR_BYTES + writer as u64 * block;
            (writer, stamped(offset, block, writer as u64 + 1), offset)
        });
        let requests: Vec<_> = mine.collect();
        barrier.wait();
        let submitted = context.write(&file, requests);
        let written = prepared.and(submitted).and(drain(context));
        barrier.wait();
        if thread > 0 || written.is_err() {
            return written;
        }
        let range = SECTOR_BYTES..SECTOR_BYTES + writers as u64 * block;
        verify(&file, base, step, |offset| {
            let inside = range.contains(&(offset - base));
            inside.then(|| (offset - base - SECTOR_BYTES) / block + 1)
        })
    };
    on_each_processor(threads, |thread| {
        let mut context = Context::new(writers)?;
        let mut result = Ok(());
        for round in 0..round_count {
            result = result.and(work(thread, &mut context, round));
            failed.fetch_or(result.is_err(), Ordering::SeqCst);
            barrier.wait();
            if failed.load(Ordering::SeqCst) {
                break;
            }
            barrier.wait();
        }
        result
    })?;
    Ok(serde_json::json!({ "rounds": round_count, "writes": round_count * writers as u64 }))
}

/// A write into a hole, and as soon as it is complete a read that must see it. Two threads work on
/// interleaved places, so that the blocks they share are written for the first time by both at once.
pub fn fresh(place: &Place, block: u64, shift: u64) -> io::Result<serde_json::Value> {
    let file = place.open()?;
    let slots = (place.length - shift) / block;
    let threads = processors();
    on_each_processor(threads, |thread| {
        let mut context = Context::new(1)?;
        for slot in (thread as u64..slots).step_by(threads) {
            let offset = place.start + shift + slot * block;
            let request = (0, stamped(offset, block, slot + 1), offset);
            context.write(&file, vec![request])?;
            drain(&mut context)?;
            verify(&file, offset, block, |_| Some(slot + 1))?;
        }
        Ok(())
    })?;
    verify(&file, place.start + shift, slots * block, |offset| {
        Some((offset - place.start - shift) / block + 1)
    })?;
    Ok(serde_json::json!({ "writes": slots }))
}

/// Overlapping unaligned writes in flight together, then a read of the whole place: each sector must
/// be from one of the writes of its round, or unchanged where none of them went.
pub fn storm(
    place: &Place,
    rounds: u64,
    depth: usize,
    max_sectors: u64,
    seed: u64,
) -> io::Result<serde_json::Value> {
    let file = place.open()?;
    let sectors = place.length / SECTOR_BYTES;
    let first = place.start / SECTOR_BYTES;
    let mut chance = seed;
    let mut generation = 0;
    // The generation of each sector; 0 is never written, so zeroes.
    let mut content = vec![0u64; sectors as usize];
    let mut context = Context::new(depth)?;
    for _ in 0..rounds {
        let mut allowed: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let mut requests = Vec::new();
        for tag in 0..depth {
            generation += 1;
            let count = 1 + stamp::next_random(&mut chance) % max_sectors;
            let at = stamp::next_random(&mut chance) % (sectors - count + 1);
            (at..at + count).for_each(|s| allowed.entry(s).or_default().push(generation));
            let offset = place.start + at * SECTOR_BYTES;
            requests.push((tag, stamped(offset, count * SECTOR_BYTES, generation), offset));
        }
        context.write(&file, requests)?;
        drain(&mut context)?;
        let mut wrong = None;
        each_sector(&file, place.start, place.length, |sector, found| {
            let index = sector - first;
            let known = &mut content[index as usize];
            let fits = match (found, allowed.get(&index)) {
                (Found::Zeroes, None) => *known == 0,
                (Found::Stamp { sector: own, generation }, None) => {
                    own == sector && generation == *known
                }
                (Found::Stamp { sector: own, generation }, Some(writers)) => {
                    *known = generation;
                    own == sector && writers.contains(&generation)
                }
                _ => false,
            };
            if !fits && wrong.is_none() {
                let writers = allowed.get(&index);
                wrong = Some(format!("sector {sector}: {found:?}, in flight were {writers:?}"));
            }
        })?;
        if let Some(wrong) = wrong {
            return Err(io::Error::other(wrong));
        }
    }
    Ok(serde_json::json!({ "writes": generation }))
}

/// A write that the disk has completed: (first sector, sectors, generation).
pub type Acked = (u64, u64, u64);

/// Random unaligned writes, never two in flight to one sector; `report` gets each completed write.
/// Nothing is flushed.
pub fn acked(
    place: &Place,
    writes: u64,
    depth: usize,
    max_sectors: u64,
    seed: u64,
    mut report: impl FnMut(&[Acked]) -> io::Result<()>,
) -> io::Result<serde_json::Value> {
    let file = place.open()?;
    let sectors = place.length / SECTOR_BYTES;
    let mut chance = seed;
    let mut context = Context::new(depth)?;
    let mut running: Vec<Option<Acked>> = vec![None; depth];
    let mut generation = 0;
    while generation < writes || context.in_flight() > 0 {
        let mut requests = Vec::new();
        for tag in 0..depth {
            if running[tag].is_some() || generation >= writes {
                continue;
            }
            let count = 1 + stamp::next_random(&mut chance) % max_sectors;
            let at = stamp::next_random(&mut chance) % (sectors - count + 1);
            let sector = place.start / SECTOR_BYTES + at;
            let apart = |other: &Acked| sector + count <= other.0 || other.0 + other.1 <= sector;
            if !running.iter().flatten().all(apart) {
                continue;
            }
            generation += 1;
            running[tag] = Some((sector, count, generation));
            let offset = sector * SECTOR_BYTES;
            requests.push((tag, stamped(offset, count * SECTOR_BYTES, generation), offset));
        }
        context.write(&file, requests)?;
        let mut complete = Vec::new();
        for finished in context.wait()? {
            finished.result?;
            complete.extend(running[finished.tag].take());
        }
        report(&complete)?;
    }
    Ok(serde_json::json!({ "writes": generation }))
}

/// What a place contains, as runs: (first sector, sectors, generation). Generation 0 is zeroes and -1 is
/// neither zeroes nor the stamp of that sector.
pub fn scan(place: &Place, mut report: impl FnMut(u64, u64, i64)) -> io::Result<serde_json::Value> {
    let file = place.open()?;
    let mut run: Option<(u64, u64, i64)> = None;
    each_sector(&file, place.start, place.length, |sector, found| {
        let generation = match found {
            Found::Zeroes => 0,
            Found::Stamp { sector: own, generation } if own == sector => generation as i64,
            _ => -1,
        };
        run = match run {
            Some((first, count, same)) if same == generation => Some((first, count + 1, same)),
            other => {
                if let Some((first, count, generation)) = other {
                    report(first, count, generation);
                }
                Some((sector, 1, generation))
            }
        };
    })?;
    if let Some((first, count, generation)) = run {
        report(first, count, generation);
    }
    Ok(serde_json::Value::Null)
}

/// Files `first..` in a directory, each written (through the page cache, or by unaligned asynchronous
/// direct writes side by side), fsynced together with its directory, and then reported.
pub fn write_files(
    dir: &str,
    first: u64,
    count: u64,
    mut report: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<serde_json::Value> {
    for number in first..first + count {
        let path = file_path(dir, number);
        let bytes = file_sectors(number) * SECTOR_BYTES;
        let file = if number % 2 == 0 {
            let mut content = vec![0; bytes as usize];
            stamp::fill_run(&mut content, 0, number + 1);
            std::fs::write(&path, &content)?;
            File::open(&path)?
        } else {
            let place = Place { path, start: 0, length: bytes };
            let file = place.open()?;
            let mut context = Context::new(64)?;
            let head = (0, stamped(0, SECTOR_BYTES, number + 1), 0);
            let rest = (1..).zip((SECTOR_BYTES..bytes).step_by(4096)).map(|(tag, offset)| {
                let length = 4096.min(bytes - offset);
                (tag, stamped(offset, length, number + 1), offset)
            });
            let requests: Vec<_> = std::iter::once(head).chain(rest).collect();
            context.write(&file, requests)?;
            drain(&mut context)?;
            file
        };
        file.sync_all()?;
        File::open(dir)?.sync_all()?;
        report(number)?;
    }
    Ok(serde_json::json!({ "files": count }))
}

/// Verifies the first `count` files of `write_files`.
pub fn verify_files(dir: &str, count: u64) -> io::Result<serde_json::Value> {
    let mut bytes = 0;
    for number in 0..count {
        let path = file_path(dir, number);
        let wrong = |what: String| io::Error::other(format!("{path}: {what}"));
        let content = std::fs::read(&path).map_err(|error| wrong(error.to_string()))?;
        if content.len() as u64 != file_sectors(number) * SECTOR_BYTES {
            return Err(wrong(format!("{} bytes long", content.len())));
        }
        for (sector, chunk) in (0u64..).zip(content.chunks_exact(SECTOR)) {
            let expected = Found::Stamp { sector, generation: number + 1 };
            if stamp::read(chunk) != expected {
                return Err(wrong(format!("sector {sector}: {:?}", stamp::read(chunk))));
            }
        }
        bytes += content.len();
    }
    Ok(serde_json::json!({ "files": count, "bytes": bytes }))
}

fn file_path(dir: &str, number: u64) -> String {
    format!("{dir}/file-{number}")
}

/// Length of file `number`: 1 to 200 sectors.
fn file_sectors(number: u64) -> u64 {
    1 + stamp::next_random(&mut number.wrapping_add(99)) % 200
}

fn stamped(offset: u64, length: u64, generation: u64) -> Buffer {
    let mut buffer = Buffer::new(length as usize);
    stamp::fill_run(buffer.bytes_mut(), offset / SECTOR_BYTES, generation);
    buffer
}

fn drain(context: &mut Context) -> io::Result<()> {
    let mut result = Ok(());
    while context.in_flight() > 0 {
        for finished in context.wait()? {
            result = result.and(finished.result.map(|_| ()));
        }
    }
    result
}

/// Runs `work` in `threads` threads, each bound to a processor of its own, and so to a queue of the disk
/// if there are several. The first error counts.
fn on_each_processor(
    threads: usize,
    work: impl Fn(usize) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let results: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let start = |thread| {
            let work = &work;
            scope.spawn(move || init::bind_to_processor(thread).and_then(|()| work(thread)))
        };
        let workers: Vec<_> = (0..threads).map(start).collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    results.into_iter().collect()
}

/// Number of processors the guest has, at most 8.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get()).min(8)
}

/// Reads with O_DIRECT and shows every sector.
fn each_sector(
    file: &File,
    start: u64,
    length: u64,
    mut see: impl FnMut(u64, Found),
) -> io::Result<()> {
    let mut buffer = Buffer::new(READ_BYTES.min(length as usize));
    let mut offset = start;
    while offset < start + length {
        let bytes = (READ_BYTES as u64).min(start + length - offset) as usize;
        let part = &mut buffer.bytes_mut()[..bytes];
        file.read_exact_at(part, offset)?;
        for (index, sector) in (0u64..).zip(part.chunks_exact(SECTOR)) {
            see(offset / SECTOR_BYTES + index, stamp::read(sector));
        }
        offset += bytes as u64;
    }
    Ok(())
}

/// Fails at the first sector that is not as `expected` says: the stamp of a generation, or zeroes.
fn verify(
    file: &File,
    start: u64,
    length: u64,
    expected: impl Fn(u64) -> Option<u64>,
) -> io::Result<()> {
    let mut wrong = None;
    each_sector(file, start, length, |sector, found| {
        let expected = match expected(sector * SECTOR_BYTES) {
            Some(generation) => Found::Stamp { sector, generation },
            None => Found::Zeroes,
        };
        if found != expected && wrong.is_none() {
            wrong = Some(format!("sector {sector}: {found:?} instead of {expected:?}"));
        }
    })?;
    wrong.map_or(Ok(()), |wrong| Err(io::Error::other(wrong)))
}

fn prepare(file: &File, before: Before, start: u64, length: u64) -> io::Result<()> {
    const BLKDISCARD: libc::c_ulong = 0x1277;
    const BLKZEROOUT: libc::c_ulong = 0x127F;
    let request = match before {
        Before::Nothing => return Ok(()),
        Before::Zeroes => BLKZEROOUT,
        Before::Discard => BLKDISCARD,
    };
    if !file.metadata()?.file_type().is_block_device() {
        return Err(io::Error::other("only a disk can be discarded or zeroed here"));
    }
    let range = [start, length];
    // SAFETY: both requests read two u64 from the pointer.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
