//! Makes the images that tests/decoder/pack.py turns into golden ones.
//!
//! `cargo run --release -p exd-system-tests --example make_fixtures -- DIRECTORY`, with EXD_RUNTIME_DIR set
//! to DIRECTORY/run, so that completion logs lie there. For each image NAME.exd a raw file NAME.raw holds
//! what a reader must see, written without the engine. fixtures/README.md tells the whole procedure.

use exd_file::lock::lock;
use exd_file::{FileStorage, HostFile, LockMode};
use exd_image::blocking::Image;
use exd_image::{CreateOptions, OpenOptions, Preallocation};
use fastrand::Rng;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// An image being made, and what it must hold.
struct Maker {
    image: Image<FileStorage>,
    raw: File,
    rng: Rng,
    writes: u64,
}

/// What to make it with.
#[derive(Clone)]
struct Plan {
    create: CreateOptions,
    open: OpenOptions,
}

impl Plan {
    fn new(virtual_size: u64) -> Self {
        let create = CreateOptions {
            virtual_size,
            journal_bytes: 64 * KIB,
            created: 1_700_000_000,
            ..CreateOptions::default()
        };
        let open = OpenOptions {
            window_bytes: MIB,
            journal_max: 64 * KIB,
            completion_log: false,
            ..OpenOptions::default()
        };
        Plan { create, open }
    }

    fn block_size(mut self, bytes: u32) -> Self {
        self.create.block_size = bytes;
        self
    }

    fn preallocation(mut self, kind: Preallocation) -> Self {
        self.create.preallocation = kind;
        self
    }

    /// With a log, whose slots are few so that it stays small.
    fn completion_log(mut self) -> Self {
        self.open.completion_log = true;
        self.open.log_slots = 256;
        self
    }
}

impl Maker {
    /// A new image NAME.exd, opened for writing.
    fn new(directory: &Path, name: &str, plan: &Plan) -> Self {
        let path = directory.join(format!("{name}.exd"));
        let file = HostFile::create_new(&path, false).expect("the image does not exist yet");
        lock(&file, LockMode::Writer, Duration::ZERO).expect("lock");
        let uuid = uuid_of(name);
        let options = CreateOptions { uuid, ..plan.create.clone() };
        let storage = FileStorage::new(file).expect("storage");
        let storage = Image::create(storage, &options).expect("create");
        let image = Image::open(storage, plan.open.clone()).expect("open");
        let raw = File::create_new(directory.join(format!("{name}.raw"))).expect("raw file");
        raw.set_len(options.virtual_size).expect("length");
        let rng = Rng::with_seed(u64::from_le_bytes(std::array::from_fn(|i| uuid[i])));
        Maker { image, raw, rng, writes: 0 }
    }

    /// Writes sectors that tell where they belong and which write they are of.
    fn write(&mut self, offset: u64, len: u64) {
        let data = self.content(offset, len);
        self.image.write(offset, &data).expect("write");
        self.raw.write_all_at(&data, offset).expect("raw write");
    }

    /// As `write`, but not to be seen by a reader.
    fn write_lost(&mut self, offset: u64, len: u64) {
        let data = self.content(offset, len);
        self.image.write(offset, &data).expect("write");
    }

    fn content(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.writes += 1;
        let sectors = (offset / SECTOR..(offset + len) / SECTOR).flat_map(|sector| {
            let mut unit = [0; 16];
            unit[..8].copy_from_slice(&sector.to_le_bytes());
            unit[8..].copy_from_slice(&self.writes.to_le_bytes());
            unit.repeat(SECTOR as usize / 16)
        });
        sectors.collect()
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) {
        self.image.write_zeroes(offset, len, unmap).expect("write zeroes");
        self.zero_raw(offset, len);
    }

    /// Whole blocks are given up; a part of a block is not.
    fn discard(&mut self, offset: u64, len: u64) {
        self.image.discard(offset, len).expect("discard");
        let block_size = self.image.info().block_size;
        let start = offset.next_multiple_of(block_size);
        let end = (offset + len) / block_size * block_size;
        self.zero_raw(start, end.saturating_sub(start));
    }

    fn zero_raw(&self, offset: u64, len: u64) {
        self.raw.write_all_at(&vec![0; len as usize], offset).expect("raw write");
    }

    fn flush(&mut self) {
        self.image.flush().expect("flush");
    }

    fn resize(&mut self, size: u64) {
        self.image.resize(size).expect("resize");
        self.raw.set_len(size).expect("length");
    }

    /// Random writes of up to `most` sectors, a flush after each `per_flush`.
    fn scatter(&mut self, writes: u64, most: u64, per_flush: u64) {
        let sectors = self.image.virtual_size() / SECTOR;
        for i in 1..=writes {
            let count = self.rng.u64(1..=most);
            let start = self.rng.u64(0..=sectors - count);
            self.write(start * SECTOR, count * SECTOR);
            if i % per_flush == 0 {
                self.flush();
            }
        }
    }

    fn close(self) {
        self.image.close().expect("close");
    }

    /// Leaves the image as the death of its process would.
    fn abandon(self) {
        // The storage would remove nothing, but the file stays locked until its descriptor is gone.
        drop(self.image.abandon());
    }
}

