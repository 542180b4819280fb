//! On which processors a disk's threads run.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::io;
use std::str::FromStr;

/// A list of processors, such as `0-3,8`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuList(Vec<usize>);

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<CpuList, String> {
        let number = |text: &str| match text.trim().parse::<usize>() {
            Ok(cpu) if cpu < CpuSet::count() => Ok(cpu),
            _ => Err(format!("'{text}' is no processor number")),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(format!("'{part}' ends before it begins"));
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(CpuList(cpus))
    }
}

impl CpuList {
    /// Keeps the calling thread, and all that it starts from now on, on these processors.
    pub fn apply(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        for cpu in &self.0 {
            set.set(*cpu)?;
        }
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let parse = |text: &str| text.parse::<CpuList>().map(|list| list.0);
        assert_eq!(parse("3"), Ok(vec![3]));
        assert_eq!(parse("8,0-2, 1"), Ok(vec![0, 1, 2, 8]));
        for wrong in ["", "a", "3-1", "1,,2", "-1", "99999", "0-99999"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
