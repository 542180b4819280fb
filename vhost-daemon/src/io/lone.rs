//! Calls that a thread makes itself, and waits for.
//!
//! Through io_uring a thread learns of an end by way of its event, and a sync is done by a worker thread of
//! the kernel besides: two changes of threads, which on a busy host can cost more than the sync. A thread that
//! has nothing to do until the call returns can as well make it itself. What its guest asks for meanwhile
//! has to wait, though. So it does that only while its guest waits for one request and no other, nobody waits
//! for ends that the thread has in hand, and less and less often where that turns out to be a bad guess:
//! because requests had come meanwhile, or because the call took long.

use std::time::Duration;

/// Longer calls keep waiting what may come meanwhile. How they are made is no great part of them either.
const LONG: Duration = Duration::from_millis(2);
/// So many are made the other way after a bad guess; twice as many after each that follows, ...
const SKIPPED_MIN: u32 = 8;
/// ... up to this. Where one guess in six is bad, none of both wins.
const SKIPPED_MAX: u32 = 1024;

/// When a thread makes its calls itself.
#[derive(Clone, Debug, Default)]
pub struct LoneCalls {
    /// The thread has one request in hand.
    alone: bool,
    /// How long the last one took, of which nobody has said yet whether it kept anybody waiting.
    lasted: Option<Duration>,
    /// Good occasions still to be left out.
    skip: u32,
    /// How many were left out last.
    skipped: u32,
}

impl LoneCalls {
    /// The thread's guests wait for one request and no more.
    pub fn set_alone(&mut self, alone: bool) {
        self.alone = alone;
    }

    /// The thread is to make the call that it is about to hand over. Nothing else of its is under way.
    pub fn is_wanted(&mut self) -> bool {
        if self.alone && self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.alone
    }

    /// The thread has made a call.
    pub fn returned(&mut self, after: Duration) {
        self.lasted = Some(after);
    }

    /// To be asked when a call may have returned: if one has, `came` says whether there are requests that
    /// came meanwhile.
    pub fn judge(&mut self, came: impl FnOnce() -> bool) {
        let Some(lasted) = self.lasted.take() else { return };
        if lasted > LONG || came() {
            self.refused();
        } else {
            self.skipped -= self.skipped.div_ceil(8);
        }
    }

    /// It was a bad guess, or the call cannot be made so.
    pub fn refused(&mut self) {
        self.skipped = (2 * self.skipped).clamp(SKIPPED_MIN, SKIPPED_MAX);
        self.skip = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(100);

    /// Whether each of the next calls is made by the thread; if so, it lasts and ends as said.
    fn next(lone: &mut LoneCalls, count: usize, lasts: Duration, came: bool) -> Vec<bool> {
        let mut next = || {
            let wanted = lone.is_wanted();
            if wanted {
                lone.returned(lasts);
            }
            lone.judge(|| came);
            wanted
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn only_if_nothing_else_is_waited_for() {
        let mut lone = LoneCalls::default();
        assert!(!lone.is_wanted());
        lone.set_alone(true);
        assert!(lone.is_wanted());
        lone.set_alone(false);
        assert!(!lone.is_wanted());
    }

    #[test]
    fn bad_guesses_become_rare_and_are_forgiven() {
        for (lasts, came) in [(SHORT, true), (2 * LONG, false)] {
            let mut lone = LoneCalls::default();
            lone.set_alone(true);
            assert_eq!(next(&mut lone, 100, SHORT, false), [true; 100]);
            let guesses = next(&mut lone, 10_000, lasts, came);
            let taken = guesses.iter().filter(|taken| **taken).count();
            assert!((10..20).contains(&taken), "{taken} of 10,000");
            assert!(guesses[0] && !guesses[1..9].contains(&true) && guesses[9]);
            // As soon as one is good, it takes a few more until all are taken again.
            let guesses = next(&mut lone, 10_000, SHORT, false);
            assert_eq!(guesses[2000..], [true; 8000]);
        }
    }
}
