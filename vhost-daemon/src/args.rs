//! The command line, in the spelling of the vhost-user program conventions.

use crate::disk::policy::limits::Limits;
use crate::disk::policy::{DetectZeroes, Discard, OnEnospc};
use crate::io::IoEngine;
use crate::run::affinity::CpuList;
use clap::{Parser, ValueEnum};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// Most queues a front-end can be offered: the back-end library names them in a 64-bit mask.
pub const QUEUES_MAX: u16 = 64;

/// Serves disk images to virtual machines over vhost-user-blk.
#[derive(Parser, Clone, Debug)]
#[command(name = "vhost-daemon", version, max_term_width = 100, args_override_self = true)]
#[command(after_help = EXAMPLES)]
pub struct CommandLine {
    /// What concerns the whole process.
    #[command(flatten)]
    pub process: ProcessArgs,
    /// The disk, unless a configuration file names the disks.
    #[command(flatten)]
    pub disk: Option<Args>,
}

const EXAMPLES: &str = "\
Examples:
  Serve an image, to be attached by QEMU with -chardev socket,path=/run/vm1.sock:
    vhost-daemon --socket-path=/run/vm1.sock --blk-file=/images/vm1.exd

  The same for libvirt's QEMU, which runs as another user:
    vhost-daemon --socket-path=/run/vm1.sock --socket-group=kvm --socket-mode=0660 \\
        --blk-file=/images/vm1.exd

  Several disks in one process, with a control socket for exd-ctl:
    vhost-daemon --config=/etc/exd/vm1.toml --control-path=/run/exd/vm1.control";

/// Options of the process.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "process")]
#[command(next_help_heading = "Process")]
pub struct ProcessArgs {
    /// Read the options from a TOML file: keys are the long options without dashes, with one `[[disk]]`
    /// table for each disk
    #[arg(long, value_name = "FILE", conflicts_with = "disk")]
    pub config: Option<PathBuf>,

    /// Unix socket for commands, see exd-ctl; created with mode 0600
    #[arg(long, value_name = "PATH")]
    pub control_path: Option<PathBuf>,

    /// Become this user before anything is opened; the images and the sockets' directories must be the
    /// user's to use
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,

    /// Keep all rights, for debugging. Otherwise the daemon gives up what a disk does not need: other
    /// files, other programs, capabilities
    #[arg(long)]
    pub no_sandbox: bool,

    /// Least severe messages to print: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,

    /// How messages are written to standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Print what this back-end can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// Print the file by which management software finds this back-end, and exit
    #[arg(long)]
    pub print_discovery: bool,

    /// Write man pages and shell completions to this directory, and exit
    #[arg(long, value_name = "DIRECTORY", hide = true)]
    pub generate: Option<PathBuf>,
}

/// How messages are written.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// A line for people; with the journal's priorities where standard error is the journal
    Text,
    /// A JSON object per line
    Json,
}

/// Options of a disk.
#[derive(clap::Args, Clone, Debug)]
#[group(id = "disk")]
#[command(next_help_heading = "Disk")]
pub struct Args {
    /// The image, a file or block device
    #[arg(long, value_name = "PATH", required = false, required_unless_present_any = NO_DISK)]
    pub blk_file: PathBuf,

    /// Format of the image; never guessed, since a guest could write another format's header
    #[arg(long, value_enum, default_value_t = Format::Exd)]
    pub format: Format,

    /// Smallest unit of requests the guest sees, in bytes: 512 or 4096; default: the image's
    #[arg(long, value_name = "BYTES", value_parser = logical_block)]
    pub logical_block_size: Option<u32>,

    /// Serve the disk read-only
    #[arg(long)]
    pub read_only: bool,

    /// Caching on the host
    #[arg(long, value_enum, default_value_t = Cache::None)]
    pub cache: Cache,

    /// How I/O on the image reaches the host
    #[arg(long, value_enum, default_value_t = IoEngine::Auto)]
    pub io_engine: IoEngine,

    /// When the host has no space for a request
    #[arg(long, value_enum, default_value_t = OnEnospc::Report)]
    pub on_enospc: OnEnospc,

    /// What becomes of the guest's discards
    #[arg(long, value_enum, default_value_t = Discard::Unmap)]
    pub discard: Discard,

