//! Installing what the demonstration and the tests need.
//!
//! What is there is left alone, so a second run is quick. What cannot be installed is named together with
//! the command that would do it.

use crate::{debian, shell};
use std::path::PathBuf;
use std::process::Command;

/// The oldest QEMU that knows `reconnect-ms`.
const QEMU_VERSION: (u32, u32) = (9, 2);
/// All three in one version: the tools of another version would have to go.
const QEMU_PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-utils", "qemu-block-extra"];
const QEMU_PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "qemu-img", "qemu-storage-daemon"];

/// A program of the system, and the Debian package that has it.
type Need = (&'static str, &'static str);

const GUEST_NEEDS: [Need; 9] = [
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("fio", "fio"),
    ("sfdisk", "fdisk"),
    ("fstrim", "util-linux"),
    ("ldd", "libc-bin"),
    ("xz", "xz-utils"),
];
const TEST_NEEDS: [Need; 5] = [
    ("python3", "python3"),
    ("c++", "g++"),
    ("losetup", "mount"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("valgrind", "valgrind"),
];

const BENCH_NEEDS: [Need; 5] = [
    ("xz", "xz-utils"),
    ("findmnt", "util-linux"),
    ("losetup", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
];

/// What the guest unpacks: many small files and some large ones, no scripts that run before unpacking.
const INSTALLER_PACKAGES: [&str; 10] = [
    "autoconf",
    "debhelper",
    "doc-debian",
    "gettext",
    "groff-base",
    "iso-codes",
    "manpages",
    "manpages-dev",
    "publicsuffix",
    "xkb-data",
];

/// A kernel small enough to boot in seconds, and with the drivers for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// What everything needs.
pub fn everything() -> Result<(), String> {
    let results = [programs(&TEST_NEEDS), rust_components(), fuzzer(), guest()];
    let failures: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// What the guest tests and the demonstration need.
pub fn guest() -> Result<(), String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("the guest is an x86-64 Linux with programs of the host: \
                    run this on x86-64 Linux"
            .into());
    }
    qemu()?;
    programs(&GUEST_NEEDS)?;
    kernel()
}

/// What the measurements need.
pub fn bench() -> Result<(), String> {
    qemu()?;
    programs(&BENCH_NEEDS)
}

/// Fetches the packages that the guest unpacks. Returns where they are.
pub fn installer_packages() -> Result<PathBuf, String> {
    let place = shell::target().join("guest/packages");
    if place.is_dir() {
        return Ok(place);
    }
    println!("Fetching packages for the guest");
    let unfinished = shell::target().join("guest/packages.unfinished");
    let fetch = || -> Result<(), String> {
        let _ = std::fs::remove_dir_all(&unfinished);
        std::fs::create_dir_all(&unfinished).map_err(|error| error.to_string())?;
        INSTALLER_PACKAGES.iter().try_for_each(|name| debian::download(name, &unfinished))
    };
    // Lists that are missing or old know nothing, or a version that is gone.
    fetch().or_else(|_| debian::update().and_then(|()| fetch()))?;
    std::fs::rename(&unfinished, &place).map_err(|error| error.to_string())?;
    Ok(place)
}

/// The toolchain and the program that the fuzz targets need; without them they run as plain loops.
pub fn fuzzer() -> Result<(), String> {
    if !nightly() {
        let toolchain = ["toolchain", "install", "nightly", "--profile", "minimal"];
        attempt(Command::new("rustup").args(toolchain))?;
    }
    if cargo_fuzz().is_none() {
        println!("Building cargo-fuzz");
        let mut install = shell::cargo();
        install.args(["install", "cargo-fuzz", "--locked", "--quiet", "--root"]).arg(tools());
        attempt(&mut install)?;
    }
    Ok(())
}

/// Whether there is a nightly compiler, which the fuzzer's instrumentation needs.
pub fn nightly() -> bool {
    shell::output(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])).is_ok()
}

