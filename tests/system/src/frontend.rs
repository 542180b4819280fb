//! A front-end with a ring of its own making: every message and every descriptor is the test's choice.

use crate::daemon::PATIENCE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory, at guest address 0.
pub const MEMORY: u64 = 16 << 20;
/// Where a queue's rings lie: each queue has 64 KiB.
pub const RINGS: u64 = 0x10000;
/// Where the available ring lies behind a queue's descriptors.
pub const AVAIL: u64 = 0x8000;
/// Where the used ring lies.
pub const USED: u64 = 0xc000;
/// From here on memory is the tests'.
pub const FREE: u64 = 0x40000;
/// Where the data of plain requests lies.
pub const DATA: u64 = FREE + 0x2000;
/// Where the front-end's own address space is said to hold guest memory.
pub const USER: u64 = 0x7000_0000_0000;

/// virtio features the tests need: FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES, INDIRECT_DESC, VERSION_1, and
/// vhost-user's PROTOCOL_FEATURES.
pub const FEATURES: u64 = 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14 | 1 << 28 | 1 << 30 | 1 << 32;

/// A descriptor flag.
pub const NEXT: u16 = 1;
/// A descriptor flag.
pub const WRITE: u16 = 2;
/// A descriptor flag.
pub const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

/// A descriptor, in short.
pub fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// A connection with one or more rings.
pub struct Machine {
    /// Messages.
    pub control: Frontend,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// The rings.
    pub rings: Vec<Ring>,
    /// What the daemon needs to know of requests in flight, if that is kept.
    pub inflight: Option<(VhostUserInflight, File)>,
}

/// A split ring.
pub struct Ring {
    size: u16,
    /// The daemon waits for it.
    pub kick: EventFd,
    /// The daemon signals it.
    pub call: EventFd,
    error: EventFd,
    /// Free-running, as in the ring.
    pub avail: u16,
    seen: u16,
}

