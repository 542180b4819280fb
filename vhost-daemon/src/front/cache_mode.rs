//! Whether the guest believes in a volatile cache, which it flushes, and what it gets: never less than it
//! believes.
//!
//! The driver reads `writeback` of the configuration space once, when it starts, and may write it (virtio
//! 1.2, 5.2.5). What it reads is the front-end's copy: QEMU asks for it when the device is made and never
//! by itself again. It keeps what a driver has written through resets and reconnects, and does not tell the
//! back-end of it. A driver that reads 0 sends no flushes. So a write may complete before it is durable only
//! if all of this is known:
//!
//! - The front-end's copy says 1: it has asked us or told us on this connection, or before that, as a
//!   process before us has noted in the inflight region, which the front-end brings back.
//! - A driver that has read its belief elsewhere (a migration, a restored machine) believes the same, as
//!   the process that has served it tells (`exd_file::caching`), or has been reset since.

use crate::disk::Access;
use crate::front::message::{Message, request};
use crate::front::relay::{Part, Refusal, Verdict};
use crate::queue::inflight::{Inflight, Region};
use crate::stats::Monitor;
use exd_file::{HostFile, caching};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// The cache of one connection's guest. Shared by the device and the relay.
pub struct CacheMode {
    /// What the operator wants: a volatile cache.
    configured: bool,
    /// The guest may come from another daemon.
    incoming: bool,
    file: Arc<HostFile>,
    monitor: Arc<Monitor>,
    volatile: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// virtio features that the driver has accepted.
    features: u64,
    /// The front-end's copy of `writeback`, or less; `None`: unknown.
    copy: Option<bool>,
    /// The driver may have read another value than that.
    elsewhere: bool,
    /// A ring that has not run on this connection was to go on, not to begin.
    goes_on: bool,
    /// The inflight region says what an earlier connection knew.
    inherited: bool,
    /// A ring has run on this connection.
    ran: bool,
    region: Option<Arc<Region>>,
    /// What other processes were told.
    told: Option<bool>,
    warned: bool,
}

impl State {
    /// What the front-end and its driver are sure to believe in: a volatile cache.
    fn believed(&self) -> bool {
        self.copy == Some(true) && !self.elsewhere
    }

    /// The driver has read `writeback`. (One that cannot has to believe in a cache if it may flush.)
    fn reads(&self) -> bool {
        self.features & CONFIG_WCE != 0
    }
}

impl CacheMode {
    /// For a connection to the disk of this file.
    pub fn new(
        file: Arc<HostFile>,
        monitor: Arc<Monitor>,
        configured: bool,
        incoming: bool,
    ) -> CacheMode {
        let (volatile, state) = (Arc::default(), Mutex::default());
        CacheMode { configured, incoming, file, monitor, volatile, state }
    }

    /// Writes may complete before they are durable.
    pub fn volatile(&self) -> &Arc<AtomicBool> {
        &self.volatile
    }

    /// The driver has accepted these virtio features, or lost them in a reset.
    pub fn set_features(&self, features: u64) {
        self.change(|state| state.features = features);
    }

    /// The front-end asks: the value of `writeback`. A front-end that asks before rings run does so by
    /// itself and keeps the answer. Later it may be our own notice of a new size that makes it ask, and some
    /// versions of QEMU then keep the size alone.
    pub fn ask(&self) -> bool {
        self.change(|state| {
            if state.copy.is_none() && !state.ran {
                state.copy = Some(self.configured);
            }
            state.copy.unwrap_or(false)
        })
    }

    /// The driver sets `writeback`, and the front-end its copy.
    pub fn set(&self, writeback: bool) {
        self.change(|state| (state.copy, state.elsewhere) = (Some(writeback), false));
    }

    /// The device is reset: the next driver reads the front-end's copy, which stays what it is. Where a
    /// driver has asked for less durability than is configured, the next one gets what is configured.
    pub fn reset(&self) {
        self.change(|state| {
            state.features = 0;
            state.copy = state.copy.map(|copy| copy && self.configured);
            if state.ran {
                state.elsewhere = false;
            }
        });
    }

