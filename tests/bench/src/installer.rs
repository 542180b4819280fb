//! Packages unpacked by dpkg, with its own syncs, in a Linux guest on disks of several formats.
//!
//! One guest has a disk for each format and alignment. Each holds a small system: dpkg and what it needs,
//! taken from this machine, and the packages. For each package dpkg then runs on each disk in turn, so
//! that whatever disturbs the machine disturbs all of them.

use crate::Result;
use crate::backend::{Backend, Target};
use exd_guest_tests::{Disk, Guest, Kit, Programs, process, programs};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const MIB: u64 = 1 << 20;
const DISK_SIZE: u64 = 2048 * MIB;
const SECTOR: u64 = 512;
/// Programs that dpkg runs, or that we run in the guest.
const PROGRAMS: [&str; 12] = [
    "dpkg",
    "dpkg-deb",
    "dpkg-split",
    "tar",
    "sh",
    "rm",
    "cat",
    "sync",
    "chroot",
    "ldconfig",
    "start-stop-daemon",
    "diff",
];
/// Directories of a system with a merged /usr.
const DIRECTORIES: [&str; 10] = [
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "debs",
    "etc",
    "tmp",
    "var/lib/dpkg/info",
    "var/lib/dpkg/updates",
    "var/lib/dpkg/triggers",
];

/// Formats that take turns.
pub const TARGETS: [Target; 4] = [Target::Exd, Target::OwnRaw, Target::Raw, Target::Qcow2];
/// First sectors of the partitions.
pub const STARTS: [u64; 2] = [2048, 63];

/// One package on one disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// The format.
    pub target: Target,
    /// First sector of the partition.
    pub start: u64,
    /// The package's file.
    pub package: String,
    /// Number of the guest.
    pub run: usize,
    /// Seconds until dpkg had ended and the file system was synced.
    pub wall: f64,
    /// Seconds of it in which requests were in flight, as the guest counts them.
    pub busy: f64,
}

/// The small system and the packages in it.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    packages: Vec<String>,
}

impl Tree {
    /// Builds it in `root` from the packages' files in `packages`. They are packed again without
    /// compression: unpacking on an emulated processor would take most of the time.
    pub fn build(root: &Path, packages: &Path) -> Result<Tree> {
        for dir in DIRECTORIES {
            fs::create_dir_all(root.join(dir))?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name))?;
        }
        for file in ["var/lib/dpkg/status", "var/lib/dpkg/available"] {
            File::create(root.join(file))?;
        }
        for name in PROGRAMS {
            let program = programs::find(name)?;
            fs::copy(&program, root.join("usr/bin").join(name))?;
            copy_libraries(&program, root)?;
        }
        let mut tree = Tree { root: root.to_owned(), packages: Vec::new() };
        let mut files: Vec<PathBuf> =
            fs::read_dir(packages)?.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "deb")) {
            tree.packages.push(repack(file, root)?);
        }
        if tree.packages.is_empty() {
            return Err("no packages; `cargo xtask installer-bench` fetches them".into());
        }
        Ok(tree)
    }

    /// Makes a raw disk with the tree on a partition that begins at sector `start`.
    fn make_disk(&self, path: &Path, start: u64) -> Result<()> {
        File::create(path)?.set_len(DISK_SIZE)?;
        let sectors = (DISK_SIZE / SECTOR - start) / 8 * 8;
        let mut child = Command::new(programs::find("sfdisk")?)
            .args(["--quiet", "--no-reread"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let table = format!("label: dos\nstart={start}, size={sectors}\n");
        child.stdin.take().ok_or("no standard input")?.write_all(table.as_bytes())?;
        if !child.wait()?.success() {
            return Err("sfdisk failed".into());
        }
        let mut mkfs = Command::new(programs::find("mkfs.ext4")?);
        let offset = start * SECTOR;
        mkfs.args(["-q", "-F", "-E"]);
        mkfs.arg(format!("offset={offset},lazy_itable_init=0,lazy_journal_init=0,nodiscard"));
        mkfs.arg("-d").arg(&self.root).arg(path).arg(format!("{}k", sectors / 2));
        process::output(&mut mkfs).map(|_| ())
    }
}

/// Copies the shared libraries that the host would load for a program.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    // A script has none.
    let Ok(listing) = process::output(Command::new("ldd").arg(program)) else { return Ok(()) };
    for line in listing.lines() {
        let file = line.split_whitespace().find(|word| word.starts_with('/'));
        let Some(file) = file.map(|file| file.trim_start_matches('/')) else { continue };
        let target = root.join(file);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        if !target.exists() {
            fs::copy(Path::new("/").join(file), target)?;
        }
    }
    Ok(())
}

