//! The back-ends that are compared: how each makes its image, serves it and ends.

use crate::Result;
use exd_guest_tests::process::{self, Process};
use exd_guest_tests::{Programs, programs};
use nix::libc::O_DIRECT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a back-end may take to listen, and to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(120);

/// A back-end with a kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// vhost-daemon on an EXD image.
    Exd,
    /// vhost-daemon on a sparse raw file.
    OwnRaw,
    /// vhost-daemon on a raw file that was fully written before.
    OwnFull,
    /// qemu-storage-daemon on a sparse raw file: R.
    Raw,
    /// qemu-storage-daemon on a raw file that was fully written before: F, the limit.
    Full,
    /// qemu-storage-daemon on qcow2 with default options.
    Qcow2,
    /// The same with lazy_refcounts.
    Qcow2Lazy,
    /// The same with extended_l2 and clusters of 128 KiB.
    Qcow2Extl2,
    /// The same with preallocation=metadata.
    Qcow2Meta,
}

impl Target {
    /// All, in the order of tables.
    pub const ALL: [Target; 9] = [
        Target::Exd,
        Target::OwnRaw,
        Target::OwnFull,
        Target::Raw,
        Target::Full,
        Target::Qcow2,
        Target::Qcow2Lazy,
        Target::Qcow2Extl2,
        Target::Qcow2Meta,
    ];
    /// Those on qcow2.
    pub const QCOW2: [Target; 4] =
        [Target::Qcow2, Target::Qcow2Lazy, Target::Qcow2Extl2, Target::Qcow2Meta];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Target::Exd => "exd",
            Target::OwnRaw => "own-raw",
            Target::OwnFull => "own-full",
            Target::Raw => "raw",
            Target::Full => "full",
            Target::Qcow2 => "qcow2",
            Target::Qcow2Lazy => "qcow2-lazy",
            Target::Qcow2Extl2 => "qcow2-extl2",
            Target::Qcow2Meta => "qcow2-meta",
        }
    }

    /// The image was written to its full length before the measurement.
    pub fn is_full(self) -> bool {
        matches!(self, Target::Full | Target::OwnFull)
    }

    fn is_own(self) -> bool {
        matches!(self, Target::Exd | Target::OwnRaw | Target::OwnFull)
    }

    fn format(self) -> &'static str {
        match self {
            Target::Exd => "exd",
            Target::OwnRaw | Target::OwnFull | Target::Raw | Target::Full => "raw",
            _ => "qcow2",
        }
    }

    fn qcow2_options(self) -> &'static str {
        match self {
            Target::Qcow2Lazy => "lazy_refcounts=on",
            Target::Qcow2Extl2 => "extended_l2=on,cluster_size=128k",
            Target::Qcow2Meta => "preallocation=metadata",
            _ => "cluster_size=64k",
        }
    }
}

/// What distinguishes images besides their target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes from the start that workloads touch.
    pub span: u64,
    /// EXD only: the image keeps its space on discard, so that what was written once stays allocated.
    pub keeps_space: bool,
    /// EXD only: bytes of its blocks, where that is not imgtool's choice.
    pub block_size: Option<u32>,
}

/// Makes an image. One that is to be full is written up to the end of its span, with data.
pub fn create(programs: &Programs, target: Target, path: &Path, shape: Shape) -> Result<()> {
    match target.format() {
        "exd" => {
            let mut command = Command::new(&programs.imgtool);
            command.args(["create", "-q", "-f", "exd"]);
            if shape.keeps_space {
                command.args(["-o", "preallocation=metadata"]);
            }
            if let Some(bytes) = shape.block_size {
                command.args(["-o", &format!("block_size={bytes}")]);
            }
            process::output(command.arg(path).arg(shape.size.to_string()))?;
        }
        "raw" => {
            File::create(path)?.set_len(shape.size)?;
            if target.is_full() {
                write_fully(path, 0, shape.span)?;
            }
        }
        _ => {
            let mut command = Command::new(programs::find("qemu-img")?);
            command.args(["create", "-q", "-f", "qcow2", "-o", target.qcow2_options()]);
            process::output(command.arg(path).arg(shape.size.to_string()))?;
        }
    }
    Ok(())
}

/// Bytes written at once.
const CHUNK: usize = 1 << 20;
const ALIGNMENT: usize = 4096;

