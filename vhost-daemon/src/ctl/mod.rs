//! `exd-ctl`, the client of the control socket: what it can be told, what it asks, how it shows answers.

pub mod show;

use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Asks and tells a running vhost-daemon by its control socket.
#[derive(Parser, Clone, Debug)]
#[command(name = "exd-ctl", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Args {
    /// How answers are shown
    #[arg(long, value_enum, default_value_t = Output::Human, global = true)]
    pub output: Output,

    /// The disk meant, if the daemon serves several
    #[arg(long, value_name = "NAME", global = true)]
    pub disk: Option<String>,

    /// The daemon's control socket (its --control-path)
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  exd-ctl /run/exd/vm1.control status
  exd-ctl /run/exd/vm1.control resize +10G --disk data
  exd-ctl /run/exd/vm1.control stats --prometheus
  exd-ctl /run/exd/vm1.control limits iops-total=500,iops-total-max=2000

  A consistent copy of an image in use:
    exd-ctl /run/exd/vm1.control freeze --timeout 120 &&
    cp --sparse=always vm1.exd vm1-copy.exd;
    exd-ctl /run/exd/vm1.control thaw    # fails if the copy took longer

Exit status: 0 done, 1 refused or failed, 2 wrong usage.";

/// How answers are shown.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// For people
    Human,
    /// The daemon's answer as it is
    Json,
}

/// The commands.
#[derive(Subcommand, Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Show the disks, their state and who is connected
    Status,
    /// Show counters and latencies
    Stats {
        /// In Prometheus' text format
        #[arg(long)]
        prometheus: bool,
    },
    /// Change the size of a disk; the guest is told
    Resize {
        /// In bytes, or with a suffix K, M, G or T; with + or - relative to the present size
        #[arg(value_name = "SIZE", allow_hyphen_values = true, value_parser = Size::parse)]
        size: Size,
    },
    /// Write the map out, so that the next start has nothing to recover
    Checkpoint,
    /// Make the image file stand still for a copy; reads go on, writes wait
    Freeze {
        /// Seconds after which the disk goes on by itself
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
    },
    /// End a freeze; fails if it has ended already
    Thaw,
    /// Show the I/O limits, or change them
    Limits {
        /// The new limits in the words of --throttling, all of them; none: no limits
        #[arg(value_name = "KEY=N[,...]|none")]
        throttling: Option<String>,
    },
    /// Try what is held for want of space again at once (--on-enospc=stop)
    Retry,
    /// Set the least severe messages that the daemon prints
    LogLevel {
        /// off, error, warn, info, debug or trace
        #[arg(value_name = "LEVEL")]
        level: String,
    },
    /// Show events as they happen, until interrupted
    Events,
}

/// A size as typed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// So many bytes.
    Absolute(u64),
    /// So many more than now.
    More(u64),
    /// So many less than now.
    Less(u64),
}

impl Size {
    fn parse(text: &str) -> Result<Size, String> {
        let number = |text: &str| {
            let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
                "" | "b" => 0,
                "k" => 10,
                "m" => 20,
                "g" => 30,
                "t" => 40,
                _ => return Err("the suffix is none of K, M, G, T".to_owned()),
            };
            let number: u64 = digits.parse().map_err(|_| "not a size such as 10G".to_owned())?;
            number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
        };
        match text.split_at_checked(1) {
            Some(("+", rest)) => number(rest).map(Size::More),
            Some(("-", rest)) => number(rest).map(Size::Less),
            _ => number(text).map(Size::Absolute),
        }
    }

    /// The size in bytes, of a disk that has `now`.
    pub fn bytes(self, now: u64) -> Option<u64> {
        match self {
            Size::Absolute(bytes) => Some(bytes),
            Size::More(bytes) => now.checked_add(bytes),
            Size::Less(bytes) => now.checked_sub(bytes),
        }
    }
}

