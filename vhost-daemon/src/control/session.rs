//! One client of the control socket.

use super::command::{self, Answer};
use crate::events;
use crate::run::Disks;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// Longest request in bytes, its end included.
const LINE_MAX: u64 = 4096;
/// How long a client may keep its place without asking anything.
const IDLE: Duration = Duration::from_secs(600);
/// How long a client may take to read an answer.
const READING: Duration = Duration::from_secs(10);
/// How often a subscriber is looked at without an event.
const LOOK: Duration = Duration::from_secs(2);

/// Answers the client until it goes.
pub fn run(stream: &UnixStream, disks: &Disks) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(READING))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 == LINE_MAX {
                tell(stream, &command::failure("the request is too long").to_string())?;
            }
            return Ok(());
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match command::answer(&line, disks) {
            Answer::Plain(answer) => tell(stream, &answer.to_string())?,
            Answer::Events => {
                let events = events::subscribe();
                tell(stream, &command::success().to_string())?;
                return forward(stream, &events);
            }
        }
    }
}

fn tell(mut stream: &UnixStream, line: &str) -> io::Result<()> {
    stream.write_all(format!("{line}\n").as_bytes())
}

/// Tells the client of events until it goes.
fn forward(
    stream: &UnixStream,
    events: &std::sync::mpsc::Receiver<std::sync::Arc<str>>,
) -> io::Result<()> {
    loop {
        match events.recv_timeout(LOOK) {
            Ok(event) => tell(stream, &event)?,
            Err(RecvTimeoutError::Timeout) if has_gone(stream) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

fn has_gone(stream: &UnixStream) -> bool {
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    let mut fds = [PollFd::new(stream.as_fd(), gone)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