/// A fixed identity for an image of this name.
fn uuid_of(name: &str) -> [u8; 16] {
    let mut uuid = [0x11u8; 16];
    for (i, byte) in name.bytes().enumerate() {
        uuid[i % 16] = uuid[i % 16].rotate_left(3) ^ byte;
    }
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Every state there is: written in pieces, zero with and without place, discarded, unaligned, overwritten.
fn every_state(maker: &mut Maker) {
    maker.write(0, 64 * KIB);
    maker.write(256 * KIB, 32 * KIB);
    maker.write(MIB + 512, 512);
    maker.write(MIB + 63 * 512, 8 * KIB);
    maker.write(2 * MIB, 256 * KIB);
    maker.flush();
    maker.write_zeroes(2 * MIB + 32 * KIB, 16 * KIB, false);
    maker.write_zeroes(2 * MIB + 96 * KIB, 16 * KIB, true);
    maker.write_zeroes(3 * MIB, 128 * KIB, false);
    maker.discard(2 * MIB + 160 * KIB, 64 * KIB);
    maker.flush();
    maker.write(2 * MIB + 36 * KIB, 1024);
    maker.write(3 * MIB + 64 * KIB, 4 * KIB);
}

fn clean_images(directory: &Path) {
    Maker::new(directory, "fresh", &Plan::new(64 * MIB)).close();
    Maker::new(directory, "fresh-15t", &Plan::new(15 << 40)).close();

    let mut maker = Maker::new(directory, "extents", &Plan::new(8 * MIB));
    every_state(&mut maker);
    maker.close();

    let kinds = [
        ("preallocated-metadata", Preallocation::Metadata),
        ("preallocated-falloc", Preallocation::Falloc),
        ("preallocated-full", Preallocation::Full),
    ];
    for (name, kind) in kinds {
        let mut maker = Maker::new(directory, name, &Plan::new(4 * MIB).preallocation(kind));
        maker.write(0, 12 * KIB);
        maker.write(MIB + 3 * 512, 1024);
        maker.flush();
        maker.discard(4 * KIB, 4 * KIB);
        maker.write_zeroes(2 * MIB, 64 * KIB, true);
        maker.close();
    }

    for (name, block_size) in [("blocks-512", 512), ("blocks-64k", 65536)] {
        // Not a multiple of the larger block: the last block reaches past the end.
        let plan = Plan::new(8 * MIB + 3 * 512).block_size(block_size);
        let mut maker = Maker::new(directory, name, &plan);
        every_state(&mut maker);
        maker.write(8 * MIB, 3 * 512);
        maker.scatter(20, 16, 8);
        maker.close();
    }

    let mut maker = Maker::new(directory, "resized", &Plan::new(4 * MIB));
    maker.scatter(40, 32, 10);
    maker.resize(2 * MIB + 512);
    maker.resize(16 * MIB);
    maker.write(16 * MIB - 512, 512);
    maker.close();

    let mut maker = Maker::new(directory, "emptied", &Plan::new(8 * MIB));
    every_state(&mut maker);
    maker.flush();
    maker.discard(0, 8 * MIB);
    maker.close();
}

/// A tree of three levels: more extents than 168 * 126.
fn tree(directory: &Path) {
    let mut plan = Plan::new(32 * MIB).block_size(512);
    plan.open.journal_max = MIB;
    let mut maker = Maker::new(directory, "tree", &plan);
    let mut blocks: Vec<u64> = (0..24_000).map(|i| 2 * i + 1).collect();
    maker.rng.clone().shuffle(&mut blocks);
    for (i, block) in blocks.into_iter().enumerate() {
        maker.write(block * 512, 512);
        if i % 500 == 0 {
            maker.flush();
        }
    }
    maker.close();
}

fn unclean_images(directory: &Path) {
    let mut maker = Maker::new(directory, "live-journal", &Plan::new(8 * MIB));
    every_state(&mut maker);
    maker.flush();
    maker.image.checkpoint().expect("checkpoint");
    maker.write(0, 512);
    maker.write(4 * MIB + 512, 20 * KIB);
    maker.write_zeroes(2 * MIB, 8 * KIB, false);
    maker.discard(256 * KIB, 16 * KIB);
    maker.flush();
    maker.write(5 * MIB, 4 * KIB);
    maker.flush();
    maker.abandon();

    let mut maker = Maker::new(directory, "live-log", &Plan::new(8 * MIB).completion_log());
    every_state(&mut maker);
    maker.flush();
    maker.write(5 * MIB, 4 * KIB);
    maker.write(6 * MIB + 512, 8 * KIB);
    maker.write_zeroes(2 * MIB, 8 * KIB, false);
    maker.discard(256 * KIB, 16 * KIB);
    maker.abandon();

    // pack.py tears the record of the last write, which no sync covered.
    let mut maker = Maker::new(directory, "torn-record", &Plan::new(8 * MIB));
    every_state(&mut maker);
    maker.flush();
    maker.write(5 * MIB, 4 * KIB);
    maker.flush();
    maker.write_lost(6 * MIB, 4 * KIB);
    maker.flush();
    maker.abandon();

    // pack.py damages one slot of each.
    for name in ["slot-0-damaged", "slot-1-damaged"] {
        let mut maker = Maker::new(directory, name, &Plan::new(8 * MIB));
        every_state(&mut maker);
        maker.flush();
        maker.abandon();
    }

    let mut plan = Plan::new(8 * MIB);
    plan.open.overlay_max = 40;
    let mut maker = Maker::new(directory, "journal-wrapped", &plan);
    maker.scatter(120, 24, 3);
    maker.abandon();

    let mut plan = Plan::new(16 * MIB);
    plan.open.journal_max = 512 * KIB;
    let mut maker = Maker::new(directory, "journal-grown", &plan);
    maker.scatter(400, 16, 2);
    maker.image.checkpoint().expect("checkpoint");
    maker.scatter(60, 16, 2);
    maker.abandon();
}

fn main() {
    let directory =
        PathBuf::from(std::env::args_os().nth(1).expect("usage: make_fixtures DIRECTORY"));
    std::fs::create_dir_all(directory.join("run")).expect("directory");
    clean_images(&directory);
    tree(&directory);
    unclean_images(&directory);
}
