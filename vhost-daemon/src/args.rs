//! The command line, in the spelling of the vhost-user program conventions.

use crate::io::IoEngine;
use clap::{Parser, ValueEnum};
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Most queues a front-end can be offered: the back-end library names them in a 64-bit mask.
pub const QUEUES_MAX: u16 = 64;

/// Serves a disk image to a virtual machine over vhost-user-blk.
#[derive(Parser, Clone, Debug)]
#[command(version, max_term_width = 100)]
pub struct Args {
    /// Unix socket to listen on; created with mode 0600
    #[arg(long, value_name = "PATH", required_unless_present = "fd", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Inherited descriptor of a listening unix socket, instead of --socket-path
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<RawFd>,

    /// The image, a file or block device
    #[arg(long, value_name = "PATH")]
    pub blk_file: PathBuf,

    /// Format of the image; never guessed, since a guest could write another format's header
    #[arg(long, value_enum, default_value_t = Format::Exd)]
    pub format: Format,

    /// Serve the disk read-only
    #[arg(long)]
    pub read_only: bool,

    /// Queues offered to the guest; idle ones cost next to nothing
    #[arg(long, value_name = "N", default_value_t = QUEUES_MAX,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    pub num_queues: u16,

    /// Worker threads; default: one per queue, at most one per processor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: Option<u16>,

    /// Caching on the host
    #[arg(long, value_enum, default_value_t = Cache::None)]
    pub cache: Cache,

    /// How I/O on the image reaches the host
    #[arg(long, value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,

    /// Serial number the guest sees, at most 20 bytes; default: from the image
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub serial: Option<String>,

    /// Wait for a guest that comes by live migration: the image may be in use by the source's daemon
    /// now, and is taken when the guest's first queue starts
    #[arg(long)]
    pub incoming: bool,

    /// How long to wait for the image lock of a daemon that was killed: it is held until the kernel has
    /// carried out its last writes. At start-up, a holder known to be alive is not waited for. When a
    /// guest starts its queues again, any holder is: afterwards its requests wait
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub lock_wait: u64,

    /// Write statistics as JSON to this file at exit and on SIGUSR1
    #[arg(long, value_name = "PATH")]
    pub stats_file: Option<PathBuf>,

    /// Least severe messages to print
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,

    /// Print what this back-end can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Image formats.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// EXtent Disk
    Exd,
    /// The disk's bytes as they are
    Raw,
}

/// Caching on the host, in the words of QEMU.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cache {
    /// Direct I/O; the guest sees a volatile cache and flushes it
    None,
    /// Through the host's page cache; the guest sees a volatile cache
    Writeback,
    /// Through the host's page cache; a write completes when it is durable
    Writethrough,
    /// Direct I/O; a write completes when it is durable
    Directsync,
}

impl Cache {
    /// Past the host's page cache.
    pub fn is_direct(self) -> bool {
        matches!(self, Cache::None | Cache::Directsync)
    }

    /// The guest sees a volatile write cache.
    pub fn is_writeback(self) -> bool {
        matches!(self, Cache::None | Cache::Writeback)
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= crate::queue::request::SERIAL_LEN {
        Ok(text.to_owned())
    } else {
        Err(format!("longer than {} bytes", crate::queue::request::SERIAL_LEN))
    }
}

/// What `--print-capabilities` prints (vhost-user.json, type `VHostUserBackendCapabilities`).
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("vhost-daemon").chain(args.iter().copied()))
    }

    #[test]
    fn conventional_spelling() {
        let args = parse(&["--socket-path=/s", "--blk-file=/f", "--read-only"]).expect("valid");
        assert!(args.read_only);
        assert_eq!(args.format, Format::Exd);
        assert!(args.cache.is_direct() && args.cache.is_writeback());
        assert_eq!(args.num_queues, QUEUES_MAX);
    }

    #[test]
    fn socket_or_descriptor_but_not_both() {
        assert!(parse(&["--blk-file=/f"]).is_err());
        assert!(parse(&["--blk-file=/f", "--fd=3"]).is_ok());
        assert!(parse(&["--blk-file=/f", "--fd=3", "--socket-path=/s"]).is_err());
    }

    #[test]
    fn limits() {
        let with = |arg| parse(&["--blk-file=/f", "--fd=3", arg]).is_ok();
        assert!(!with("--num-queues=0"));
        assert!(!with("--num-queues=65"));
        assert!(with("--serial=12345678901234567890"));
        assert!(!with("--serial=123456789012345678901"));
    }

    #[test]
    fn capabilities_are_json() {
        let value: serde_json::Value = serde_json::from_str(CAPABILITIES).expect("JSON");
        assert_eq!(value["type"], "block");
    }
}