impl Machine {
    /// Connects and says nothing.
    pub fn connect(socket: &Path) -> Machine {
        let control = Frontend::connect(socket, 64).expect("connected");
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(MEMORY).expect("grow");
        let range = (GuestAddress(0), MEMORY as usize, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("mapped");
        Machine { control, memory, rings: Vec::new(), inflight: None }
    }

    /// Connects, agrees on features and asks for the configuration; no memory, no rings.
    pub fn negotiate(socket: &Path) -> Machine {
        let mut machine = Machine::connect(socket);
        machine.introduce(VhostUserProtocolFeatures::empty());
        machine.writeback();
        machine
    }

    /// Agrees on features: those that all tests need and these.
    fn introduce(&mut self, more: VhostUserProtocolFeatures) {
        let control = &mut self.control;
        control.set_owner().expect("SET_OWNER");
        let offered = control.get_features().expect("GET_FEATURES");
        assert_eq!(offered & FEATURES, FEATURES, "{offered:x}");
        let protocol = control.get_protocol_features().expect("GET_PROTOCOL_FEATURES");
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | more;
        assert!(protocol.contains(wanted), "{protocol:?}");
        control.set_protocol_features(wanted).expect("SET_PROTOCOL_FEATURES");
        control.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        control.set_features(FEATURES).expect("SET_FEATURES");
    }

    /// Connects, shares memory, gets a region for requests in flight, and makes so many rings of this size,
    /// which do not run yet. The region has room for twice that size, as with a driver that chooses a
    /// smaller ring than it is offered.
    pub fn tracked(socket: &Path, rings: usize, size: u16) -> Machine {
        let mut machine = Machine::connect(socket);
        machine.introduce(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        machine.writeback();
        machine.share_memory();
        machine.renew_inflight(rings, 2 * size);
        for _ in 0..rings {
            machine.add_ring(size);
        }
        machine
    }

    /// The same, or without a region for requests in flight.
    pub fn tracked_if(tracked: bool, socket: &Path, rings: usize, size: u16) -> Machine {
        if tracked {
            return Machine::tracked(socket, rings, size);
        }
        let mut machine = Machine::negotiate(socket);
        machine.share_memory();
        for _ in 0..rings {
            machine.add_ring(size);
        }
        machine
    }

    /// Gets another region and gives it to the daemon, as after a reset or migration.
    pub fn renew_inflight(&mut self, rings: usize, entries: u16) {
        let wanted = VhostUserInflight::new(0, 0, rings as u16, entries);
        let region = self.control.get_inflight_fd(&wanted).expect("GET_INFLIGHT_FD");
        self.inflight = Some(region);
        self.return_inflight();
    }

    fn return_inflight(&mut self) {
        if let Some((region, file)) = &self.inflight {
            let fd = file.as_raw_fd();
            self.control.set_inflight_fd(region, fd).expect("SET_INFLIGHT_FD");
        }
    }

    /// Connects to another daemon with the same memory and rings, as QEMU does: the rings start where their
    /// used index is, and the configuration is not asked for again.
    pub fn reconnect(&mut self, socket: &Path) {
        self.control = Frontend::connect(socket, 64).expect("connected");
        self.introduce(match self.inflight {
            Some(_) => VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            None => VhostUserProtocolFeatures::empty(),
        });
        self.share_memory();
        self.return_inflight();
        for ring in 0..self.rings.len() {
            let base = self.used(ring);
            self.start_ring(ring, base);
        }
    }

    /// Connects, shares memory and starts so many rings of this size.
    pub fn start(socket: &Path, rings: usize, size: u16) -> Machine {
        let mut machine = Machine::negotiate(socket);
        machine.share_memory();
        for index in 0..rings {
            machine.add_ring(size);
            machine.start_ring(index, 0);
        }
        machine
    }

    /// Resets the device as a driver does that starts anew, and starts its rings from the beginning.
    pub fn restart_after_reset(&mut self) {
        for ring in 0..self.rings.len() {
            self.stop_ring(ring);
        }
        self.control.reset_device().expect("RESET_DEVICE");
        self.control.set_features(FEATURES).expect("SET_FEATURES");
        for ring in 0..self.rings.len() {
            self.set_indices(ring, 0);
            self.start_ring(ring, 0);
        }
    }

    /// The guest in another machine, served by another daemon, with its rings going on at these indices.
    pub fn moved(&self, socket: &Path, bases: &[u16]) -> Machine {
        let mut there = Machine::negotiate(socket);
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).expect("in memory");
        there.memory.write_slice(&bytes, GuestAddress(0)).expect("in memory");
        there.share_memory();
        for (index, (ring, base)) in self.rings.iter().zip(bases).enumerate() {
            there.add_ring(ring.size);
            (there.rings[index].avail, there.rings[index].seen) = (ring.avail, ring.seen);
            there.start_ring(index, *base);
        }
        there
    }

    /// The file that guest memory lies in.
    pub fn file(&self) -> &File {
        let region = self.memory.iter().next().expect("one region");
        region.file_offset().expect("of a file").file()
    }

    /// Shares all of the memory.
    pub fn share_memory(&self) {
        self.control.set_mem_table(&[self.region()]).expect("SET_MEM_TABLE");
    }

    /// Shares more memory, at this guest address, while the rings run.
    pub fn plug_memory(&self, file: &File, guest_phys_addr: u64, memory_size: u64) {
        let more = VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size,
            userspace_addr: USER + guest_phys_addr,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        self.control.set_mem_table(&[self.region(), more]).expect("SET_MEM_TABLE");
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file().as_raw_fd(),
        }
    }

    /// Makes a ring that the daemon does not know yet.
    pub fn add_ring(&mut self, size: u16) {
        let event = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
        self.rings.push(Ring {
            size,
            kick: event(),
            call: event(),
            error: event(),
            avail: 0,
            seen: 0,
        });
    }