/// A connection to a daemon.
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects.
    pub fn open(path: &Path) -> Result<Connection, String> {
        UnixStream::connect(path)
            .map(|stream| Connection(BufReader::new(stream)))
            .map_err(|error| format!("could not connect to {}: {error}", path.display()))
    }

    /// Asks, and waits for the answer; the error of one that is not a success.
    pub fn ask(&mut self, request: &Value) -> Result<Value, String> {
        let failed = |error: io::Error| format!("the connection failed: {error}");
        writeln!(self.0.get_mut(), "{request}").map_err(failed)?;
        let answer = self.receive()?.ok_or("the daemon closed the connection")?;
        if answer["ok"] == true {
            return Ok(answer);
        }
        Err(answer["error"].as_str().unwrap_or("the daemon gave no reason").to_owned())
    }

    /// The next line, if there is one.
    pub fn receive(&mut self) -> Result<Option<Value>, String> {
        let mut line = String::new();
        let count = self.0.read_line(&mut line);
        match count.map_err(|error| format!("the connection failed: {error}"))? {
            0 => Ok(None),
            _ => serde_json::from_str(&line)
                .map(Some)
                .map_err(|error| format!("the daemon's answer makes no sense: {error}")),
        }
    }
}

/// The request for a command.
pub fn request(connection: &mut Connection, args: &Args) -> Result<Value, String> {
    let mut request = match &args.command {
        Command::Status => json!({ "command": "status" }),
        Command::Stats { prometheus: false } => json!({ "command": "stats" }),
        Command::Stats { prometheus: true } => {
            json!({ "command": "stats", "format": "prometheus" })
        }
        Command::Resize { size } => {
            let now = match size {
                Size::Absolute(_) => 0,
                _ => present_size(connection, args.disk.as_deref())?,
            };
            let size = size.bytes(now).ok_or("the new size would be impossible")?;
            json!({ "command": "resize", "size": size })
        }
        Command::Checkpoint => json!({ "command": "checkpoint" }),
        Command::Freeze { timeout } => json!({ "command": "freeze", "timeout": timeout }),
        Command::Thaw => json!({ "command": "thaw" }),
        Command::Limits { throttling: None } => json!({ "command": "limits" }),
        Command::Limits { throttling: Some(text) } => {
            let text = if text == "none" { "" } else { text.as_str() };
            json!({ "command": "limits", "throttling": text })
        }
        Command::Retry => json!({ "command": "retry" }),
        Command::LogLevel { level } => {
            return Ok(json!({ "command": "log-level", "level": level }));
        }
        Command::Events => return Ok(json!({ "command": "subscribe" })),
    };
    if let Some(disk) = &args.disk {
        request["disk"] = json!(disk);
    }
    Ok(request)
}

fn present_size(connection: &mut Connection, disk: Option<&str>) -> Result<u64, String> {
    let mut request = json!({ "command": "status" });
    if let Some(disk) = disk {
        request["disk"] = json!(disk);
    }
    let status = connection.ask(&request)?;
    match status["disks"].as_array().map(Vec::as_slice) {
        Some([disk]) => disk["capacity"].as_u64().ok_or_else(|| "the size is unknown".to_owned()),
        _ => Err("there are several disks, name one by --disk".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn declarations_are_sound() {
        Args::command().debug_assert();
        let line = ["exd-ctl", "/s", "resize", "-1M", "--disk", "a", "--output=json"];
        let args = Args::try_parse_from(line).expect("valid");
        assert_eq!(args.command, Command::Resize { size: Size::Less(1 << 20) });
        assert_eq!((args.disk.as_deref(), args.output), (Some("a"), Output::Json));
    }

    #[test]
    fn sizes() {
        assert_eq!(Size::parse("4096"), Ok(Size::Absolute(4096)));
        assert_eq!(Size::parse("+2g"), Ok(Size::More(2 << 30)));
        for wrong in ["", "+", "G", "1X", "1.5G", "99999999T", "--1"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Size::Less(2).bytes(1), None);
        assert_eq!(Size::More(2).bytes(1), Some(3));
    }
}
