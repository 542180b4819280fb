//! What one test with a guest works with.

use crate::guest::Machine;
use crate::{Disk, Format, Guest, Kit, Programs, Result, programs};
use std::path::PathBuf;
use std::sync::OnceLock;

/// Bytes of a disk.
pub const DISK_BYTES: u64 = 1024 << 20;

/// The programs, the guest's kit and a directory that goes away unless the test fails.
#[derive(Debug)]
pub struct World {
    /// The programs under test.
    pub programs: Programs,
    /// The guest's kernel and initramfs.
    pub kit: Kit,
    /// Everything that the test leaves.
    pub dir: PathBuf,
    /// What disks are made of.
    pub format: Format,
}

impl World {
    /// For the test of this name.
    pub fn new(name: &str, format: Format) -> Result<World> {
        static KIT: OnceLock<std::result::Result<(Programs, Kit), String>> = OnceLock::new();
        let prepare = || {
            let programs = Programs::build()?;
            let kit = Kit::prepare(&programs)?;
            Ok((programs, kit))
        };
        let prepared = KIT.get_or_init(|| prepare().map_err(|e: crate::Error| e.to_string()));
        let (programs, kit) = prepared.clone()?;
        let dir = programs::guest_dir().join("run").join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        Ok(World { programs, kit, dir, format })
    }

    /// A new disk, served.
    pub fn disk(&self, name: &str) -> Result<Disk> {
        let mut disk = self.idle_disk(name)?;
        disk.serve()?;
        Ok(disk)
    }

    /// A new disk that nobody serves yet.
    pub fn idle_disk(&self, name: &str) -> Result<Disk> {
        Disk::create(&self.programs, &self.dir, name, self.format, DISK_BYTES)
    }

    /// A machine with these disks.
    pub fn boot(&self, disks: &[&Disk], queues: u32) -> Result<Guest> {
        Guest::boot(&self.kit, &self.dir, disks, queues)
    }

    /// A machine of this name with these disks and a queue for each of its two processors, which starts
    /// meanwhile.
    pub fn power_on(&self, name: &str, disks: &[&Disk], machine: Machine) -> Result<Guest> {
        Guest::power_on(&self.kit, &self.dir, name, disks, 2, machine)
    }

    /// The orderly end of a test: the daemons end cleanly and their images are without fault.
    pub fn finish(self, disks: Vec<Disk>) -> Result<()> {
        for mut disk in disks {
            disk.stop()?;
            disk.check()?;
        }
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }
}
