//! Seeded workloads: which image, which host, which requests, in which order things happen.

use crate::api::{Request, SECTOR};
use crate::engine::{Engine, ImageConfig, Preallocation};
use crate::host_file::mix;
use crate::session::Session;
use exd_image::ZeroAhead;

/// How often each kind of request occurs, relative to the others.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Weights {
    pub write: u32,
    pub stream: u32,
    pub zeroes: u32,
    pub discard: u32,
    pub flush: u32,
    pub read: u32,
    pub checkpoint: u32,
    pub defragment: u32,
    pub resize: u32,
    pub reopen: u32,
}

/// An image, a host and a way to use them.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Its name, for repeating.
    pub name: &'static str,
    /// The image and its host.
    pub config: ImageConfig,
    /// Number of requests.
    pub requests: u32,
    /// Most requests under way at once.
    pub depth: usize,
    /// Bytes of the disk, from `base`, on which most of them fall.
    pub hot: u64,
    /// Where the hot part begins.
    pub base: u64,
    /// Longest request in sectors.
    pub max_sectors: u64,
    /// Percentage of requests aligned to blocks.
    pub aligned: u32,
    /// Percentage of requests for the block that the stream has reached.
    pub follow: u32,
    /// Percentage of writes to be complete only when durable.
    pub durable: u32,
    /// The mix.
    pub weights: Weights,
}

/// The names of all profiles for the real engine.
pub const PROFILES: [&str; 17] = [
    "mixed",
    "stream",
    "left",
    "sectors",
    "discard",
    "prealloc",
    "resize",
    "coarse",
    "device",
    "wrap",
    "big",
    "nopunch",
    "lazy",
    "pool",
    "device-pool",
    "fragments",
    "storm",
];

const MIX: Weights = Weights {
    write: 50,
    stream: 10,
    zeroes: 8,
    discard: 10,
    flush: 14,
    read: 8,
    checkpoint: 3,
    defragment: 4,
    resize: 0,
    reopen: 1,
};

