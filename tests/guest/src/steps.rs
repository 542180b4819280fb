//! Steps that the tests and the demonstration take in the guest.

use crate::{Guest, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;

/// A file system of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// The kernel's name for it.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// Makes one; mkfs discards the partition first.
    pub fn make(self, guest: &mut Guest, partition: &str) -> Result<()> {
        let force = if self == FileSystem::Ext4 { "-F" } else { "-f" };
        let program = format!("mkfs.{}", self.name());
        guest.run(&[&program, "-q", force, partition]).map(|_| ())
    }

    /// Checks one that is not mounted, without repairing anything; damage is an error.
    pub fn check(self, guest: &mut Guest, partition: &str) -> Result<()> {
        match self {
            FileSystem::Ext4 => guest.run(&["e2fsck", "-fn", partition]).map(|_| ()),
            FileSystem::Xfs => guest.run(&["xfs_repair", "-n", partition]).map(|_| ()),
        }
    }

    /// Mounts one at `dir`, which replays its log if need be.
    pub fn mount(self, guest: &mut Guest, partition: &str, dir: &str) -> Result<()> {
        let kind = self.name();
        let request = json!({ "op": "mount", "source": partition, "target": dir, "kind": kind });
        guest.call(request).map(|_| ())
    }
}

/// Writes `count` files from number `first` on, each fsynced.
pub fn write_files(guest: &mut Guest, dir: &str, first: u64, count: u64) -> Result<()> {
    let request = json!({ "op": "write_files", "dir": dir, "first": first, "count": count });
    guest.call_with_events(request, |_| true).map(|_| ())
}

/// Unmounts what is mounted at `dir`.
pub fn unmount(guest: &mut Guest, dir: &str) -> Result<()> {
    guest.call(json!({ "op": "umount", "target": dir })).map(|_| ())
}

/// Writes a partition table with one partition: `sectors` from sector `start`.
pub fn partition(guest: &mut Guest, disk: &str, start: u64, sectors: u64) -> Result<()> {
    let table = format!("label: dos\nstart={start}, size={sectors}\n");
    guest.run_with_input(&["sfdisk", "--quiet", "--wipe", "always", disk], &table).map(|_| ())
}

/// What fio measured. Emulated processors: the numbers say that it ran, not how fast the disk is.
#[derive(Debug, Clone, Copy)]
pub struct Fio {
    /// KiB written, and read back and verified.
    pub kib: u64,
    /// Writes per second.
    pub write_iops: u64,
}

impl fmt::Display for Fio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB, {} writes/s", self.kib, self.write_iops)
    }
}

/// fio: random direct asynchronous writes at depth 32, then everything read back by its checksum.
pub fn fio(guest: &mut Guest, path: &str, block: &str, size: &str) -> Result<Fio> {
    let (path, block) = (format!("--filename={path}"), format!("--bs={block}"));
    let size = format!("--size={size}");
    let mut argv = vec!["fio", "--name=verify", "--ioengine=libaio", "--direct=1", "--iodepth=32"];
    argv.extend(["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--minimal"]);
    argv.extend([path.as_str(), block.as_str(), size.as_str()]);
    let output = guest.run(&argv)?;
    let line = output.lines().find(|line| line.starts_with("3;")).unwrap_or_default();
    let fields: Vec<&str> = line.split(';').collect();
    let number = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok());
    // Terse format, version 3: error 4, KiB read 5, KiB written 46, writes per second 48.
    let (error, read, written, write_iops) = (number(4), number(5), number(46), number(48));
    match (error, read, written, write_iops) {
        (Some(0), Some(read), Some(kib), Some(write_iops)) if kib > 0 && read >= kib => {
            Ok(Fio { kib, write_iops })
        }
        _ => Err(format!("fio did not verify what it wrote:\n{output}").into()),
    }
}

/// Has the guest write files from number `first` on, each fsynced, and stops listening after `count` of
/// them: the guest is then at work on the next, and good for nothing else. Returns the number of files that are known to be durable.
pub fn write_files_until(
    guest: &mut Guest,
    dir: &str,
    first: u64,
    count: u64,
    mut progress: impl FnMut(u64),
) -> Result<u64> {
    let request = json!({ "op": "write_files", "dir": dir, "first": first, "count": 1_000_000 });
    let mut durable = first;
    guest.call_with_events(request, |event| {
        durable = event["synced"].as_u64().map_or(durable, |number| number + 1);
        progress(durable);
        durable < first + count
    })?;
    Ok(durable)
}

/// Reads the first `count` files and compares every byte. Returns the number of bytes.
pub fn verify_files(guest: &mut Guest, dir: &str, count: u64) -> Result<u64> {
    let answer = guest.call(json!({ "op": "verify_files", "dir": dir, "count": count }))?;
    answer["bytes"].as_u64().ok_or_else(|| format!("no byte count in {answer}").into())
}

/// What the guest knows to be on a region of the disk: for each sector the last write completed there.
#[derive(Debug, Default)]
pub struct Acknowledged {
    sectors: BTreeMap<u64, u64>,
    /// Writes that the disk has completed.
    pub writes: u64,
    /// Bytes of these writes.
    pub bytes: u64,
}

impl Acknowledged {
    /// Takes an event of the `acked` pattern.
    pub fn record(&mut self, event: &Value) {
        for write in event["acked"].as_array().into_iter().flatten() {
            let number = |index: usize| write[index].as_u64().unwrap_or_default();
            let (first, count, generation) = (number(0), number(1), number(2));
            self.writes += 1;
            self.bytes += count * 512;
            for sector in first..first + count {
                let last = self.sectors.entry(sector).or_default();
                *last = generation.max(*last);
            }
        }
    }

    /// Reads the region and compares: a sector may be newer than its last acknowledged write, if that
    /// newer write was in flight at the death, but never older, and never anything else.
    pub fn verify(&self, guest: &mut Guest, path: &str, start: u64, length: u64) -> Result<u64> {
        let mut wrong = Vec::new();
        let mut seen = 0;
        let request = json!({ "op": "scan", "path": path, "start": start, "length": length });
        guest.call_with_events(request, |event| {
            for run in event["runs"].as_array().into_iter().flatten() {
                let (first, count) = (run[0].as_u64(), run[1].as_u64());
                let (first, count) = (first.unwrap_or_default(), count.unwrap_or_default());
                let found = run[2].as_i64().unwrap_or(-1);
                seen += count;
                for sector in first..first + count {
                    let least = self.sectors.get(&sector).copied().unwrap_or(0);
                    if found < least as i64 {
                        wrong.push(format!("sector {sector}: {found}, acknowledged {least}"));
                    }
                }
            }
            true
        })?;
        if seen != length / 512 {
            return Err(format!("{seen} of {} sectors were read", length / 512).into());
        }
        match wrong.first() {
            None => Ok(self.sectors.len() as u64),
            Some(first) => Err(format!("{} sectors are wrong; {first}", wrong.len()).into()),
        }
    }
}
