//! The virtio-blk device behind one vhost-user connection.

use crate::disk::gate::Gate;
use crate::disk::policy::Policy;
use crate::disk::{Access, Disk, Properties, Router};
use crate::event::Event;
use crate::front::cache_mode::CacheMode;
use crate::front::config_space::{ConfigSpace, WCE_OFFSET};
use crate::queue::dirty_log::DirtyLog;
use crate::queue::memory::{Bitmap, SharedMemory};
use crate::queue::request::{Rules, SERIAL_LEN};
use crate::queue::worker::{Context, QUEUE_SIZE_MAX, Vring, Worker};
use crate::stats::Monitor;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// Data segments in a request: a queue of 128 less header and status.
const SEG_MAX: u32 = 126;
/// Largest range of a discard or write-zeroes: 2 GiB.
const MAX_RANGE_SECTORS: u32 = 4 << 20;
/// Most ranges in a discard or write-zeroes.
const MAX_RANGES: u32 = 64;

/// Most memory regions, which is what the library answers to GET_MAX_MEM_SLOTS and does not enforce.
const MEMORY_REGIONS_MAX: usize = 509;

/// How a disk is shown to its guest.
#[derive(Clone, Debug)]
pub struct Presentation {
    /// Queues offered.
    pub queues: u16,
    /// Worker threads, at most one per queue.
    pub workers: u16,
    /// The guest sees a volatile cache unless it chooses otherwise.
    pub writeback: bool,
    /// The guest is to come by migration.
    pub incoming: bool,
    /// Smallest unit of requests in bytes; the disk's, if that is more.
    pub logical_block: u32,
    /// Serial number.
    pub serial: String,
    /// Counts what happens; says by which socket.
    pub monitor: Arc<Monitor>,
    /// What the operator asks for beyond the disk.
    pub policy: Arc<Policy>,
    /// Requests in flight survive us, if the front-end keeps track of them.
    pub inflight: bool,
    /// How long a queue's thread looks for more before it sleeps.
    pub poll: Duration,
    /// The guest's socket, where this is the one for reading.
    pub beside: Option<Arc<Monitor>>,
}

/// The device. One per connection.
pub struct Device {
    config: ConfigSpace,
    presentation: Presentation,
    read_only: bool,
    context: Arc<Context>,
    workers: Vec<Arc<Worker>>,
    cache: Arc<CacheMode>,
    acked: AtomicU64,
    /// The library's ends of the exit events, which it never closes.
    exit_events: Mutex<Vec<OwnedFd>>,
}

impl Device {
    /// A device on the disk.
    pub fn new(
        disk: &dyn Disk,
        presentation: Presentation,
        router: Arc<Router>,
        memory: SharedMemory,
    ) -> io::Result<Device> {
        let mut properties = disk.properties().with_logical_block(presentation.logical_block);
        properties.read_only |= presentation.monitor.access() == Access::ReadOnly;
        let Presentation { writeback, incoming, ref monitor, .. } = presentation;
        let cache = CacheMode::new(disk.file().clone(), monitor.clone(), writeback, incoming);
        let context = Arc::new(Context {
            rules: rules(disk.gate(), &properties, &presentation),
            writeback: cache.volatile().clone(),
            memory,
            router,
            monitor: presentation.monitor.clone(),
            poll: presentation.poll,
            inflight: Arc::default(),
            errors: Arc::default(),
        });
        let workers = (0..presentation.workers)
            .map(|number| {
                let event = Arc::new(Event::new()?);
                let port = presentation.policy.apply(disk.port(event.clone())?, &event);
                let Presentation { workers, queues, .. } = presentation;
                let context = context.clone();
                Ok(Arc::new(Worker::new(context, port, event, number, workers, queues)))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Device {
            config: config(&properties, &presentation),
            read_only: properties.read_only,
            context,
            workers,
            cache: Arc::new(cache),
            acked: AtomicU64::new(0),
            exit_events: Mutex::new(Vec::new()),
            presentation,
        })
    }

    /// The workers.
    pub fn workers(&self) -> &[Arc<Worker>] {
        &self.workers
    }

    /// The number by which a worker knows its own event, besides the numbers of its queues.
    pub fn event_number(&self) -> u64 {
        u64::from(self.presentation.queues) + 1
    }

    /// Queues offered.
    pub fn queues(&self) -> u16 {
        self.presentation.queues
    }

    /// What the guest believes of its cache.
    pub fn cache(&self) -> &Arc<CacheMode> {
        &self.cache
    }

    /// What the workers share.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.context.rules.gate.capacity()
    }

    /// Where the pages are marked that are written.
    pub fn log(&self) -> &Arc<DirtyLog> {
        &self.context.rules.log
    }