impl Profile {
    /// The profile of this name, its details chosen by the seed. `any` lets the seed choose.
    pub fn named(name: &str, seed: u64) -> Option<Profile> {
        if name == "any" {
            let pick = mix(seed) as usize % PROFILES.len();
            return Profile::named(PROFILES[pick], seed);
        }
        let mut rng = fastrand::Rng::with_seed(mix(seed ^ 0x9807));
        let block = match rng.u8(0..10) {
            0..2 => 512,
            2..8 => 4096,
            _ => 65536,
        };
        let mut profile = Profile::basic("mixed", seed, block, &mut rng);
        match name {
            "mixed" => {}
            "toy" => {
                profile = Profile::basic("toy", seed, 4096, &mut rng);
                profile.name = "toy";
                profile.config.virtual_size = 128 << 10;
                profile.durable = 0;
                profile.weights.resize = 4;
            }
            "stream" => {
                profile.name = "stream";
                profile.weights =
                    Weights { write: 5, stream: 80, flush: 10, discard: 3, reopen: 0, ..MIX };
                profile.depth = rng.usize(2..8);
            }
            "left" => {
                profile.name = "left";
                // Streams that share a block with the write before, which is under way, and others who
                // want that block.
                profile.config.zero_ahead = [ZeroAhead::Off, ZeroAhead::Zero][rng.usize(0..2)];
                profile.config.zero_ahead_write_max = 64 << 10;
                profile.config.block_size = if block == 512 { 4096 } else { block };
                profile.depth = rng.usize(3..8);
                profile.requests = 30;
                profile.hot = 160 << 10;
                profile.follow = 60;
                profile.weights = Weights {
                    write: 8,
                    stream: 70,
                    flush: 5,
                    discard: 10,
                    zeroes: 4,
                    read: 12,
                    defragment: 4,
                    ..MIX
                };
            }
            "sectors" => {
                // Blocks of a sector: requests begin anywhere, and short ones take the 4 KiB around them.
                profile = Profile::basic("sectors", seed, 512, &mut rng);
                profile.aligned = 0;
                profile.hot = [24 << 10, 64 << 10, 256 << 10][rng.usize(0..3)];
                profile.requests = 30;
                profile.weights = Weights { read: 25, stream: 20, ..MIX };
            }
            "discard" => {
                profile.name = "discard";
                profile.weights = Weights { write: 45, discard: 30, zeroes: 15, flush: 20, ..MIX };
                profile.aligned = 70;
                profile.hot = profile.hot.min(6 * u64::from(profile.config.block_size));
            }
            "prealloc" => {
                profile.name = "prealloc";
                profile.config.preallocation = match rng.u8(0..3) {
                    0 => Preallocation::Metadata,
                    1 => Preallocation::Falloc,
                    _ => Preallocation::Full,
                };
                profile.config.virtual_size = 256 << 10;
                profile.hot = profile.hot.min(128 << 10);
            }
            "resize" => {
                profile.name = "resize";
                profile.weights.resize = 12;
                profile.weights.discard = 6;
                profile.base =
                    profile.config.virtual_size.saturating_sub(profile.hot) / SECTOR * SECTOR;
            }
            "coarse" => {
                profile.name = "coarse";
                profile.config.geometry.alignment = 4096;
                profile.config.record_align = 4096;
                profile.config.block_size = if block == 512 { 4096 } else { block };
            }
            "device" => {
                profile.name = "device";
                profile.config.geometry.fixed_length = true;
                profile.config.geometry.host_block = 512;
            }
            "wrap" => {
                profile.name = "wrap";
                profile.requests = 60;
                profile.max_sectors = 8;
                profile.depth = 2;
                profile.weights = Weights { write: 60, flush: 60, checkpoint: 4, reopen: 2, ..MIX };
            }
            "big" => {
                profile.name = "big";
                profile.max_sectors = 512;
                profile.hot = 768 << 10;
                profile.requests = 12;
            }
            "nopunch" => profile.name = "nopunch",
            "fragments" => {
                profile.name = "fragments";
                // Places aligned to their data, with scraps between them, closed and opened again and again.
                profile.config.detours = true;
                profile.config.zero_ahead = ZeroAhead::Off;
                profile.config.overlay_max = [16, 64, 8192][rng.usize(0..3)];
                profile.hot = profile.config.virtual_size;
                profile.aligned = 0;
                profile.requests = 30;
                profile.weights = Weights { write: 60, discard: 12, reopen: 10, ..MIX };
            }
            "storm" => {
                profile.name = "storm";
                // Everything that moves or frees places, in one session and over several.
                profile.config.detours = seed.is_multiple_of(2);
                profile.requests = 18;
                profile.depth = rng.usize(2..6);
                profile.base =
                    profile.config.virtual_size.saturating_sub(profile.hot) / SECTOR * SECTOR;
                profile.weights = Weights {
                    write: 50,
                    stream: 5,
                    discard: 16,
                    zeroes: 8,
                    defragment: 14,
                    resize: 6,
                    reopen: 5,
                    ..MIX
                };
            }
            "lazy" => {
                profile.name = "lazy";
                profile.weights = Weights { flush: 1, checkpoint: 1, ..MIX };
            }
            "pool" | "device-pool" => {
                profile.name = if name == "pool" { "pool" } else { "device-pool" };
                // Small first writes, mostly: they are placed where zeroes were written just before.
                profile.config.zero_ahead = ZeroAhead::Zero;
                profile.config.zero_ahead_write_max = 64 << 10;
                profile.config.window_bytes = [256 << 10, 1 << 20][rng.usize(0..2)];
                profile.hot = profile.config.virtual_size;
                profile.max_sectors = 16;
                profile.requests = 30;
                profile.weights = Weights { write: 80, read: 4, zeroes: 2, discard: 4, ..MIX };
                if name == "device-pool" {
                    profile.config.geometry.fixed_length = true;
                    profile.config.geometry.host_block = 512;
                }
            }
            _ => return None,
        }
        Some(profile)
    }