/// Where cargo-fuzz is.
pub fn cargo_fuzz() -> Option<PathBuf> {
    let own = tools().join("bin/cargo-fuzz");
    if own.is_file() { Some(own) } else { shell::find("cargo-fuzz") }
}

/// Programs that cargo built for our use, in the target directory and not in the user's own.
fn tools() -> PathBuf {
    shell::target().join("tools")
}

fn rust_components() -> Result<(), String> {
    let present = |name: &str| shell::output(shell::cargo().args([name, "--version"])).is_ok();
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(command, _)| !present(command))
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    attempt(Command::new("rustup").args(["component", "add"]).args(missing))
}

fn programs(needs: &[Need]) -> Result<(), String> {
    let missing = needs.iter().filter(|(program, _)| shell::find(program).is_none());
    let mut packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    println!("Installing {}", packages.join(", "));
    let install = || {
        debian::update()?;
        debian::install(&packages, None)
    };
    install().map_err(|error| by_hand(&error, &packages, None))
}

fn qemu() -> Result<(), String> {
    if QEMU_PROGRAMS.iter().all(|program| shell::find(program).is_some()) {
        let text = shell::output(Command::new("qemu-system-x86_64").arg("--version"))?;
        let version = text.strip_prefix("QEMU emulator version ").and_then(debian::version_of);
        if version >= Some(QEMU_VERSION) {
            return Ok(());
        }
    }
    println!("Installing QEMU");
    debian::update().map_err(|error| by_hand(&error, &QEMU_PACKAGES, None))?;
    if debian::candidate(QEMU_PACKAGES[0]) >= Some(QEMU_VERSION) {
        let result = debian::install(&QEMU_PACKAGES, None);
        return result.map_err(|error| by_hand(&error, &QEMU_PACKAGES, None));
    }
    let release = debian::add_backports().map_err(|error| {
        let (major, minor) = QEMU_VERSION;
        format!("QEMU {major}.{minor} or newer is needed; this release's own is older: {error}")
    })?;
    debian::install(&QEMU_PACKAGES, Some(&release))
        .map_err(|error| by_hand(&error, &QEMU_PACKAGES, Some(&release)))
}

/// Fetches the guest's kernel and unpacks it; it is not installed.
fn kernel() -> Result<(), String> {
    let guest = shell::target().join("guest");
    let place = guest.join("kernel");
    if place.join("boot").is_dir() {
        return Ok(());
    }
    println!("Fetching a kernel for the guest ({KERNEL_PACKAGE})");
    let unpacked = guest.join("kernel.unfinished");
    let fetched = guest.join("download");
    for dir in [&unpacked, &fetched] {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    }
    let fetch = || -> Result<(), String> {
        let names = debian::dependencies(KERNEL_PACKAGE)?;
        let image = names.iter().find(|name| name.starts_with("linux-image-"));
        let image = image.ok_or_else(|| format!("{KERNEL_PACKAGE} names no kernel"))?;
        debian::download(image, &fetched)
    };
    // Lists that are missing or old know nothing, or a version that is gone.
    fetch().or_else(|_| debian::update().and_then(|()| fetch()))?;
    let files = std::fs::read_dir(&fetched).map_err(|error| error.to_string())?;
    for file in files.flatten() {
        shell::output(Command::new("dpkg-deb").arg("-x").arg(file.path()).arg(&unpacked))?;
    }
    let _ = std::fs::remove_dir_all(&fetched);
    std::fs::rename(&unpacked, &place).map_err(|error| error.to_string())
}

/// Runs a command that a person could run as well, and says so if it fails.
fn attempt(command: &mut Command) -> Result<(), String> {
    let line = shell::line(command);
    println!("  $ {line}");
    shell::output(command).map(|_| ()).map_err(|error| format!("{error}\nNeeded: {line}"))
}

fn by_hand(error: &str, packages: &[&str], release: Option<&str>) -> String {
    let release = release.map(|name| format!(" -t {name}")).unwrap_or_default();
    let packages = packages.join(" ");
    format!("{error}\nNeeded, as root: apt-get install{release} --no-install-recommends {packages}")
}
