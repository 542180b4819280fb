//! SIGINT and SIGTERM end a long command in an orderly way; a second one ends it at once.

use crate::failure::{Failure, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Tells whether the user wants to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Takes the signals over.
    pub fn install() -> io::Result<Self> {
        let interrupt = Interrupt::default();
        let seen = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&seen))?;
            flag::register(signal, Arc::clone(&seen))?;
            flag::register_usize(signal, Arc::clone(&interrupt.signal), signal as usize)?;
        }
        Ok(interrupt)
    }

    /// The user wants to stop.
    pub fn is_wanted(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// Fails if a signal came, with the exit code a shell expects.
    pub fn check(&self) -> Result<()> {
        self.check_saying("interrupted; nothing was left behind")
    }

    /// The same, in words of the command's own.
    pub fn check_saying(&self, text: &str) -> Result<()> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => {
                let code = u8::try_from(128 + signal).unwrap_or(1);
                Err(Failure::new(text).with_code(code))
            }
        }
    }
}
