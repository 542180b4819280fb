//! What systemd passes and wants to know: sockets (sd_listen_fds(3)), readiness and signs of life
//! (sd_notify(3)). Without systemd nothing happens here.

use sd_notify::NotifyState;
use std::os::fd::RawFd;
use std::time::Duration;

/// Name of a passed socket that is the control socket.
pub const CONTROL: &str = "control";

/// Sockets that systemd passed.
#[derive(Debug, Default)]
pub struct Passed(Vec<(RawFd, String)>);

impl Passed {
    /// Those of this process. To be called once, before any thread is started.
    pub fn take() -> Result<Passed, String> {
        let passed = sd_notify::listen_fds_with_names();
        let passed = passed.map_err(|error| format!("the sockets systemd passed: {error}"))?;
        Ok(Passed(passed.collect()))
    }

    /// The socket of this name.
    pub fn named(&mut self, name: &str) -> Option<RawFd> {
        let at = self.0.iter().position(|(_, known)| known == name)?;
        Some(self.0.remove(at).0)
    }

    /// The only socket there is, whatever its name.
    pub fn only(&mut self) -> Option<RawFd> {
        if self.0.len() == 1 { self.0.pop().map(|(fd, _)| fd) } else { None }
    }

    /// The names of those that nobody has taken.
    pub fn rest(&self) -> Vec<&str> {
        self.0.iter().map(|(_, name)| name.as_str()).collect()
    }
}

/// All disks are served.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The end has begun.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// A sign of life.
pub fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// How often a sign of life is due: in half the time after which systemd loses patience.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|patience| patience / 2)
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("could not tell systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_taken_by_name() {
        let mut passed = Passed(vec![(3, "a".to_owned()), (4, "b".to_owned())]);
        assert_eq!(passed.only(), None);
        assert_eq!(passed.named("b"), Some(4));
        assert_eq!(passed.named("b"), None);
        assert_eq!(passed.rest(), ["a"]);
        assert_eq!(passed.only(), Some(3));
        assert_eq!(passed.only(), None);
    }
}