    /// The front-end has chosen this region for the rings that start from now on.
    pub fn keep_in(&self, region: Arc<Region>) {
        if self.state().region.as_ref().is_some_and(|known| Arc::ptr_eq(known, &region)) {
            return;
        }
        self.change(|state| {
            if let (Some(noted), false) = (region.volatile_cache(), state.ran) {
                state.copy = Some(noted && state.copy.unwrap_or(true));
                state.inherited = true;
            }
            state.region = Some(region);
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let result = change(&mut state);
        self.apply(&mut state);
        result
    }

    fn apply(&self, state: &mut State) {
        let chosen = if state.reads() { state.believed() } else { self.configured };
        let volatile = chosen && state.features & FLUSH != 0;
        self.volatile.store(volatile, Ordering::Release);
        self.monitor.set_volatile_cache(volatile);
        if let (Some(region), false) = (&state.region, state.believed()) {
            region.set_volatile_cache(false);
        }
        if state.ran && state.told != Some(volatile) {
            self.tell(state, Some(volatile));
        }
    }

    /// Tells the process that may serve the guest after us.
    fn tell(&self, state: &mut State, volatile: Option<bool>) {
        if self.monitor.access() == Access::ReadOnly {
            return;
        }
        state.told = volatile;
        if let Err(error) = caching::tell(&self.file, volatile) {
            // It will assume the worst.
            log::debug!("other processes cannot be told of the guest's cache: {error}");
        }
    }

    /// The first ring of this connection is about to run.
    fn begin(&self) {
        self.change(|state| {
            if std::mem::replace(&mut state.ran, true) {
                return;
            }
            let first = self.incoming && self.monitor.connections() <= 1;
            let came = (first || state.goes_on) && !state.inherited;
            state.elsewhere = came && !matches!(caching::told(&self.file), Ok(Some(true)));
        });
    }

    /// The front-end has the answer to its last message: now it is sure to know what it was told.
    fn settle(&self) {
        let mut state = self.state();
        if let (Some(region), true, true) = (&state.region, state.ran, state.believed()) {
            region.set_volatile_cache(true);
        }
        let unknown = state.copy.is_none() || state.elsewhere;
        let matters =
            state.ran && self.configured && state.reads() && self.monitor.access() == Access::Main;
        if unknown && matters && !std::mem::replace(&mut state.warned, true) {
            log::warn!(
                "each write is made durable before it completes: the guest may rely on that, since it is \
                 unknown what was said of the cache before this connection; 'echo write back' to \
                 cache_type in the guest, or a new start of QEMU, ends this"
            );
        }
    }

    fn end(&self) {
        let mut state = self.state();
        if state.told.is_some() {
            self.tell(&mut state, None);
        }
    }
}

/// The relay's part of it.
pub struct CacheModePart {
    cache: Arc<CacheMode>,
    inflight: Arc<Inflight>,
}

impl CacheModePart {
    /// With what the front-end chooses for requests in flight.
    pub fn new(cache: Arc<CacheMode>, inflight: Arc<Inflight>) -> CacheModePart {
        CacheModePart { cache, inflight }
    }
}

impl Part for CacheModePart {
    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        if message.request == request::SET_VRING_BASE && message.u32_at(4) != Some(0) {
            self.cache.change(|state| state.goes_on |= !state.ran);
        }
        Ok(Verdict::Forward)
    }

    fn first_ring_starts(&mut self) -> Result<(), Refusal> {
        self.cache.begin();
        Ok(())
    }

    fn answered(&mut self) {
        if let Some(region) = self.inflight.region() {
            self.cache.keep_in(region);
        }
        self.cache.settle();
    }
}

impl Drop for CacheModePart {
    fn drop(&mut self) {
        self.cache.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::inflight::Layout;
    use exd_file::OpenMode;
    use std::path::Path;

    const ALL: u64 = FLUSH | CONFIG_WCE;

    fn connect(path: &Path, configured: bool, incoming: bool) -> CacheMode {
        let mode = OpenMode { write: true, direct: false };
        let file = Arc::new(HostFile::open(path, mode).expect("open"));
        let monitor = Arc::new(Monitor::new("d", Access::Main, 1, Arc::default()));
        CacheMode::new(file, monitor, configured, incoming)
    }

    /// A connection to a disk that nobody else has.
    fn of_new_connection() -> CacheMode {
        connect(tempfile::NamedTempFile::new().expect("temporary file").path(), true, false)
    }

    fn region() -> (Region, std::os::fd::OwnedFd) {
        Region::create(Layout { queues: 1, entries: 16 }).expect("memory")
    }

    /// The first ring starts, at this index.
    fn run(cache: &CacheMode, features: u64, index: u32) -> bool {
        cache.set_features(features);
        cache.change(|state| state.goes_on |= index != 0 && !state.ran);
        cache.begin();
        cache.settle();
        cache.volatile().load(Ordering::Acquire)
    }

    fn is_volatile(cache: &CacheMode) -> bool {
        cache.settle();
        cache.volatile().load(Ordering::Acquire)
    }

    #[test]
    fn a_front_end_that_asks_first_knows() {
        for configured in [true, false] {
            let disk = tempfile::NamedTempFile::new().expect("temporary file");
            let new = || connect(disk.path(), configured, false);
            let cache = new();
            assert_eq!(cache.ask(), configured);
            assert_eq!(run(&cache, ALL, 0), configured);
            // A driver that cannot ask assumes a cache if it may flush.
            assert_eq!(run(&new(), FLUSH, 0), configured);
            assert!(!run(&new(), CONFIG_WCE, 0), "it cannot flush");
        }
    }

    /// The front-end keeps what the driver has set, also where it does not say so.
    #[test]
    fn a_reset_leaves_the_front_end_s_copy() {
        let cache = of_new_connection();
        cache.ask();
        assert!(run(&cache, ALL, 0));
        cache.set(false);
        cache.reset();
        assert!(!run(&cache, ALL, 0) && !cache.ask());
        cache.set(true);
        cache.reset();
        assert!(run(&cache, ALL, 0) && cache.ask());
        let strict = connect(strict_disk().path(), false, false);
        strict.ask();
        strict.set(true);
        assert!(run(&strict, ALL, 0));
        strict.reset();
        assert!(!run(&strict, ALL, 0), "as configured again");
    }

    fn strict_disk() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().expect("temporary file")
    }