/// Writes a part of a file with data that is not zero, past the page cache where that is possible, and
/// syncs it.
pub fn write_fully(path: &Path, start: u64, end: u64) -> Result<()> {
    let mut memory = vec![0u8; CHUNK + ALIGNMENT];
    let shift = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut memory[shift..shift + CHUNK];
    fastrand::Rng::with_seed(1).fill(buffer);
    let mut options = File::options();
    options.write(true);
    let file = options.clone().custom_flags(O_DIRECT).open(path).or_else(|_| options.open(path))?;
    let mut at = start / ALIGNMENT as u64 * ALIGNMENT as u64;
    let end = end.next_multiple_of(ALIGNMENT as u64).min(file.metadata()?.len());
    while at < end {
        let take = (end - at).min(CHUNK as u64);
        file.write_all_at(&buffer[..take as usize], at)?;
        at += take;
    }
    Ok(file.sync_all()?)
}

/// A back-end that serves an image.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    image: PathBuf,
    socket: PathBuf,
    statistics: Option<PathBuf>,
    log: PathBuf,
}

/// What is known when a back-end has ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Closed {
    /// Seconds from SIGTERM to the end.
    pub seconds: f64,
    /// Bytes of host space that the image takes.
    pub space: u64,
    /// What vhost-daemon counted.
    pub statistics: Option<Value>,
}

impl Backend {
    /// Starts the back-end and waits until it listens. `args` go to vhost-daemon.
    pub fn start(
        programs: &Programs,
        target: Target,
        image: &Path,
        queues: usize,
        args: &[String],
    ) -> Result<Backend> {
        let socket = image.with_extension("sock");
        let log = image.with_extension("log");
        let statistics = target.is_own().then(|| image.with_extension("stats"));
        for file in [Some(&socket), statistics.as_ref()].into_iter().flatten() {
            if file.exists() {
                fs::remove_file(file)?;
            }
        }
        let mut command = if let Some(statistics) = &statistics {
            let mut command = Command::new(&programs.vhost_daemon);
            command.arg(format!("--socket-path={}", socket.display()));
            command.arg(format!("--blk-file={}", image.display()));
            command.arg(format!("--format={}", target.format()));
            command.arg(format!("--num-queues={queues}"));
            command.arg(format!("--stats-file={}", statistics.display()));
            command.args(args);
            command
        } else {
            reference(target, image, &socket, queues)?
        };
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut process = Process::start(&mut command)?;
        let mut serves = false;
        process::wait_until("the back-end listens", PATIENCE, || {
            if !process.is_running() {
                let text = fs::read_to_string(&log).unwrap_or_default();
                return Err(format!("{} ended at its start:\n{text}", target.name()).into());
            }
            serves = socket.exists();
            Ok(serves)
        })?;
        Ok(Backend { process, image: image.to_owned(), socket, statistics, log })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends it in an orderly way.
    pub fn close(mut self) -> Result<Closed> {
        let begun = Instant::now();
        kill(Pid::from_raw(self.pid() as i32), Signal::SIGTERM)?;
        self.process.wait(PATIENCE)?;
        let seconds = begun.elapsed().as_secs_f64();
        let text = self.statistics.as_ref().map(fs::read_to_string).transpose()?;
        let statistics = text.map(|text| serde_json::from_str(&text)).transpose()?;
        let space = fs::metadata(&self.image)?.blocks() * 512;
        for file in [Some(&self.log), self.statistics.as_ref()].into_iter().flatten() {
            // Only litter; it goes away with the directory.
            let _ = fs::remove_file(file);
        }
        Ok(Closed { seconds, space, statistics })
    }
}

/// qemu-storage-daemon with the settings of a well set up disk.
fn reference(target: Target, image: &Path, socket: &Path, queues: usize) -> Result<Command> {
    let mut command = Command::new(programs::find("qemu-storage-daemon")?);
    let (image, socket) = (image.display(), socket.display());
    let file = format!(
        "driver=file,node-name=file,filename={image},cache.direct=on,aio=io_uring,discard=unmap"
    );
    let format = target.format();
    let node = format!("driver={format},node-name=disk,file=file,discard=unmap");
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},\
         writable=on,num-queues={queues}"
    );
    command.args(["--blockdev", &file, "--blockdev", &node, "--export", &export]);
    Ok(command)
}
