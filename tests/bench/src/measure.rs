//! What a run costs the machine: CPU, bytes, flushes.

use crate::Result;
use nix::sys::stat::{major, minor, stat};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Between two looks at a back-end that may still be at work.
const LOOK_EVERY: Duration = Duration::from_millis(4);
/// How long its end is waited for.
const IDLE_PATIENCE: Duration = Duration::from_secs(20);
/// CPU time between two looks that still counts as idle: timers.
const IDLE_CPU: u64 = 400_000;

/// The block device under a directory.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its `stat` file in sysfs; `None` for file systems in memory.
    stat: Option<PathBuf>,
    /// Its name, for people.
    pub name: String,
}

impl Device {
    /// The device that holds `dir`. A partition does not count flushes, so its disk is taken.
    pub fn of(dir: &Path) -> Result<Device> {
        let number = stat(dir)?.st_dev;
        let link = format!("/sys/dev/block/{}:{}", major(number), minor(number));
        let Ok(mut place) = fs::canonicalize(link) else {
            return Ok(Device { stat: None, name: "none".into() });
        };
        if place.join("partition").exists() {
            place.pop();
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Device { stat: Some(place.join("stat")), name })
    }

    /// Bytes written and flushes so far (Documentation/block/stat.rst, fields 7 and 16).
    fn counts(&self) -> (u64, u64) {
        let text = self.stat.as_ref().and_then(|path| fs::read_to_string(path).ok());
        let text = text.unwrap_or_default();
        let field = |number: usize| {
            text.split_whitespace().nth(number - 1).and_then(|field| field.parse::<u64>().ok())
        };
        (field(7).unwrap_or(0) * 512, field(16).unwrap_or(0))
    }
}

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// CPU time of the back-end with all its threads, ns.
    daemon_cpu: u64,
    /// CPU time of kernel threads, ns.
    kernel_cpu: u64,
    /// CPU time of everything on the machine, ns.
    machine_cpu: u64,
    /// Bytes the back-end has had written by the file system.
    daemon_bytes: u64,
    /// Bytes the device has written.
    device_bytes: u64,
    /// Flushes of the device.
    device_flushes: u64,
}

/// Differences of counters: the cost of a run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time of the back-end with all its threads, s.
    pub daemon_cpu: f64,
    /// CPU time of kernel threads, s, whoever they worked for.
    pub kernel_cpu: f64,
    /// CPU time of everything on the machine, s: the client and strangers too.
    pub machine_cpu: f64,
    /// Bytes the back-end has had written by the file system.
    pub daemon_bytes: u64,
    /// Bytes the device has written, whoever caused them.
    pub device_bytes: u64,
    /// Flushes of the device, whoever caused them.
    pub device_flushes: u64,
}

impl Counters {
    /// Reads them for a back-end and the device its image is on.
    pub fn read(pid: u32, device: &Device) -> Counters {
        let (device_bytes, device_flushes) = device.counts();
        Counters {
            daemon_cpu: daemon_cpu(pid),
            kernel_cpu: kernel_cpu(),
            machine_cpu: machine_cpu(),
            daemon_bytes: daemon_bytes(pid),
            device_bytes,
            device_flushes,
        }
    }

    /// What was spent since `before`.
    pub fn since(&self, before: &Counters) -> Cost {
        let seconds = |now: u64, then: u64| now.saturating_sub(then) as f64 / 1e9;
        Cost {
            daemon_cpu: seconds(self.daemon_cpu, before.daemon_cpu),
            kernel_cpu: seconds(self.kernel_cpu, before.kernel_cpu),
            machine_cpu: seconds(self.machine_cpu, before.machine_cpu),
            daemon_bytes: self.daemon_bytes.saturating_sub(before.daemon_bytes),
            device_bytes: self.device_bytes.saturating_sub(before.device_bytes),
            device_flushes: self.device_flushes.saturating_sub(before.device_flushes),
        }
    }
}

fn daemon_cpu(pid: u32) -> u64 {
    let time = clock_getcpuclockid(Pid::from_raw(pid as i32)).and_then(|clock| clock.now());
    time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

fn daemon_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Most memory that a process has had, in bytes.
pub fn memory(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// A clock tick of /proc: Linux shows them in hundredths of a second on every machine.
const TICK_NS: u64 = 10_000_000;

/// User, nice, system, irq and softirq time of all processors.
fn machine_cpu() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line.split_whitespace().skip(1).flat_map(str::parse).collect();
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|index| fields.get(*index));
    busy.sum::<u64>() * TICK_NS
}

/// All children of the kernel's thread 2.
fn kernel_cpu() -> u64 {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let text = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // After the name, which may contain anything: state, parent, and at 11 and 12 the times.
        let Some((_, rest)) = text.rsplit_once(')') else { continue };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        if fields.get(1) == Some(&"2") {
            let times = fields.iter().skip(11).take(2);
            ticks += times.flat_map(|field| field.parse::<u64>()).sum::<u64>();
        }
    }
    ticks * TICK_NS
}

/// Waits until the back-end has neither computed nor written for `quiet`, and returns when it last did.
/// Background work thus counts, and the waiting for its absence does not.
pub fn wait_until_idle(pid: u32, quiet: Duration) -> Instant {
    let begun = Instant::now();
    let mut last = begun;
    let mut seen = (daemon_cpu(pid), daemon_bytes(pid));
    loop {
        sleep(LOOK_EVERY);
        let now = (daemon_cpu(pid), daemon_bytes(pid));
        if now.1 != seen.1 || now.0.saturating_sub(seen.0) > IDLE_CPU {
            last = Instant::now();
        }
        seen = now;
        if last.elapsed() >= quiet || begun.elapsed() >= IDLE_PATIENCE {
            return last;
        }
    }
}