    /// Most images have a pool, small enough to run out; it is given back after a tick or two.
    fn choose_pool(config: &mut ImageConfig, seed: u64) {
        let mut rng = fastrand::Rng::with_seed(mix(seed ^ 0x2e0a));
        config.zero_ahead = match rng.u8(0..8) {
            0..5 => ZeroAhead::Zero,
            5 => ZeroAhead::Falloc,
            _ => ZeroAhead::Off,
        };
        config.zero_ahead_bytes = [32 << 10, 64 << 10, 256 << 10][rng.usize(0..3)];
        config.zero_ahead_write_max = [512, 8 << 10, 64 << 10][rng.usize(0..3)];
        config.zero_ahead_burst = [16 << 10, 64 << 10, 4 << 20][mix(seed ^ 0xB0) as usize % 3];
        config.zero_ahead_idle_ms = [100, 200, 1000][rng.usize(0..3)];
    }

    fn basic(name: &'static str, seed: u64, block: u32, rng: &mut fastrand::Rng) -> Profile {
        let (size, hot_blocks, max_sectors) = match block {
            512 => (256 << 10, 40, 24),
            4096 => (512 << 10, 12, 40),
            _ => (1 << 20, 4, 200),
        };
        let mut config = ImageConfig::new(size, block);
        if rng.u8(0..4) == 0 {
            // The last block is cut by the end of the disk.
            config.virtual_size = size - SECTOR * rng.u64(1..8);
        }
        config.uuid[..8].copy_from_slice(&mix(seed).to_le_bytes());
        config.record_align = if rng.u8(0..4) == 0 { 512 } else { 4096 };
        // Small enough that windows run out, the journal wraps and grows, checkpoints come often.
        config.window_bytes = [64 << 10, 128 << 10, 256 << 10, 1 << 20][rng.usize(0..4)];
        config.journal_max = [64 << 10, 128 << 10, 256 << 10][rng.usize(0..3)];
        config.overlay_max = [4, 16, 64, 8192][rng.usize(0..4)];
        config.log_slots = [128, 256, 1024][rng.usize(0..3)];
        // From room for everything to hardly any.
        config.fast_bytes = [16384, 4096, 256, 64][mix(seed ^ 0xFA57) as usize % 4];
        config.clear_up_nodes = [0, 1, 4][mix(seed ^ 0xC1EA) as usize % 3];
        config.cache_bytes = if rng.bool() { 1 << 20 } else { 64 << 10 };
        Self::choose_pool(&mut config, seed);
        Profile {
            name,
            config,
            requests: rng.u32(14..26),
            depth: rng.usize(1..7),
            hot: hot_blocks * u64::from(block),
            base: 0,
            max_sectors,
            aligned: rng.u32(10..60),
            follow: 0,
            durable: if rng.bool() { 15 } else { 0 },
            weights: MIX,
        }
    }
}

/// The requests and the order of events of one run.
#[derive(Clone, Debug)]
pub struct Workload {
    profile: Profile,
    rng: fastrand::Rng,
    left: u32,
    stream_at: u64,
}

/// What the workload wants next from its runner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Go on.
    More,
    /// Close cleanly and open again, then go on.
    Reopen,
    /// It is over and drained.
    Done,
}

impl Workload {
    /// A workload of `requests` requests.
    pub fn new(profile: &Profile, seed: u64, requests: u32) -> Workload {
        let rng = fastrand::Rng::with_seed(mix(seed ^ 0x3089));
        Workload { profile: profile.clone(), rng, left: requests, stream_at: 63 * SECTOR }
    }

    /// Does one thing.
    pub fn next<E: Engine>(&mut self, session: &mut Session<E>) -> Result<Next, String> {
        if self.left == 0 {
            session.drain()?;
            return Ok(Next::Done);
        }
        let room = session.model.under_way() < self.profile.depth;
        match self.rng.u8(0..20) {
            0..9 if room => {
                let batch = self.rng.u32(1..4).min(self.left);
                for _ in 0..batch {
                    self.left -= 1;
                    if let Some(next) = self.start(session)? {
                        return Ok(next);
                    }
                }
                session.kick()?;
            }
            9 => session.tick()?,
            10 if self.rng.u8(0..4) == 0 => session.drain()?,
            _ if session.st.under_way().is_empty() && !room => {
                // All requests wait for the engine's own pace.
                session.kick()?;
                session.tick()?;
            }
            _ => session.step()?,
        }
        Ok(Next::More)
    }

