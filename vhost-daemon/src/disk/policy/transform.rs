//! Requests that are turned into others: discards into nothing, writes of zeroes into write-zeroes.

use crate::disk::policy::{DetectZeroes, Discard};
use crate::disk::{Finished, Port, Submission};
use crate::io::lone::LoneCalls;
use exd_image::Request;

/// See the module.
pub struct TransformPort {
    port: Box<dyn Port>,
    discard: Discard,
    detect_zeroes: DetectZeroes,
}

impl TransformPort {
    /// Around `port`.
    pub fn new(port: Box<dyn Port>, discard: Discard, detect_zeroes: DetectZeroes) -> Self {
        TransformPort { port, discard, detect_zeroes }
    }

    fn transform(&self, submission: &mut Submission) {
        match &mut submission.request {
            Request::Write { offset, len, durable } if self.detect_zeroes != DetectZeroes::Off => {
                let buffer = submission.buffer.as_ref();
                if buffer.is_some_and(|buffer| buffer.is_zero()) {
                    submission.request = Request::WriteZeroes {
                        offset: *offset,
                        len: *len,
                        unmap: self.detect_zeroes == DetectZeroes::Unmap,
                        durable: *durable,
                    };
                    submission.buffer = None;
                }
            }
            Request::WriteZeroes { unmap, .. } if self.discard == Discard::Ignore => *unmap = false,
            _ => {}
        }
    }
}

impl Port for TransformPort {
    fn submit(&mut self, batch: &mut Vec<Submission>, finished: &mut Vec<Finished>) {
        if self.discard == Discard::Ignore {
            batch.retain(|submission| {
                let ignored = matches!(submission.request, Request::Discard { .. });
                if ignored {
                    finished.push((submission.id, Ok(())));
                }
                !ignored
            });
        }
        for submission in batch.iter_mut() {
            self.transform(submission);
        }
        if !batch.is_empty() {
            self.port.submit(batch, finished);
        }
    }

    fn reap(&mut self, finished: &mut Vec<Finished>) -> bool {
        self.port.reap(finished)
    }

    fn intercept(&mut self, finished: &mut Vec<Finished>) {
        self.port.intercept(finished);
    }

    fn hurry(&mut self, hurry: bool) {
        self.port.hurry(hurry);
    }

    fn lone_calls(&mut self) -> Option<&mut LoneCalls> {
        self.port.lone_calls()
    }

    fn unfinished(&self) -> usize {
        self.port.unfinished()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::policy::tests::{ScriptPort, submission};
    use crate::queue::memory::GuestBuffer;
    use crate::queue::memory::tests::{memory, piece};
    use std::sync::Arc;

    #[test]
    fn ignored_discards_change_nothing() {
        let script = ScriptPort::default();
        let mut port =
            TransformPort::new(Box::new(script.clone()), Discard::Ignore, DetectZeroes::Off);
        let zeroes = |unmap| Request::WriteZeroes { offset: 0, len: 512, unmap, durable: false };
        let mut batch = vec![
            submission(1, Request::Discard { offset: 0, len: 4096 }),
            submission(2, zeroes(true)),
            submission(3, Request::Flush),
        ];
        let mut finished = Vec::new();
        port.submit(&mut batch, &mut finished);
        assert!(batch.is_empty());
        assert_eq!(finished.len(), 1);
        let seen: Vec<Request> = script.take().into_iter().map(|(_, request)| request).collect();
        assert_eq!(seen, [zeroes(false), Request::Flush]);
    }

    #[test]
    fn writes_of_zeroes_are_found() {
        for (mode, unmap) in [(DetectZeroes::On, false), (DetectZeroes::Unmap, true)] {
            let script = ScriptPort::default();
            let mut port = TransformPort::new(Box::new(script.clone()), Discard::Unmap, mode);
            let pieces = [piece(0x101, 5000, false), piece(0x10_0000, 3192, false)];
            let buffer = Arc::new(GuestBuffer::new(memory(), &pieces).expect("in memory"));
            let write = Request::Write { offset: 512, len: 8192, durable: true };
            let mut run = || {
                let buffer = Some(buffer.clone());
                let mut batch = vec![Submission { buffer, ..submission(1, write) }];
                port.submit(&mut batch, &mut Vec::new());
                script.take().remove(0).1
            };
            let zeroes = Request::WriteZeroes { offset: 512, len: 8192, unmap, durable: true };
            assert_eq!(run(), zeroes);
            for at in [0, 4999, 5000, 8191] {
                buffer.copy_from(at, &[1]);
                assert_eq!(run(), write, "{at}");
                buffer.copy_from(at, &[0]);
            }
        }
    }
}
