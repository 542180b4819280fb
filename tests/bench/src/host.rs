//! The machine: what it is, and a file system of our own on it.

use crate::Result;
use crate::backend::write_fully;
use exd_guest_tests::{process, programs};
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What results were measured on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Date and time, UTC.
    pub date: String,
    /// Model of the processor and how many there are.
    pub processor: String,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// The kernel.
    pub kernel: String,
    /// The file system of the images.
    pub file_system: String,
    /// ext4 only: the thread of its journal, or none.
    pub journal_task: String,
    /// The block device.
    pub device: String,
    /// Version of qemu-storage-daemon.
    pub qemu: String,
    /// The commit that was measured.
    pub commit: String,
    /// Load averages when it began.
    pub load: String,
}

impl Machine {
    /// Describes this one, for images in `dir`.
    pub fn of(dir: &Path, device: &str) -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.current_dir(programs::workspace()).args(arguments);
            process::output(&mut command).unwrap_or_default().trim().to_owned()
        };
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.map_or("", |line| line.trim_start_matches([' ', '\t', ':']));
        let count = std::thread::available_parallelism().map_or(1, |count| count.get());
        let memory = read("/proc/meminfo");
        let memory = memory.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok());
        let place = dir.to_string_lossy();
        let source = run("findmnt", &["-n", "-o", "SOURCE", "--target", &place]);
        let name = source.rsplit('/').next().unwrap_or_default().to_owned();
        let journal = fs::read_to_string(format!("/sys/fs/ext4/{name}/journal_task"));
        Machine {
            date: run("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            processor: format!("{count} x {model}"),
            memory_mib: memory.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease"),
            file_system: run("findmnt", &["-n", "-o", "FSTYPE,OPTIONS", "--target", &place]),
            journal_task: journal.map_or("-".to_owned(), |text| text.trim().to_owned()),
            device: device.to_owned(),
            qemu: run("qemu-storage-daemon", &["--version"])
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned(),
            commit: run("git", &["rev-parse", "--short", "HEAD"]),
            load: read("/proc/loadavg"),
        }
    }

    /// The file system in a word: `ext4`, `ext4-journal`, `xfs`.
    pub fn kind(&self) -> String {
        let kind = self.file_system.split(' ').next().unwrap_or("unknown");
        let journal = !matches!(self.journal_task.as_str(), "-" | "<none>");
        if journal { format!("{kind}-journal") } else { kind.to_owned() }
    }

    /// The images lay on a file system of our own.
    pub fn is_loop(&self) -> bool {
        self.device.starts_with("loop")
    }

    /// Lines for people.
    pub fn lines(&self) -> Vec<String> {
        vec![
            format!("{}, commit {}", self.date, self.commit),
            format!("{}, {} MiB, Linux {}", self.processor, self.memory_mib, self.kernel),
            format!("{} on {}, journal_task {}", self.file_system, self.device, self.journal_task),
            format!("{}; load {}", self.qemu, self.load),
        ]
    }
}

/// Kinds of file systems that can be made.
pub const LOOP_KINDS: [&str; 3] = ["ext4", "ext4-nojournal", "xfs"];
/// Nothing left to be done in the background of a measurement.
const EXT4: &str = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
/// Bytes of a file system of our own.
const LOOP_SIZE: u64 = 12 << 30;

/// A file system on a loop device over a fully written file: its journal, its flushes, nobody else's.
///
/// It is mounted in a name space of this process, and the device is detached already, which Linux does
/// when its last user is gone: however this process ends, nothing stays but the file.
#[derive(Debug)]
pub struct LoopFileSystem {
    mount: PathBuf,
    // Held against others that would use the same file.
    _lock: Flock<File>,
}

impl LoopFileSystem {
    /// Makes one of the kind `ext4`, `ext4-nojournal` or `xfs`. Its file lies in `dir` and stays there,
    /// since writing it takes long. Needs root.
    pub fn make(dir: &Path, kind: &str) -> Result<LoopFileSystem> {
        let backing = dir.join("loop-backing");
        let file = File::options().create(true).append(true).open(&backing)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| format!("{}: in use: {error}", backing.display()))?;
        if lock.metadata()?.len() != LOOP_SIZE {
            lock.set_len(LOOP_SIZE)?;
            let written = write_fully(&backing, 0, LOOP_SIZE);
            if let Err(error) = written {
                // Not to be taken for a complete one.
                lock.set_len(0)?;
                return Err(error);
            }
        }
        unshare(CloneFlags::CLONE_NEWNS)?;
        let losetup = programs::find("losetup")?;
        let mut command = Command::new(&losetup);
        command.args(["--find", "--show", "--direct-io=on"]).arg(&backing);
        let device = process::output(&mut command)?.trim().to_owned();
        let mounted = mount_on(&device, dir, kind);
        process::output(Command::new(losetup).args(["--detach", &device]))?;
        Ok(LoopFileSystem { mount: mounted?, _lock: lock })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.mount
    }
}

/// Makes the file system on the device and mounts it in `dir`.
fn mount_on(device: &str, dir: &Path, kind: &str) -> Result<PathBuf> {
    // Without discards, which would make the file sparse again.
    let (program, arguments): (_, &[&str]) = match kind {
        "ext4" => ("mkfs.ext4", &["-q", "-F", "-E", EXT4]),
        "ext4-nojournal" => ("mkfs.ext4", &["-q", "-F", "-E", EXT4, "-O", "^has_journal"]),
        _ => ("mkfs.xfs", &["-q", "-f", "-K"]),
    };
    let mut command = Command::new(programs::find(program)?);
    process::output(command.args(arguments).arg(device))?;
    process::output(Command::new("mount").args(["--make-rprivate", "/"]))?;
    let place = tempfile::Builder::new().prefix("mount-").tempdir_in(dir)?.keep();
    process::output(Command::new("mount").arg(device).arg(&place))?;
    Ok(place)
}

impl Drop for LoopFileSystem {
    fn drop(&mut self) {
        if let Err(error) = process::output(Command::new("umount").arg(&self.mount)) {
            eprintln!("{error}");
        }
        // Only litter: an empty directory.
        let _ = fs::remove_dir(&self.mount);
    }
}
