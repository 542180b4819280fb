//! Serves one front-end after another until it is told to end.

use crate::disk::{Access, Disk, Router};
use crate::event::Event;
use crate::front::cache_mode::CacheModePart;
use crate::front::device::{Device, Presentation};
use crate::front::handover::{self, HandoverPart, ReaderPart};
use crate::front::logging::LogPart;
use crate::front::notify::{Notifier, NotifyPart};
use crate::front::private::PrivateListener;
use crate::front::relay::{Part, Refusal, Relay};
use crate::front::socket::Socket;
use crate::front::tracking::{ErrorsPart, TrackingPart};
use crate::queue::memory::{Memory, SharedMemory};
use crate::scope;
use crate::signals::Shutdown;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::net::Shutdown as Direction;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use vhost::vhost_user::Error as ProtocolError;
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vmm_sys_util::epoll::EventSet;

/// How long a front-end may leave its answers lying.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A disk on a socket.
pub struct Server<'a> {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// How it is shown.
    pub presentation: Presentation,
    /// Finds the workers of the current connection.
    pub router: Arc<Router>,
    /// Where front-ends connect.
    pub socket: &'a Socket,
    /// Where the back-end library takes its end of the connection.
    pub private: &'a PrivateListener,
    /// Tells the front-end of a new size.
    pub notifier: Notifier,
    /// The wish to end.
    pub shutdown: Arc<Shutdown>,
    /// Signalled with that wish.
    pub wake: Arc<Event>,
}

impl Server<'_> {
    /// Serves until the end is wanted.
    pub fn run(&self) -> Result<(), String> {
        let notifier = self.notifier.clone();
        self.disk.gate().listen(Box::new(move |capacity| notifier.config_changed(capacity)));
        while self.wait_for_connection().map_err(|error| format!("could not wait: {error}"))? {
            self.serve()?;
        }
        Ok(())
    }

    /// False if the end is wanted.
    fn wait_for_connection(&self) -> io::Result<bool> {
        loop {
            if self.shutdown.is_wanted() {
                return Ok(false);
            }
            let interest = PollFlags::POLLIN;
            let mut fds = [
                PollFd::new(self.socket.as_fd(), interest),
                PollFd::new(self.wake.as_fd(), interest),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if fds[0].any().unwrap_or(false) {
                return Ok(true);
            }
        }
    }

    /// Serves one connection to its end. An error means that no other can be served either.
    fn serve(&self) -> Result<(), String> {
        let memory = SharedMemory::new(Memory::new());
        let router = self.router.clone();
        let device = Device::new(&*self.disk, self.presentation.clone(), router, memory.clone())
            .map(Arc::new)
            .map_err(|error| format!("could not set up I/O: {error}"))?;
        let access = self.presentation.monitor.access();
        self.router.set(access, device.workers().to_vec());
        let result = self.connect(&device, memory);
        self.router.set(access, Vec::new());
        result
    }

    fn connect(&self, device: &Arc<Device>, memory: SharedMemory) -> Result<(), String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), device.clone(), memory)
            .map_err(|error| failed("could not start the queue threads", &error))?;
        for (handler, worker) in daemon.get_epoll_handlers().iter().zip(device.workers()) {
            let fd = worker.event().as_raw_fd();
            handler
                .register_listener(fd, EventSet::IN, device.event_number())
                .map_err(|error| failed("could not watch an event", &error))?;
        }
        let public = match self.socket.accept() {
            Ok(public) => public,
            Err(error) => {
                log::warn!("a front-end was gone before it was connected: {error}");
                return Ok(());
            }
        };
        let library = self
            .private
            .connect()
            .map_err(|error| failed("could not reach the library's socket", &error))?;
        let mut listener =
            self.private.listener().map_err(|error| failed("could not use a socket", &error))?;
        daemon.start(&mut listener).map_err(|error| failed("could not connect", &error))?;
        log::info!("a front-end connected");
        self.presentation.monitor.connect();
        self.shutdown.watch(daemon.shutdown_handle());
        let parts = self.parts(device);
        let disk = self.presentation.monitor.disk();
        let access = self.presentation.monitor.access();
        let relayed = thread::scope(|threads| {
            let public = &public;
            let relay =
                thread::Builder::new().name("relay".to_owned()).spawn_scoped(threads, move || {
                    scope::enter(disk);
                    relay(public, library, parts)
                });
            let result = daemon.wait();
            // The library has ended the connection, or the relay has; now both do.
            let _ = public.shutdown(Direction::Read);
            explain(&result, device);
            relay.map(|thread| thread.join())
        });
        self.shutdown.watch(None);
        match relayed {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(refusal))) => log::error!("the front-end was refused: {refusal}"),
            Ok(Err(_)) => log::error!("the relay has failed"),
            Err(error) => log::error!("could not start the relay: {error}"),
        }
        // The rings may still be running: nothing more is taken, what was taken is finished.
        if access == Access::Main {
            handover::end_freeze(&*self.disk);
        }
        device.drain();
        drop(daemon);
        log::info!("the connection has ended");
        self.presentation.monitor.disconnect();
        if access == Access::Main {
            self.disk.gate().guest_left();
        }
        Ok(())
    }

    /// What the relay of a connection does itself.
    fn parts(&self, device: &Device) -> Vec<Box<dyn Part>> {
        let handover: Box<dyn Part> = match self.presentation.monitor.access() {
            Access::Main => Box::new(HandoverPart::new(self.disk.clone())),
            Access::ReadOnly => {
                Box::new(ReaderPart::new(self.disk.clone(), self.presentation.beside.clone()))
            }
        };
        let context = device.context();
        let mut parts: Vec<Box<dyn Part>> = vec![
            Box::new(NotifyPart::new(self.notifier.clone(), device.capacity())),
            Box::new(CacheModePart::new(device.cache().clone(), context.inflight.clone())),
            handover,
            Box::new(LogPart::new(device.log().clone(), device.workers().to_vec())),
            Box::new(ErrorsPart(context.errors.clone())),
        ];
        if self.presentation.inflight {
            let (inflight, notifier) = (context.inflight.clone(), self.notifier.clone());
            parts.push(Box::new(TrackingPart::new(inflight, notifier, device.queues())));
        }
        parts
    }
}

/// Passes messages on; returns when the connection has ended on either side.
fn relay(
    public: &UnixStream,
    library: UnixStream,
    parts: Vec<Box<dyn Part>>,
) -> Result<(), Refusal> {
    let public = public.try_clone().map_err(|error| error.to_string())?;
    // A front-end that takes no answers must not keep the daemon from ending.
    public.set_write_timeout(Some(ANSWER_PATIENCE)).map_err(|error| error.to_string())?;
    Relay::new(public, library, parts).run()
}

/// Says why a connection ended, unless that was the front-end's plain wish.
fn explain(result: &Result<(), BackendError>, device: &Device) {
    match result {
        Ok(())
        | Err(BackendError::HandleRequest(
            ProtocolError::Disconnected | ProtocolError::PartialMessage,
        )) => {}
        Err(_) if device.was_negotiated() && device.has_no_memory() => log::error!(
            "the front-end shares no guest memory; QEMU needs \
             '-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem'"
        ),
        Err(error) => log::error!("the front-end was refused: {error}"),
    }
}
