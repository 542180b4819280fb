//! When an idle image is defragmented: which part of the disk is next, if any.

use std::time::{Duration, Instant};

/// Bytes of the disk that are looked at in one step. A guest that comes back meanwhile shares the disk
/// with at most one step.
const STEP: u64 = 16 << 20;

/// Goes through the disk while nobody uses it, and rests until something was written again.
#[derive(Debug)]
pub struct Tidy {
    /// So long without requests counts as idle; `None`: never.
    patience: Option<Duration>,
    /// Requests seen so far, and since when there were no more.
    activity: u64,
    quiet_since: Instant,
    /// Where the next step begins.
    position: u64,
    /// What had been written when the last pass began, once it has ended.
    passed: Option<u64>,
    began_at: u64,
    under_way: bool,
}

impl Tidy {
    /// After `patience` without requests.
    pub fn new(patience: Option<Duration>) -> Tidy {
        Tidy {
            patience,
            activity: 0,
            quiet_since: Instant::now(),
            position: 0,
            passed: None,
            began_at: 0,
            under_way: false,
        }
    }

    /// The image is opened anew.
    pub fn restart(&mut self) {
        *self = Tidy::new(self.patience);
    }

    /// The step under way has ended.
    pub fn ended(&mut self) {
        self.under_way = false;
    }

    /// False if there is nothing to find out: `next` would never say anything.
    pub fn is_wanted(&self) -> bool {
        self.patience.is_some()
    }

    /// The next step (offset and length in bytes), if it is time for one: the image has had `requests`
    /// requests and `written` bytes written to it, and is `size` bytes long.
    pub fn next(
        &mut self,
        requests: u64,
        written: u64,
        size: u64,
        now: Instant,
    ) -> Option<(u64, u64)> {
        let patience = self.patience?;
        if requests != self.activity {
            (self.activity, self.quiet_since) = (requests, now);
        }
        let idle = now.saturating_duration_since(self.quiet_since) >= patience;
        if self.under_way || !idle || self.passed == Some(written) {
            return None;
        }
        if self.position >= size {
            self.passed = Some(self.began_at);
            self.position = 0;
            return None;
        }
        if self.position == 0 {
            self.began_at = written;
        }
        let offset = self.position;
        let len = STEP.min(size - offset);
        self.position += len;
        self.under_way = true;
        Some((offset, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_for_what_was_written() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut tidy = Tidy::new(Some(Duration::from_secs(5)));
        let size = STEP + 512;
        assert_eq!(tidy.next(1, 100, size, later(10)), None, "somebody was there just now");
        assert_eq!(tidy.next(1, 100, size, later(14)), None);
        assert_eq!(tidy.next(1, 100, size, later(15)), Some((0, STEP)));
        assert_eq!(tidy.next(1, 100, size, later(16)), None, "one step at a time");
        tidy.ended();
        assert_eq!(tidy.next(2, 200, size, later(17)), None, "somebody came back");
        assert_eq!(tidy.next(2, 200, size, later(22)), Some((STEP, 512)));
        tidy.ended();
        assert_eq!(tidy.next(2, 200, size, later(23)), None, "the pass has ended");
        assert_eq!(tidy.next(2, 200, size, later(24)), Some((0, STEP)), "written to meanwhile");
        tidy.ended();
        tidy.position = size;
        assert_eq!(tidy.next(2, 200, size, later(25)), None);
        assert_eq!(tidy.next(3, 200, size, later(26)), None);
        assert_eq!(tidy.next(3, 200, size, later(60)), None, "only read since");
        assert_eq!(tidy.next(3, 201, size, later(61)), Some((0, STEP)));
    }

    #[test]
    fn never_unless_wanted() {
        let mut tidy = Tidy::new(None);
        assert!(!tidy.is_wanted());
        assert_eq!(tidy.next(0, 0, 512, Instant::now() + Duration::from_secs(1000)), None);
    }
}
