//! Where things are: the workspace, its target directory, the programs under test.

use crate::{Result, process};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The programs under test, built in release mode.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The image tool.
    pub imgtool: PathBuf,
    /// The daemon.
    pub vhost_daemon: PathBuf,
    /// The first process of the guest.
    pub guest_agent: PathBuf,
}

impl Programs {
    /// Builds the programs if that is due (cargo decides) and says where they are. With `EXD_BIN_DIR`
    /// set, takes what is there and builds nothing.
    pub fn build() -> Result<Programs> {
        if let Some(dir) = std::env::var_os("EXD_BIN_DIR") {
            return Ok(Programs::in_dir(Path::new(&dir)));
        }
        static BUILT: OnceLock<std::result::Result<(), String>> = OnceLock::new();
        BUILT
            .get_or_init(|| {
                let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
                let mut command = Command::new(cargo);
                command.current_dir(workspace()).args(["build", "--quiet", "--release"]);
                command.args(["-p", "imgtool", "-p", "vhost-daemon"]);
                command.args(["-p", "exd-guest-tests", "--bins"]);
                process::output(&mut command).map(|_| ()).map_err(|error| error.to_string())
            })
            .clone()?;
        Ok(Programs::in_dir(&target().join("release")))
    }

    fn in_dir(dir: &Path) -> Programs {
        Programs {
            imgtool: dir.join("imgtool"),
            vhost_daemon: dir.join("vhost-daemon"),
            guest_agent: dir.join("guest-agent"),
        }
    }
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest)
}

/// cargo's target directory.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The place of everything about the guest: kernel, initramfs, images, logs.
pub fn guest_dir() -> PathBuf {
    target().join("guest")
}

/// Finds a program of the host, also in the directories that only root has in its path.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = dirs.map(|dir| dir.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format!("{name} is not installed; `cargo xtask setup` installs it").into())
}