    fn start<E: Engine>(&mut self, session: &mut Session<E>) -> Result<Option<Next>, String> {
        let w = self.profile.weights;
        let size = session.model.size();
        let total = w.write
            + w.stream
            + w.zeroes
            + w.discard
            + w.flush
            + w.read
            + w.checkpoint
            + w.defragment
            + w.resize
            + w.reopen;
        let mut pick = self.rng.u32(0..total);
        let mut is = |weight: u32| {
            let hit = pick < weight;
            pick = pick.wrapping_sub(weight);
            hit
        };
        let request = if is(w.write) {
            let (offset, len) = self.range(size);
            Request::Write { offset, len, durable: self.rng.u32(0..100) < self.profile.durable }
        } else if is(w.stream) {
            self.stream(size)
        } else if is(w.zeroes) {
            let (offset, len) = self.range(size);
            let durable = self.rng.u32(0..100) < self.profile.durable;
            Request::WriteZeroes { offset, len, unmap: self.rng.bool(), durable }
        } else if is(w.discard) {
            let (offset, len) = self.range(size);
            Request::Discard { offset, len }
        } else if is(w.flush) {
            Request::Flush
        } else if is(w.read) {
            let (offset, len) = self.range(size);
            Request::Read { offset, len }
        } else if is(w.checkpoint) {
            Request::Checkpoint
        } else if is(w.defragment) {
            Request::Defragment { offset: 0, len: size }
        } else if is(w.resize) {
            session.drain()?;
            let most = self.profile.config.virtual_size + (128 << 10);
            let least = most / 4;
            let size = self.rng.u64(least / SECTOR..=most / SECTOR) * SECTOR;
            session.submit(Request::Resize { size })?;
            session.drain()?;
            return Ok(None);
        } else {
            session.drain()?;
            return Ok(Some(Next::Reopen));
        };
        session.submit(request)?;
        Ok(None)
    }

    /// The next write of a sequential stream on a partition that begins at sector 63.
    fn stream(&mut self, size: u64) -> Request {
        let len = SECTOR * [8, 8, 8, 16, 1, 7][self.rng.usize(0..6)];
        if self.stream_at + len > size {
            self.stream_at = (63 * SECTOR).min(size - len);
        }
        let offset = self.stream_at;
        self.stream_at += len;
        if self.rng.u8(0..16) == 0 {
            self.stream_at = 63 * SECTOR;
        }
        Request::Write { offset, len, durable: false }
    }

    fn range(&mut self, size: u64) -> (u64, u64) {
        let block = u64::from(self.profile.config.block_size);
        if self.profile.follow > 0 && self.rng.u32(0..100) < self.profile.follow {
            let offset = (self.stream_at / block).min((size - 1) / block) * block;
            return (offset, block.min(size - offset));
        }
        let (base, hot) = match self.rng.u8(0..12) {
            0 => (0, size),
            _ => (self.profile.base.min(size / 2 / SECTOR * SECTOR), self.profile.hot.min(size)),
        };
        let end = (base + hot).min(size);
        if self.rng.u32(0..100) < self.profile.aligned {
            let offset = self.rng.u64(base / block..end.div_ceil(block)) * block;
            let blocks = self.rng.u64(1..=(self.profile.max_sectors * SECTOR / block).max(1));
            let len = (blocks * block).min(size - offset);
            return (offset, len);
        }
        let offset = self.rng.u64(base / SECTOR..end / SECTOR);
        let most = match self.rng.u8(0..4) {
            0 => 1,
            1 => 9,
            2 if self.profile.name == "sectors" => 8 * self.rng.u64(1..=4),
            2 => (block / SECTOR).clamp(2, 140),
            _ => self.profile.max_sectors,
        };
        let len = self.rng.u64(1..=most).min(size / SECTOR - offset);
        (offset * SECTOR, len * SECTOR)
    }
}
