//! The control socket: line-delimited JSON for operators and their programs. A request is an object with
//! a `command`; the answer is `{"ok":true,...}` or `{"ok":false,"error":"..."}`. Each client has a thread
//! of its own, their number and all they can make us keep is bounded, and nobody who serves a disk ever
//! waits for one.

pub mod command;
mod session;

use crate::event::Event;
use crate::front::socket::Socket;
use crate::run::Disks;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Most clients at a time.
const CLIENTS_MAX: usize = 16;
/// After a failure to accept, which may last: no descriptors are left.
const PAUSE: Duration = Duration::from_millis(200);

/// The control socket while it is served. Dropped, it takes no more clients and its name is removed.
pub struct Control {
    wake: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves the socket from now on.
    pub fn start(socket: Socket, disks: Arc<Disks>) -> io::Result<Control> {
        let wake = Arc::new(Event::new()?);
        let event = wake.clone();
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&socket, &event, &disks))?;
        Ok(Control { wake, thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process.
            let _ = thread.join();
        }
    }
}

fn accept(socket: &Socket, wake: &Event, disks: &Arc<Disks>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let interest = PollFlags::POLLIN;
        let mut fds = [PollFd::new(wake.as_fd(), interest), PollFd::new(socket.as_fd(), interest)];
        // Interrupted or not, what follows looks for itself.
        let _ = poll(&mut fds, PollTimeout::NONE);
        if fds[0].any().unwrap_or(false) {
            return;
        }
        if !fds[1].any().unwrap_or(false) {
            continue;
        }
        if let Err(error) = socket.accept().and_then(|stream| admit(stream, &clients, disks)) {
            log::warn!("a client of the control socket could not be served: {error}");
            thread::sleep(PAUSE);
        }
    }
}

/// A place among the clients, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts the client's thread if there is room. Only this thread adds to their number.
fn admit(mut stream: UnixStream, clients: &Arc<AtomicUsize>, disks: &Arc<Disks>) -> io::Result<()> {
    if clients.load(Ordering::Acquire) >= CLIENTS_MAX {
        stream.set_nonblocking(true)?;
        let answer = command::failure("too many clients at a time");
        // It is refused in any case.
        let _ = stream.write_all(format!("{answer}\n").as_bytes());
        return Ok(());
    }
    clients.fetch_add(1, Ordering::AcqRel);
    let place = Place(clients.clone());
    let disks = disks.clone();
    thread::Builder::new().name("control client".to_owned()).spawn(move || {
        let _place = place;
        // Its connection failed: nobody is left to tell.
        let _ = session::run(&stream, &disks);
    })?;
    Ok(())
}