    /// What becomes of writes of zeroes
    #[arg(long, value_enum, default_value_t = DetectZeroes::Off)]
    pub detect_zeroes: DetectZeroes,

    /// I/O limits in the words of QEMU: iops-total, iops-read, iops-write, bps-total, bps-read,
    /// bps-write, each also with -max (rate of a burst) and -max-length (seconds of it), and iops-size
    #[arg(long, value_name = "KEY=N[,...]", default_value = "", hide_default_value = true)]
    pub throttling: Limits,

    /// How space of an EXD image is prepared ahead of small first writes. Zeroes double the bytes of what
    /// they are written for; where bandwidth is what is short, try falloc or off
    #[arg(long, value_enum, value_name = "HOW", default_value_t = ZeroAhead::Zero)]
    pub zero_ahead: ZeroAhead,

    /// Move scattered data of an EXD image together after so many seconds without requests; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub defrag_idle: u64,

    /// Serial number the guest sees, at most 20 bytes; default: from the image
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub serial: Option<String>,

    /// Wait for a guest that comes by live migration: the image may be in use by the source's daemon
    /// now, and is taken when the guest's first queue starts
    #[arg(long)]
    pub incoming: bool,

    /// Name of the disk in messages, commands and systemd's FileDescriptorName=; default: the image's
    /// file name without extension
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,

    /// How long to wait for the image lock of a daemon that was killed: it is held until the kernel has
    /// carried out its last writes. At start-up, a holder known to be alive is not waited for. When a
    /// guest starts its queues again, any holder is: afterwards its requests wait
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub lock_wait: u64,

    /// Write statistics as JSON to this file at exit and on SIGUSR1
    #[arg(long, value_name = "PATH")]
    pub stats_file: Option<PathBuf>,

    /// Record the guest's requests to this file, in their order and with their overlap, for a replay by
    /// `cargo xtask bench --trace`
    #[arg(long, value_name = "FILE")]
    pub record_trace: Option<PathBuf>,

    /// Unix socket to listen on, unless systemd passes one
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = SOCKETS)]
    pub socket_path: Option<PathBuf>,

    /// Inherited descriptor of a listening unix socket, instead of --socket-path
    #[arg(long, value_name = "FDNUM", help_heading = SOCKETS)]
    pub fd: Option<RawFd>,

    /// Group of the socket, by name or number
    #[arg(long, value_name = "GROUP", help_heading = SOCKETS)]
    pub socket_group: Option<String>,

    /// Mode of the socket, octal; 0660 lets the group connect
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = mode, help_heading = SOCKETS)]
    pub socket_mode: u32,

    /// Second socket, for one front-end at a time that reads the disk while it is in use, for backup
    #[arg(long, value_name = "PATH", help_heading = SOCKETS)]
    pub read_only_socket: Option<PathBuf>,

    /// Queues offered to the guest; idle ones cost next to nothing
    #[arg(long, value_name = "N", default_value_t = QUEUES_MAX, help_heading = QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    pub num_queues: u16,

    /// Worker threads; default: one per queue, at most one per processor
    #[arg(long, value_name = "N", help_heading = QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: Option<u16>,

    /// Processors that the disk's threads may run on, such as 0-3,8; default: those of the process
    #[arg(long, value_name = "LIST", help_heading = QUEUES)]
    pub cpu_affinity: Option<CpuList>,

    /// Microseconds for which a worker thread looks for more requests before it sleeps: answers sooner,
    /// and keeps a processor busy that long
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = QUEUES,
          value_parser = clap::value_parser!(u32).range(0..=60_000_000))]
    pub poll_us: u32,

    /// Do not offer to keep track of requests in flight: a daemon that dies loses them. For tests
    #[arg(long, hide = true)]
    pub no_inflight: bool,
}

const SOCKETS: &str = "Sockets";
const QUEUES: &str = "Queues and threads";
/// With any of these no disk need be named.
const NO_DISK: [&str; 4] = ["config", "print_capabilities", "print_discovery", "generate"];

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

/// How space is prepared ahead of small first writes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroAhead {
    /// Written with zeroes: first writes are overwrites for the host
    Zero,
    /// Allocated on the host
    Falloc,
    /// Not at all
    Off,
}