    /// A front-end that has not asked may have any copy; being asked later, because we made it, does not
    /// help.
    #[test]
    fn the_unknown_is_durable() {
        let cache = of_new_connection();
        assert!(!run(&cache, ALL, 7));
        assert!(!cache.ask() && !is_volatile(&cache));
        cache.reset();
        assert!(!run(&cache, ALL, 0));
        cache.set(true);
        assert!(is_volatile(&cache));
    }

    /// What one process knew, the next one learns from the region; never sooner than the front-end.
    #[test]
    fn the_region_remembers() {
        let (ours, theirs) = region();
        let again = || {
            let layout = Layout { queues: 1, entries: 16 };
            let fd = theirs.try_clone().expect("dup");
            let region = Arc::new(Region::map(fd, 0, layout).expect("mapped"));
            let cache = of_new_connection();
            cache.keep_in(region);
            cache
        };
        assert!(!run(&again(), ALL, 0), "a daemon of before has noted nothing");
        ours.set_volatile_cache(true);
        assert!(run(&again(), ALL, 7));
        let cache = again();
        assert!(run(&cache, ALL, 7));
        cache.set(false);
        assert_eq!(ours.volatile_cache(), Some(false), "at once");
        assert!(!run(&again(), ALL, 7));
        let cache = again();
        run(&cache, ALL, 7);
        cache.set(true);
        assert_eq!(ours.volatile_cache(), Some(false), "the front-end has no answer yet");
        cache.settle();
        assert_eq!(ours.volatile_cache(), Some(true));
        let cache = again();
        assert!(cache.ask() && run(&cache, ALL, 7), "both say so");
        ours.set_volatile_cache(false);
        let cache = again();
        assert!(!cache.ask() && !run(&cache, ALL, 7));
    }

    /// A guest from elsewhere believes what it was told there.
    #[test]
    fn a_guest_that_moves_in_is_doubted() {
        let disk = tempfile::NamedTempFile::new().expect("temporary file");
        let path = disk.path();
        let arrive = |incoming, index| {
            let cache = connect(path, true, incoming);
            assert!(cache.ask());
            (run(&cache, ALL, index), cache)
        };
        assert!(arrive(false, 0).0, "it boots");
        for (incoming, index) in [(true, 0), (false, 7)] {
            let (volatile, cache) = arrive(incoming, index);
            assert!(!volatile, "nobody knows");
            cache.reset();
            assert!(run(&cache, ALL, 0), "the next driver reads what we have said");
            let (volatile, source) = arrive(false, 0);
            assert!(volatile);
            drop(cache);
            assert!(arrive(incoming, index).0, "the source says so");
            source.set(false);
            assert!(!arrive(incoming, index).0, "and no more");
            source.set(true);
            assert!(arrive(incoming, index).0);
            source.end();
            assert!(!arrive(incoming, index).0, "it is gone");
        }
    }
}
