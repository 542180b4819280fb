//! The guest's kernel and its initramfs.
//!
//! The kernel is a distribution's own package, unpacked but not installed. The initramfs holds the agent
//! as first process, the kernel modules of the disk and of XFS, and the host's own file system tools and
//! fio with the libraries they need.

use crate::{Programs, Result, process, programs};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Programs that tests run in the guest.
const TOOLS: [&str; 8] =
    ["fio", "mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "sfdisk", "fstrim", "blkdiscard"];
/// Kernel modules the guest needs; those that they depend on come along.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "xfs"];

/// A kernel and an initramfs to boot.
#[derive(Debug, Clone)]
pub struct Kit {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial file system, a cpio archive.
    pub initramfs: PathBuf,
}

impl Kit {
    /// Finds the kernel and packs the initramfs.
    pub fn prepare(programs: &Programs) -> Result<Kit> {
        let root = programs::guest_dir().join("kernel");
        let kernel = newest(&root.join("boot"), "vmlinuz-")
            .ok_or("no guest kernel; `cargo xtask setup` fetches one")?;
        let modules = newest(&root.join("lib/modules"), "")
            .or_else(|| newest(&root.join("usr/lib/modules"), ""))
            .ok_or("the guest kernel has no modules")?;
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        archive.program(&programs.guest_agent, "init")?;
        for tool in TOOLS {
            archive.program(&programs::find(tool)?, &format!("usr/bin/{tool}"))?;
        }
        archive.file("etc/mke2fs.conf", 0o644, &std::fs::read("/etc/mke2fs.conf")?);
        let mut order = Vec::new();
        for module in MODULES {
            archive.module(&modules, module, &mut order)?;
        }
        archive.file("modules/order", 0o644, order.join("\n").as_bytes());
        let initramfs = programs::guest_dir().join("initramfs.cpio");
        let unfinished = initramfs.with_extension(format!("cpio.{}", std::process::id()));
        std::fs::write(&unfinished, archive.finish())?;
        std::fs::rename(&unfinished, &initramfs)?;
        Ok(Kit { kernel, initramfs })
    }
}

fn newest(dir: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    entries.filter(named).max()
}

/// A cpio archive in the format `newc`, which the kernel unpacks as its first file system.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Archive {
    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.parents(name);
        self.entry(name, 0o100_000 | mode, content, (0, 0));
    }

    fn directory(&mut self, name: &str) {
        self.parents(name);
        self.entry(name, 0o040_755, &[], (0, 0));
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, &[], (major, minor));
    }

    fn parents(&mut self, name: &str) {
        let ends: Vec<usize> = name.match_indices('/').map(|(at, _)| at).collect();
        for end in ends {
            self.entry(&name[..end], 0o040_755, &[], (0, 0));
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        if self.names.insert(name.to_owned()) {
            let number = self.names.len() as u32;
            self.record(number, name, mode, content, device);
        }
    }

    fn record(&mut self, inode: u32, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        let (major, minor) = device;
        // inode, mode, uid, gid, links, mtime, size, dev (2), rdev (2), name size, check
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A program together with the shared libraries that the host would load for it.
    fn program(&mut self, path: &Path, name: &str) -> Result<()> {
        self.file(name, 0o755, &std::fs::read(path)?);
        let listing = process::output(Command::new("ldd").arg(path))
            .map_err(|error| format!("libraries of {}: {error}", path.display()))?;
        for line in listing.lines() {
            let file = line.split_whitespace().find(|word| word.starts_with('/'));
            let Some(file) = file.map(|file| file.trim_start_matches('/')) else { continue };
            if !self.names.contains(file) {
                self.file(file, 0o755, &std::fs::read(Path::new("/").join(file))?);
            }
        }
        Ok(())
    }

    /// A kernel module after those it depends on. One that is built into the kernel needs nothing.
    fn module(&mut self, root: &Path, name: &str, order: &mut Vec<String>) -> Result<()> {
        let same = |other: &str| other.replace('-', "_") == name.replace('-', "_");
        if order.iter().any(|file| same(file.trim_end_matches(".ko"))) {
            return Ok(());
        }
        let Some(path) = find_module(&root.join("kernel"), &same)? else {
            let built_in = std::fs::read_to_string(root.join("modules.builtin"))?;
            let stems = built_in.lines().filter_map(|line| Path::new(line).file_stem());
            if stems.map(|stem| stem.to_string_lossy()).any(|stem| same(&stem)) {
                return Ok(());
            }
            return Err(format!("the guest kernel has no module {name}").into());
        };
        let content = module_content(&path)?;
        for dependency in dependencies(&content) {
            self.module(root, &dependency, order)?;
        }
        let file = format!("{name}.ko");
        self.file(&format!("modules/{file}"), 0o644, &content);
        order.push(file);
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.record(0, "TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

fn find_module(dir: &Path, same: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find_module(&path, same)? {
                return Ok(Some(found));
            }
        } else if let Some(file) = path.file_name() {
            let file = file.to_string_lossy();
            if file.split_once(".ko").is_some_and(|(stem, _)| same(stem)) {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

/// The module itself; newer distributions keep it compressed.
fn module_content(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().map(|e| e.to_string_lossy().into_owned()).as_deref() {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(std::fs::read(path)?),
    };
    let output = Command::new(programs::find(tool)?).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        return Err(format!("cannot unpack {}", path.display()).into());
    }
    Ok(output.stdout)
}

/// The names after `depends=` in the module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
