//! Child processes that end with their owner.

use crate::Result;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// How often a state that has no event is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A child that is killed when this value goes away, or when the thread that started it dies.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts a program.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: prctl is async-signal-safe and passes no memory.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().map_err(|error| format!("cannot start {name}: {error}"))?;
        Ok(Process { child, name })
    }

    /// The child, for its streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the program is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        // A failure means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, then waits for a clean end: exit code 0 within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<()> {
        // SAFETY: the child is not yet waited for, so its id is its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        self.wait(limit)
    }

    /// Waits for exit code 0 within `limit`; a process that takes longer is killed.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let signal = status.signal().map(|n| format!(" by signal {n}"));
                    let signal = signal.unwrap_or_default();
                    return Err(format!("{} ended{signal} with {status}", self.name).into());
                }
                None if Instant::now() > deadline => {
                    self.kill();
                    return Err(format!("{} did not end within {limit:?}", self.name).into());
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `ready` says so, or fails after `limit`.
pub fn wait_until(what: &str, limit: Duration, ready: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_and_look(LOOK_EVERY, what, limit, ready)
}

/// The same with another pause between two looks.
pub fn wait_and_look(
    pause: Duration,
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !ready()? {
        if Instant::now() > deadline {
            return Err(format!("{what}: not within {limit:?}").into());
        }
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Runs a program to its end and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let (code, stdout, stderr) = output_with_code(command)?;
    if code == 0 {
        return Ok(stdout);
    }
    let program = command.get_program().to_string_lossy();
    let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    Err(format!("{program} {}: exit code {code}\n{stdout}{stderr}", arguments.join(" ")).into())
}

/// Runs a program to its end: exit code (-1 if a signal ended it), standard output, standard error.
pub fn output_with_code(command: &mut Command) -> Result<(i32, String, String)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot start {program}: {error}"))?;
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}