/// Packs a package again, without compression, and puts it into the tree. Returns its file's name.
fn repack(file: &Path, root: &Path) -> Result<String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().replace('%', "_");
    let unpacked = root.join("tmp/unpacked");
    process::output(Command::new("dpkg-deb").arg("-R").arg(file).arg(&unpacked))?;
    let target = root.join("debs").join(&name);
    let mut pack = Command::new("dpkg-deb");
    pack.args(["-Znone", "--root-owner-group", "-b"]).arg(&unpacked).arg(target);
    process::output(&mut pack)?;
    fs::remove_dir_all(unpacked)?;
    Ok(name)
}

/// Makes the images of one run, boots the guest, and has dpkg unpack all packages on all disks.
pub fn run(built: &Programs, kit: &Kit, tree: &Tree, dir: &Path, run: usize) -> Result<Vec<Step>> {
    let mut disks = Vec::new();
    for start in STARTS {
        let source = dir.join(format!("source-{start}"));
        tree.make_disk(&source, start)?;
        for target in TARGETS {
            let image = dir.join(format!("{}-{start}", target.name()));
            convert(built, target, &source, &image)?;
            let backend = Backend::start(built, target, &image, 1, &[])?;
            disks.push((target, start, image, backend));
        }
        fs::remove_file(source)?;
    }
    let attached: Vec<Disk> = disks
        .iter()
        .map(|(_, _, image, backend)| Disk::served_elsewhere(built, image, backend.socket()))
        .collect();
    let mut guest = Guest::boot(kit, dir, &attached.iter().collect::<Vec<_>>(), 1)?;
    println!("guest: Linux {}", guest.kernel());
    for number in 0..disks.len() {
        let (source, target) = (format!("/dev/{}1", device(number)), place(number));
        guest.call(json!({ "op": "mount", "source": source, "target": target, "kind": "ext4" }))?;
        show_cache(&mut guest, number)?;
    }
    let mut steps = Vec::new();
    for (turn, package) in tree.packages.iter().enumerate() {
        for index in 0..disks.len() {
            let number = (index + turn) % disks.len();
            let (wall, busy) = install(&mut guest, number, package)?;
            let (target, start, ..) = disks[number];
            println!("{package} on {} at {start}: {wall:.2} s, busy {busy:.2} s", target.name());
            steps.push(Step { target, start, package: package.clone(), run, wall, busy });
        }
    }
    guest.power_off()?;
    for (target, start, image, backend) in disks {
        let closed = backend.close()?;
        if let Some(statistics) = closed.statistics {
            println!("{} at {start}: {statistics}", target.name());
        }
        fs::remove_file(image)?;
    }
    Ok(steps)
}

fn convert(built: &Programs, target: Target, source: &Path, image: &Path) -> Result<()> {
    let mut command = match target {
        Target::Exd => Command::new(&built.imgtool),
        _ => Command::new(programs::find("qemu-img")?),
    };
    let format = match target {
        Target::Exd => "exd",
        Target::Raw | Target::OwnRaw => "raw",
        _ => "qcow2",
    };
    command.args(["convert", "-f", "raw", "-O", format]).arg(source).arg(image);
    process::output(&mut command).map(|_| ())
}

/// Has the guest send flushes. qemu-storage-daemon says that it has no volatile cache, and so the guest
/// would send it none: its fsync would make nothing durable.
fn show_cache(guest: &mut Guest, number: usize) -> Result<()> {
    let file = format!("/sys/block/{}/cache_type", device(number));
    let shell = format!("{}/usr/bin/sh", place(number));
    guest.run(&[&shell, "-c", &format!("echo 'write back' > {file}")])?;
    let kind = guest.call(json!({ "op": "read", "path": file }))?;
    if kind == "write back" { Ok(()) } else { Err(format!("{file}: {kind}").into()) }
}

fn device(number: usize) -> String {
    format!("vd{}", char::from(b'a' + number as u8))
}

fn place(number: usize) -> String {
    format!("/mnt/{number}")
}

/// dpkg with one package on one disk: seconds, and those in which the disk was busy.
fn install(guest: &mut Guest, number: usize, package: &str) -> Result<(f64, f64)> {
    let root = place(number);
    let chroot = format!("{root}/usr/bin/chroot");
    let line = format!(
        "dpkg --unpack --force-bad-path --force-depends --force-script-chrootless \
         /debs/{package} && sync -f /"
    );
    let before = busy(guest, number)?;
    let begun = Instant::now();
    guest.run(&[&chroot, &root, "/usr/bin/sh", "-c", &line])?;
    let wall = begun.elapsed().as_secs_f64();
    Ok((wall, (busy(guest, number)? - before) as f64 / 1000.0))
}

/// Milliseconds in which the disk had requests in flight (Documentation/block/stat.rst, field 10).
fn busy(guest: &mut Guest, number: usize) -> Result<u64> {
    let path = format!("/sys/block/{}/stat", device(number));
    let text = guest.call(json!({ "op": "read", "path": path }))?;
    let field = text.as_str().and_then(|text| text.split_whitespace().nth(9)?.parse().ok());
    field.ok_or_else(|| format!("{path} has no field 10: {text}").into())
}
