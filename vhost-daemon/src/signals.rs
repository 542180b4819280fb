//! Signals, turned into wishes: end (SIGTERM, SIGINT) and report (SIGUSR1).

use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use vhost_user_backend::ShutdownHandle;

/// The wish to end.
#[derive(Default)]
pub struct Shutdown {
    wanted: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Shutdown {
    /// Ends the current connection, if there is one, and everything after it.
    pub fn request(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        self.end_connection();
    }

    /// Somebody wants an end.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Names the connection that has to end on request; `None` when it has ended.
    pub fn watch(&self, connection: Option<ShutdownHandle>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
        // The wish may have come before there was anything to end.
        if self.is_wanted() {
            self.end_connection();
        }
    }

    fn end_connection(&self) {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = connection.as_ref() {
            connection.shutdown();
        }
    }
}

fn handled() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1].into_iter().collect()
}

/// Keeps the signals away from all threads that are started from now on.
pub fn block() -> io::Result<()> {
    Ok(handled().thread_block()?)
}

/// Starts the thread that receives the signals: `end` is called for each wish to end, `report` for the
/// other.
pub fn receive(
    end: impl Fn() + Send + 'static,
    report: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let receiver = move || {
        loop {
            match handled().wait() {
                Ok(Signal::SIGUSR1) => report(),
                Ok(_) => end(),
                // Interrupted by a signal that is not ours.
                Err(_) => {}
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(receiver)?;
    Ok(())
}