    /// Takes no more requests and waits for those under way.
    pub fn drain(&self) {
        for worker in &self.workers {
            worker.drain();
        }
    }

    /// The front-end has shared no memory.
    pub fn has_no_memory(&self) -> bool {
        self.context.memory.memory().num_regions() == 0
    }

    /// The driver got as far as accepting features.
    pub fn was_negotiated(&self) -> bool {
        self.acked.load(Ordering::Acquire) != 0
    }

    fn drain_queue(&self, queue: usize) {
        let count = self.workers.len();
        if let Some(worker) = self.workers.get(queue % count) {
            worker.drain_queue(queue / count);
        }
    }
}

/// A region must lie within its file: whoever touches what is mapped beyond the end dies of SIGBUS. (A
/// front-end that shortens the file afterwards still kills the daemon; QEMU seals its files against that.)
fn check_extent(region: &GuestRegionMmap<Bitmap>) -> io::Result<()> {
    let Some(offset) = region.file_offset() else { return Ok(()) };
    let metadata = offset.file().metadata()?;
    let end = offset.start().checked_add(region.len());
    if metadata.is_file() && end.is_none_or(|end| end > metadata.len()) {
        return Err(io::Error::other("a memory region is longer than its file"));
    }
    Ok(())
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

fn rules(gate: Arc<Gate>, properties: &Properties, presentation: &Presentation) -> Rules {
    let mut serial = [0; SERIAL_LEN];
    for (target, byte) in serial.iter_mut().zip(presentation.serial.bytes()) {
        *target = byte;
    }
    Rules {
        log: Arc::default(),
        gate,
        read_only: properties.read_only,
        block_size: properties.logical_block,
        max_range_sectors: MAX_RANGE_SECTORS,
        max_ranges: MAX_RANGES as usize,
        serial,
    }
}

fn config(properties: &Properties, presentation: &Presentation) -> ConfigSpace {
    let per_physical = (properties.physical_block / properties.logical_block).max(1);
    ConfigSpace {
        capacity: properties.capacity / 512,
        seg_max: SEG_MAX,
        block_size: properties.logical_block,
        physical_block_exp: per_physical.ilog2() as u8,
        num_queues: presentation.queues,
        max_discard_sectors: MAX_RANGE_SECTORS,
        max_discard_seg: MAX_RANGES,
        discard_alignment: (properties.discard_granularity / 512).max(1),
        max_write_zeroes_sectors: MAX_RANGE_SECTORS,
        max_write_zeroes_seg: MAX_RANGES,
    }
}

impl VhostUserBackend for Device {
    type Bitmap = Bitmap;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.presentation.queues.into()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        let common = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ];
        let access: &[u32] = if self.read_only {
            &[VIRTIO_BLK_F_RO]
        } else {
            &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        };
        let features = common.iter().chain(access).fold(0, |all, feature| all | bit(*feature));
        features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.acked.store(features, Ordering::Release);
        self.cache.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        // The library has disabled the rings but calls no `stop_vring`.
        for worker in &self.workers {
            worker.drain_queues();
        }
        self.acked.store(0, Ordering::Release);
        self.cache.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = self.context.rules.gate.capacity();
        // Whole blocks, as the driver counts.
        let capacity = (bytes - bytes % u64::from(self.config.block_size)) / 512;
        let config = ConfigSpace { capacity, ..self.config.clone() };
        let asks =
            offset <= WCE_OFFSET && u64::from(WCE_OFFSET) < u64::from(offset) + u64::from(size);
        config.read(offset, size, asks && self.cache.ask())
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match (offset, bytes) {
            (WCE_OFFSET, [value]) => {
                self.cache.set(*value != 0);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn update_memory(&self, memory: SharedMemory) -> io::Result<()> {
        let memory = memory.memory();
        let regions = memory.num_regions();
        log::debug!("the front-end shares {regions} memory regions");
        if regions > MEMORY_REGIONS_MAX {
            return Err(io::Error::other(format!("{regions} memory regions are too many")));
        }
        memory.iter().try_for_each(check_extent)
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let Presentation { workers, queues, .. } = self.presentation;
        (0..workers)
            .map(|worker| {
                (worker..queues).step_by(workers.into()).fold(0, |mask, queue| mask | 1 << queue)
            })
            .collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without an event the library would wait for its threads for ever.
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
                .inspect_err(|error| log::error!("no exit event: {error}"))
                .ok()?;
        let mut events = self.exit_events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(crate::front::socket::adopt(consumer.as_raw_fd()));
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.drain_queue(queue as usize);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        // An error would end the thread: what goes wrong is logged and told to the guest instead.
        if let Some(worker) = self.workers.get(thread) {
            worker.handle_event(event.into(), vrings);
        }
        Ok(())
    }
}