    /// Starts a ring at this available index. The message that fails is named.
    pub fn try_start_ring(&mut self, index: usize, base: u16) -> Result<(), &'static str> {
        let ring = &self.rings[index];
        let at = USER + RINGS * index as u64;
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + USED,
            avail_ring_addr: at + AVAIL,
            log_addr: None,
        };
        self.control.set_vring_num(index, ring.size).map_err(|_| "SET_VRING_NUM")?;
        self.control.set_vring_base(index, base).map_err(|_| "SET_VRING_BASE")?;
        self.control.set_vring_addr(index, &config).map_err(|_| "SET_VRING_ADDR")?;
        self.control.set_vring_call(index, &ring.call).map_err(|_| "SET_VRING_CALL")?;
        self.control.set_vring_err(index, &ring.error).map_err(|_| "SET_VRING_ERR")?;
        self.control.set_vring_kick(index, &ring.kick).map_err(|_| "SET_VRING_KICK")?;
        self.control.set_vring_enable(index, true).map_err(|_| "SET_VRING_ENABLE")
    }

    /// Starts a ring, which must work.
    pub fn start_ring(&mut self, index: usize, base: u16) {
        self.try_start_ring(index, base).expect("accepted");
    }

    /// Makes a ring although there is no memory; the message that fails is named.
    pub fn start_without_memory(&mut self) -> Result<(), &'static str> {
        self.add_ring(16);
        self.try_start_ring(0, 0)
    }

    /// Stops a ring: the available index the daemon goes on from.
    pub fn stop_ring(&mut self, index: usize) -> u16 {
        self.control.get_vring_base(index).expect("GET_VRING_BASE") as u16
    }

    /// Writes a descriptor into the table of a ring.
    pub fn describe(&self, ring: usize, slot: u16, desc: Desc) {
        self.put_desc(RINGS * ring as u64 + u64::from(slot) * 16, desc);
    }

    /// Writes a descriptor anywhere.
    pub fn put_desc(&self, at: u64, desc: Desc) {
        self.memory.write_obj(desc.addr, GuestAddress(at)).expect("in memory");
        self.memory.write_obj(desc.len, GuestAddress(at + 8)).expect("in memory");
        self.memory.write_obj(desc.flags, GuestAddress(at + 12)).expect("in memory");
        self.memory.write_obj(desc.next, GuestAddress(at + 14)).expect("in memory");
    }

    /// Writes a request header.
    pub fn put_header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(at)).expect("in memory");
        self.memory.write_obj(0u32, GuestAddress(at + 4)).expect("in memory");
        self.memory.write_obj(sector, GuestAddress(at + 8)).expect("in memory");
    }

    /// Makes a head available, without a kick.
    pub fn offer(&mut self, ring: usize, head: u16) {
        let Ring { size, avail, .. } = self.rings[ring];
        let at = RINGS * ring as u64 + AVAIL;
        let slot = at + 4 + u64::from(avail % size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).expect("in memory");
        self.set_avail(ring, avail.wrapping_add(1));
    }

    /// Makes a ring look as if it had run before: its indices are these, and nothing is outstanding.
    pub fn set_indices(&mut self, ring: usize, index: u16) {
        self.set_avail(ring, index);
        self.set_used(ring, index);
        self.rings[ring].seen = index;
    }

    /// Sets the used index.
    pub fn set_used(&self, ring: usize, index: u16) {
        let at = GuestAddress(RINGS * ring as u64 + USED + 2);
        self.memory.store(index, at, Ordering::Release).expect("in memory");
    }

    /// Writes entry `index` of the used ring.
    pub fn put_used(&self, ring: usize, index: u16, head: u16) {
        let slot = u64::from(index % self.rings[ring].size);
        let at = RINGS * ring as u64 + USED + 4 + slot * 8;
        self.memory.write_obj(u32::from(head), GuestAddress(at)).expect("in memory");
        self.memory.write_obj(1u32, GuestAddress(at + 4)).expect("in memory");
    }

    /// Sets the available index.
    pub fn set_avail(&mut self, ring: usize, index: u16) {
        self.rings[ring].avail = index;
        let at = GuestAddress(RINGS * ring as u64 + AVAIL + 2);
        self.memory.store(index, at, Ordering::Release).expect("in memory");
    }

    /// Waits until the daemon says that a ring cannot go on.
    pub fn wait_error(&self, ring: usize) {
        let error = &self.rings[ring].error;
        let mut fds = [PollFd::new(borrow(error), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).expect("in range");
        assert!(poll(&mut fds, timeout).expect("poll") > 0, "the daemon says so");
        error.read().expect("it was signalled");
    }

    /// Kicks a ring.
    pub fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).expect("kicked");
    }

    /// The used index.
    pub fn used(&self, ring: usize) -> u16 {
        let at = GuestAddress(RINGS * ring as u64 + USED + 2);
        self.memory.load(at, Ordering::Acquire).expect("in memory")
    }

    /// Used entries (head, length) not seen before; those that are there now.
    pub fn take_used(&mut self, ring: usize) -> Vec<(u32, u32)> {
        let end = self.used(ring);
        let mut entries = Vec::new();
        while self.rings[ring].seen != end {
            let slot = u64::from(self.rings[ring].seen % self.rings[ring].size);
            let at = RINGS * ring as u64 + USED + 4 + slot * 8;
            let head = self.memory.read_obj(GuestAddress(at)).expect("in memory");
            let len = self.memory.read_obj(GuestAddress(at + 4)).expect("in memory");
            entries.push((head, len));
            self.rings[ring].seen = self.rings[ring].seen.wrapping_add(1);
        }
        entries
    }

    /// Gives the daemon another descriptor to signal.
    pub fn replace_call(&mut self, ring: usize) {
        self.rings[ring].call = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        self.control.set_vring_call(ring, &self.rings[ring].call).expect("SET_VRING_CALL");
    }

    /// Waits until a ring is signalled, or for so long. True if it was.
    pub fn wait_call(&self, ring: usize, patience: Duration) -> bool {
        let call = &self.rings[ring].call;
        let mut fds = [PollFd::new(borrow(call), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).expect("in range");
        let called = poll(&mut fds, timeout).expect("poll") > 0;
        // Nothing to read if it was not.
        let _ = call.read();
        called
    }

    /// Waits for so many used entries.
    pub fn wait_used(&mut self, ring: usize, count: usize) -> Vec<(u32, u32)> {
        let mut entries = self.take_used(ring);
        while entries.len() < count {
            let call = &self.rings[ring].call;
            // The descriptor is open for as long as the ring exists.
            let fd = borrow(call);
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(PATIENCE).expect("in range");
            assert!(poll(&mut fds, timeout).expect("poll") > 0, "the daemon answers: {entries:?}");
            // Nothing to read if it was for an entry seen already.
            let _ = call.read();
            entries.extend(self.take_used(ring));
        }
        entries
    }

    /// Runs one request of header, data and status on a ring that is idle: its status byte.
    pub fn request(&mut self, ring: usize, kind: u32, sector: u64, data: Option<Desc>) -> u8 {
        let at = FREE;
        self.put_header(at, kind, sector);
        self.memory.write_obj(0xffu8, GuestAddress(at + 16)).expect("in memory");
        self.describe(ring, 0, desc(at, 16, NEXT, 1));
        if let Some(data) = data {
            self.describe(ring, 1, Desc { flags: data.flags | NEXT, next: 2, ..data });
        }
        let status = desc(at + 16, 1, WRITE, 0);
        self.describe(ring, if data.is_some() { 2 } else { 1 }, status);
        self.offer(ring, 0);
        self.kick(ring);
        let used = self.wait_used(ring, 1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, 0);
        self.memory.read_obj(GuestAddress(at + 16)).expect("in memory")
    }

    /// The `writeback` byte of the configuration space.
    pub fn writeback(&mut self) -> u8 {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.control.get_config(32, 1, flags, &[0]).expect("GET_CONFIG");
        bytes[0]
    }

    /// Sets it.
    pub fn set_writeback(&mut self, value: u8) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.control.set_config(32, flags, &[value]).expect("SET_CONFIG");
    }
}

/// The descriptor of something that owns one.
#[allow(unsafe_code)]
pub fn borrow(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `owner`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// The daemon serves this ring as if nothing had been: what is written is read.
pub fn assert_unharmed(machine: &mut Machine, ring: usize) {
    const IN: u32 = 0;
    const OUT: u32 = 1;
    machine.memory.write_slice(&[0x5a; 512], GuestAddress(DATA)).expect("write");
    assert_eq!(machine.request(ring, OUT, 7, Some(desc(DATA, 512, 0, 0))), 0);
    machine.memory.write_slice(&[0; 512], GuestAddress(DATA)).expect("write");
    assert_eq!(machine.request(ring, IN, 7, Some(desc(DATA, 512, WRITE, 0))), 0);
    let byte: u8 = machine.memory.read_obj(GuestAddress(DATA + 511)).expect("read");
    assert_eq!(byte, 0x5a);
}
