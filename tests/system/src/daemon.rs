//! A running vhost-daemon.

use crate::programs::program;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long anything may take that must happen.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A vhost-daemon that serves. Killed when dropped.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    lines: Receiver<String>,
    seen: Vec<String>,
    reader: Option<JoinHandle<()>>,
}

/// The daemon's command line for an image at a socket.
fn command_line(
    socket: &Path,
    image: &Path,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Command {
    let mut command = Command::new(program("vhost-daemon"));
    command.arg("--socket-path").arg(socket).arg("--blk-file").arg(image).args(args);
    command
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    pub fn start(
        socket: &Path,
        image: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Daemon {
        let mut daemon = Daemon::launch(socket, image, args);
        daemon.wait_for("serving");
        daemon
    }

    /// The same, whatever EXD_IO_ENGINE says.
    pub fn start_as_it_is(
        socket: &Path,
        image: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Daemon {
        let mut daemon = Daemon::spawn_as_it_is(command_line(socket, image, args), socket);
        daemon.wait_for("serving");
        daemon
    }

    /// Starts a daemon without waiting.
    pub fn launch(
        socket: &Path,
        image: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Daemon {
        Daemon::spawn(command_line(socket, image, args), socket)
    }

    /// Runs a command line that starts a daemon, on the I/O engine that EXD_IO_ENGINE names.
    pub fn spawn(mut command: Command, socket: &Path) -> Daemon {
        if let Ok(engine) = std::env::var("EXD_IO_ENGINE") {
            command.arg(format!("--io-engine={engine}"));
        }
        Daemon::spawn_as_it_is(command, socket)
    }

    /// Runs a command line that starts a daemon.
    pub fn spawn_as_it_is(mut command: Command, socket: &Path) -> Daemon {
        // What a killed daemon leaves goes away with the test's directory.
        let parent = socket.parent().expect("the socket lies in a directory");
        command.env("EXD_RUNTIME_DIR", parent.join("run"));
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        let stderr = child.stderr.take().expect("it is piped");
        let (send, lines) = channel();
        let reader = thread::spawn(move || {
            let mut open = true;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("  {line}");
                open = open && send.send(line).is_ok();
            }
        });
        Daemon { child, socket: socket.to_owned(), lines, seen: Vec::new(), reader: Some(reader) }
    }

    /// Waits for a message with this text and returns it.
    pub fn wait_for(&mut self, text: &str) -> String {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("the daemon never said '{text}' but {:?}", self.seen),
            }
        }
    }

    /// Whether there has been a message with this text so far.
    pub fn has_said(&mut self, text: &str) -> bool {
        self.seen.extend(self.lines.try_iter());
        self.seen.iter().any(|line| line.contains(text))
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process number.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process numbers are positive")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the daemon runs");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it can be waited for")
    }

    /// Has it ended?
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it can be asked").is_some()
    }

    /// Ends it as an operator does, which must succeed.
    pub fn terminate(mut self) {
        self.signal(Signal::SIGTERM);
        assert!(self.wait().success(), "SIGTERM ends the daemon with status 0");
        assert!(!self.socket.exists(), "the socket is removed");
    }

    /// Kills it and waits until it is gone.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // All it said is to be seen when a test has failed.
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