impl Args {
    /// How long a disk is unused before it is defragmented; `None`: for ever.
    pub fn defrag_idle(&self) -> Option<Duration> {
        (self.defrag_idle > 0).then(|| Duration::from_secs(self.defrag_idle))
    }
}

impl From<ZeroAhead> for exd_image::ZeroAhead {
    fn from(how: ZeroAhead) -> Self {
        match how {
            ZeroAhead::Zero => exd_image::ZeroAhead::Zero,
            ZeroAhead::Falloc => exd_image::ZeroAhead::Falloc,
            ZeroAhead::Off => exd_image::ZeroAhead::Off,
        }
    }
}

fn logical_block(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("neither 512 nor 4096".to_owned()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= crate::queue::request::SERIAL_LEN {
        Ok(text.to_owned())
    } else {
        Err(format!("longer than {} bytes", crate::queue::request::SERIAL_LEN))
    }
}

fn name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match text.len() {
        1..=64 if text.bytes().all(plain) => Ok(text.to_owned()),
        _ => Err("not 1 to 64 letters, digits, dots, dashes and underscores".to_owned()),
    }
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode such as 0660".to_owned()),
    }
}

impl Args {
    /// The disk's name: the one given, or the image's file name without extension.
    pub fn disk_name(&self) -> String {
        let stem = || self.blk_file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        self.name.clone().unwrap_or_else(|| {
            let stem = stem().unwrap_or_default();
            let name: String =
                stem.chars().map(|c| if plain(c) { c } else { '_' }).take(64).collect();
            if name.is_empty() { "disk".to_owned() } else { name }
        })
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
        let line = std::iter::once("vhost-daemon").chain(args.iter().copied());
        Ok(CommandLine::try_parse_from(line)?.disk.expect("a disk"))
    }

    #[test]
    fn declarations_are_sound() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    #[test]
    fn conventional_spelling() {
        let args = parse(&["--socket-path=/s", "--blk-file=/f", "--read-only"]).expect("valid");
        assert!(args.read_only);
        assert_eq!(args.format, Format::Exd);
        assert!(args.cache.is_direct() && args.cache.is_writeback());
        assert_eq!(args.num_queues, QUEUES_MAX);
        assert_eq!((args.socket_mode, args.disk_name().as_str()), (0o600, "f"));
    }

    #[test]
    fn socket_or_descriptor_but_not_both() {
        assert!(parse(&["--blk-file=/f", "--fd=3"]).is_ok());
        assert!(parse(&["--blk-file=/f", "--fd=3", "--socket-path=/s"]).is_err());
    }

    #[test]
    fn a_disk_or_a_file_of_disks() {
        let parse = |args: &[&str]| {
            CommandLine::try_parse_from(std::iter::once("vhost-daemon").chain(args.iter().copied()))
        };
        assert!(parse(&[]).is_err());
        assert!(parse(&["--read-only"]).is_err());
        assert!(parse(&["--socket-path=/s"]).is_err());
        let line = parse(&["--config=/c", "--log-level=debug"]).expect("valid");
        assert!(line.disk.is_none());
        assert!(parse(&["--config=/c", "--blk-file=/f"]).is_err());
        assert!(parse(&["--config=/c", "--read-only"]).is_err());
    }

    #[test]
    fn limits() {
        let with = |arg| parse(&["--blk-file=/f", "--fd=3", arg]).is_ok();
        assert!(!with("--num-queues=0"));
        assert!(!with("--num-queues=65"));
        assert!(with("--serial=12345678901234567890"));
        assert!(!with("--serial=123456789012345678901"));
        assert!(with("--socket-mode=0660") && with("--socket-mode=777"));
        assert!(!with("--socket-mode=0888") && !with("--socket-mode=1777"));
        assert!(with("--name=vm1.data-2") && !with("--name=") && !with("--name=a/b"));
    }

    #[test]
    fn names_come_from_files() {
        let name = |path: &str| {
            parse(&["--fd=3", &format!("--blk-file={path}")]).expect("valid").disk_name()
        };
        assert_eq!(name("/images/vm 1.exd"), "vm_1");
        assert_eq!(name("/dev/vg/root"), "root");
        assert_eq!(name("/.."), "disk");
    }

    #[test]
    fn capabilities_are_json() {
        let value: serde_json::Value = serde_json::from_str(CAPABILITIES).expect("JSON");
        assert_eq!(value["type"], "block");
    }
}
