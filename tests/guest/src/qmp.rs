//! QEMU's machine protocol: commands to the machine, and its events.

use crate::{Result, process};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long QEMU may take for a command, or for what it announces by an event.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a machine's monitor.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    /// Events not yet asked for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the monitor at this socket, which may still have to appear.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let mut stream = None;
        process::wait_until("the monitor listens", LIMIT, || {
            stream = UnixStream::connect(socket).ok();
            Ok(stream.is_some())
        })?;
        let stream = stream.ok_or("no monitor")?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Qmp { lines: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("not a monitor: {greeting}").into());
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command to its answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let message = self.receive()?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if message.get("event").is_some() {
                self.events.push(message);
            } else {
                return Err(format!("{request}: {message}").into());
            }
        }
    }

    /// Waits for an event of this name whose data has this value at `key` (any, if `key` is empty).
    pub fn wait_for(&mut self, name: &str, key: &str, value: &str) -> Result<Value> {
        let fits = |event: &Value| {
            event["event"] == name && (key.is_empty() || event["data"][key] == value)
        };
        loop {
            if let Some(at) = self.events.iter().position(fits) {
                return Ok(self.events.remove(at));
            }
            let message = self.receive().map_err(|error| format!("waiting for {name}: {error}"))?;
            self.events.push(message);
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err("QEMU closed its monitor".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
