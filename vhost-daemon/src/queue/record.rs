//! Records what the guest asks for, so that it can be replayed.
//!
//! The queue threads put events into a channel of bounded size and never wait: what does not fit is lost
//! and counted. A thread of its own writes them. Errors of the file end the recording, not the guest's
//! requests.
//!
//! The format is text, a line for each event, in the order of events: `R`, `W`, `Z`, `D` with first sector
//! and number of sectors (read, write, write zeroes, discard) and `F` (flush) when a request is fetched
//! from its ring; `E n` when request number n, counted from 0 in the order of the lines, has ended;
//! `M n` where n requests were lost. `V 2`, the first line, tells it from traces without ends.

use crate::queue::request::Command;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Events that wait for the writing thread: some megabytes, and a second of anything but a benchmark.
const EVENTS_MAX: usize = 64 << 10;
/// A trace does not grow beyond this.
const FILE_MAX: u64 = 1 << 30;
/// What was recorded is in the file after this time.
const PAUSE: Duration = Duration::from_millis(200);
const SECTOR: u64 = 512;

const HEADER: &str = "\
# Block requests of a guest, recorded by vhost-daemon.
# R, W, Z, D (read, write, write zeroes, discard) first-sector sectors; F (flush); in the order they came.
# E n: request n, counted from 0, has ended. M n: n requests could not be recorded.
V 2
";

/// A request by its queue and head; unique among those in flight.
type Key = (u16, u16);

enum Event {
    Begin(Key, char, u64, u64),
    End(Key),
    Finish,
}

/// See the module.
#[derive(Debug)]
pub struct Recorder {
    events: SyncSender<Event>,
    lost: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Begins a recording. The file is made anew.
    pub fn create(path: &Path) -> io::Result<Recorder> {
        let file = File::create(path)?;
        let (events, received) = sync_channel(EVENTS_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            output: BufWriter::with_capacity(1 << 20, file),
            left: FILE_MAX,
            next: 0,
            in_flight: HashMap::new(),
            lost: lost.clone(),
        };
        let path = path.to_owned();
        let thread = thread::Builder::new().name("recorder".to_owned()).spawn(move || {
            if let Err(error) = writer.run(&received) {
                log::warn!("{}: recording ends here: {error}", path.display());
            }
        })?;
        Ok(Recorder { events, lost, thread: Mutex::new(Some(thread)) })
    }

    /// A request was fetched.
    pub fn begin(&self, queue: u16, head: u16, command: &Command) {
        let send = |kind, offset: u64, len: u64| {
            self.send(Event::Begin((queue, head), kind, offset / SECTOR, len / SECTOR));
        };
        match command {
            Command::Read { offset, buffer } => send('R', *offset, buffer.len()),
            Command::Write { offset, buffer } => send('W', *offset, buffer.len()),
            Command::Flush => send('F', 0, 0),
            Command::Discard(ranges) => {
                ranges.iter().for_each(|range| send('D', range.offset, range.len));
            }
            Command::WriteZeroes(ranges) => {
                ranges.iter().for_each(|range| send('Z', range.offset, range.len));
            }
        }
    }

    /// A request has ended.
    pub fn end(&self, queue: u16, head: u16) {
        self.send(Event::End((queue, head)));
    }

    fn send(&self, event: Event) {
        // With no receiver the recording has ended already.
        if let Err(TrySendError::Full(Event::Begin(..))) = self.events.try_send(event) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything is in the file. Nothing is recorded after that.
    pub fn finish(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        // Fails if the recording has ended already.
        let _ = self.events.send(Event::Finish);
        if thread.join().is_err() {
            log::warn!("the recording has failed");
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Writer<W: Write> {
    output: W,
    /// Bytes that the file may still grow by.
    left: u64,
    /// Number of the next request.
    next: u64,
    /// Numbers of the requests in flight; one with several ranges has several.
    in_flight: HashMap<Key, Range<u64>>,
    lost: Arc<AtomicU64>,
}

impl<W: Write> Writer<W> {
    fn run(mut self, events: &Receiver<Event>) -> io::Result<()> {
        self.line(HEADER)?;
        loop {
            match events.recv_timeout(PAUSE) {
                Ok(Event::Begin(key, kind, sector, count)) => {
                    self.begin(key, kind, sector, count)?
                }
                Ok(Event::End(key)) => self.end(key)?,
                Err(RecvTimeoutError::Timeout) => self.output.flush()?,
                Ok(Event::Finish) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.note_lost()?;
        self.output.flush()
    }

    fn begin(&mut self, key: Key, kind: char, sector: u64, count: u64) -> io::Result<()> {
        self.note_lost()?;
        match self.in_flight.get_mut(&key) {
            // A further range of the same request.
            Some(numbers) if matches!(kind, 'D' | 'Z') && numbers.end == self.next => {
                numbers.end += 1;
            }
            // Its end was lost, or the connection was.
            Some(_) => {
                self.end(key)?;
                self.in_flight.insert(key, self.next..self.next + 1);
            }
            None => {
                self.in_flight.insert(key, self.next..self.next + 1);
            }
        }
        self.next += 1;
        match kind {
            'F' => self.line("F\n"),
            _ => self.line(&format!("{kind} {sector} {count}\n")),
        }
    }

    fn end(&mut self, key: Key) -> io::Result<()> {
        for number in self.in_flight.remove(&key).into_iter().flatten() {
            self.line(&format!("E {number}\n"))?;
        }
        Ok(())
    }

    fn note_lost(&mut self) -> io::Result<()> {
        match self.lost.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            lost => self.line(&format!("M {lost}\n")),
        }
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        let left = self.left.checked_sub(text.len() as u64);
        self.left = left.ok_or_else(|| io::Error::other("the trace has become too large"))?;
        self.output.write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(left: u64) -> Writer<Vec<u8>> {
        let lost = Arc::new(AtomicU64::new(0));
        Writer { output: Vec::new(), left, next: 0, in_flight: HashMap::new(), lost }
    }

    #[test]
    fn events_become_lines() {
        let mut writer = writer(1000);
        writer.begin((0, 1), 'W', 63, 8).expect("written");
        writer.begin((1, 1), 'D', 0, 8).expect("written");
        writer.begin((1, 1), 'D', 16, 8).expect("written");
        writer.end((0, 1)).expect("written");
        writer.end((0, 1)).expect("nothing to write");
        writer.lost.store(2, Ordering::Relaxed);
        writer.begin((0, 1), 'F', 0, 0).expect("written");
        writer.end((1, 1)).expect("written");
        // The end of the flush was lost: the head comes again.
        writer.begin((0, 1), 'R', 1, 1).expect("written");
        let text = String::from_utf8(writer.output).expect("text");
        assert_eq!(text, "W 63 8\nD 0 8\nD 16 8\nE 0\nM 2\nF\nE 1\nE 2\nE 3\nR 1 1\n");
    }

    #[test]
    fn a_trace_does_not_grow_without_end() {
        let mut writer = writer(10);
        writer.begin((0, 1), 'W', 0, 8).expect("there is room");
        assert!(writer.begin((0, 2), 'W', 8, 8).is_err());
    }

    #[test]
    fn a_file_that_takes_nothing_ends_the_recording_only() {
        let recorder = Recorder::create(Path::new("/dev/full")).expect("it can be opened");
        for head in 0..1000 {
            recorder.begin(0, head, &Command::Flush);
            recorder.end(0, head);
        }
        recorder.finish();
        recorder.begin(0, 0, &Command::Flush);
    }
}
