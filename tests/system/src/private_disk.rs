//! A disk of the test's own: a loop device with a file system on it, whose flushes can be counted and whose
//! writes can be slowed down. Needs root; where that is missing the tests say so and do without.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// See the module. Taken apart when dropped.
#[derive(Debug)]
pub struct PrivateDisk {
    /// `loop7`.
    name: String,
    mount: Option<PathBuf>,
    backing: tempfile::TempDir,
}

impl PrivateDisk {
    /// Makes one of `size` bytes with an ext4.
    pub fn new(size: u64) -> Result<PrivateDisk, String> {
        PrivateDisk::with_ext4(size, &[])
    }

    /// Makes one with an ext4 without a journal, which flushes the device once per sync. With a journal
    /// each commit flushes it twice, because a loop device has no FUA.
    pub fn without_journal(size: u64) -> Result<PrivateDisk, String> {
        PrivateDisk::with_ext4(size, &["-O", "^has_journal"])
    }

    /// Makes one with a btrfs.
    pub fn with_btrfs(size: u64) -> Result<PrivateDisk, String> {
        PrivateDisk::with_file_system(size, Command::new("mkfs.btrfs").args(["-q", "-K"]))
    }

    fn with_ext4(size: u64, options: &[&str]) -> Result<PrivateDisk, String> {
        let options = ["-q", "-E", "nodiscard"].iter().chain(options);
        PrivateDisk::with_file_system(size, Command::new("mkfs.ext4").args(options))
    }

    fn with_file_system(size: u64, make: &mut Command) -> Result<PrivateDisk, String> {
        let mut disk = PrivateDisk::bare(size)?;
        let mount = disk.backing.path().join("mnt");
        fs::create_dir(&mount).map_err(text)?;
        run(make.arg(disk.device()))?;
        run(Command::new("mount").arg(disk.device()).arg(&mount))?;
        disk.mount = Some(mount);
        Ok(disk)
    }

    fn bare(size: u64) -> Result<PrivateDisk, String> {
        let backing = crate::programs::scratch();
        let file = backing.path().join("backing");
        fs::File::create(&file).and_then(|file| file.set_len(size)).map_err(text)?;
        let device =
            run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&file))?;
        let name = device.trim().trim_start_matches("/dev/").to_owned();
        Ok(PrivateDisk { name, mount: None, backing })
    }

    fn device(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Where files on it go.
    pub fn path(&self) -> &Path {
        self.mount.as_deref().expect("a disk with a file system")
    }

    /// Flushes the device has carried out so far (Documentation/block/stat.rst, field 16).
    pub fn flushes(&self) -> u64 {
        let stat = fs::read_to_string(format!("/sys/block/{}/stat", self.name)).expect("sysfs");
        let field = stat.split_whitespace().nth(15).expect("a kernel that counts flushes");
        field.parse().expect("a number")
    }

    /// `major:minor`.
    fn number(&self) -> Result<String, String> {
        let number = fs::read_to_string(format!("/sys/block/{}/dev", self.name)).map_err(text)?;
        Ok(number.trim().to_owned())
    }
}

impl Drop for PrivateDisk {
    fn drop(&mut self) {
        // A test that failed may have left a daemon that ends in a moment; a lazy unmount waits for it.
        if let Some(mount) = &self.mount {
            let _ = run(Command::new("umount").arg("--lazy").arg(mount));
        }
        let _ = run(Command::new("losetup").arg("--detach").arg(self.device()));
    }
}

/// Slows the writes of processes down, by a control group of version 1 or 2.
#[derive(Debug)]
pub struct Throttle {
    group: PathBuf,
}

impl Throttle {
    /// At most so many bytes and operations per second are written to the disk.
    pub fn new(disk: &PrivateDisk, bytes: u64, operations: u64) -> Result<Throttle, String> {
        let device = disk.number()?;
        let name = format!("exd-test-{}", std::process::id());
        let old = Path::new("/sys/fs/cgroup/blkio");
        if old.join("blkio.throttle.write_bps_device").exists() {
            let throttle = Throttle { group: old.join(name) };
            fs::create_dir(&throttle.group).map_err(text)?;
            throttle.set("blkio.throttle.write_bps_device", &format!("{device} {bytes}"))?;
            throttle.set("blkio.throttle.write_iops_device", &format!("{device} {operations}"))?;
            return Ok(throttle);
        }
        let root = Path::new("/sys/fs/cgroup");
        // Refused if it is on already in a way we may not change; setting the limit will tell.
        let _ = fs::write(root.join("cgroup.subtree_control"), "+io");
        let throttle = Throttle { group: root.join(name) };
        fs::create_dir(&throttle.group).map_err(text)?;
        throttle.set("io.max", &format!("{device} wbps={bytes} wiops={operations}"))?;
        Ok(throttle)
    }

    /// Slows this process down.
    pub fn add(&self, pid: i32) -> Result<(), String> {
        self.set("cgroup.procs", &pid.to_string())
    }

    fn set(&self, file: &str, value: &str) -> Result<(), String> {
        let path = self.group.join(file);
        fs::write(&path, value).map_err(|error| format!("{}: {error}", path.display()))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
    }
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// Runs a command and returns what it prints.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}
