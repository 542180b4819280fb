//! Messages on standard error: for people, for the journal, or as JSON.
//!
//! A guest or front-end can provoke messages as often as it likes, and it does not matter which: every
//! place in the code that writes messages has a budget, so that nobody fills the host's disk with them,
//! and a flood from one place hides nothing from another.

use crate::args::LogFormat;
use crate::events::now;
use crate::scope;
use log::kv::{Error as KvError, Key, Value as KvValue, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::Write;
use std::os::linux::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Most messages of one place in a burst, and the time in which one more becomes possible.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_secs(10);
/// The same for messages below `info`, which somebody has asked for.
const BURST_DEBUG: u32 = 1000;
const REFILL_DEBUG: Duration = Duration::from_millis(100);
/// Longest message in bytes; libraries may put what they were sent into theirs.
const MESSAGE_MAX: usize = 2048;

/// A place in the code.
type Site = (&'static str, u32);

struct Logger {
    style: Style,
    sites: Mutex<HashMap<Site, Limit>>,
    /// Several disks are served: messages name theirs.
    several: AtomicBool,
}

/// How a message is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Style {
    Text,
    /// Text with the priorities of sd-daemon(3).
    Journal,
    Json,
}

/// The budget of a place.
#[derive(Debug)]
struct Limit {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
    level: Level,
}

impl Limit {
    fn new(level: Level, now: Instant) -> Limit {
        Limit { tokens: Limit::burst(level), refilled: now, suppressed: 0, level }
    }

    fn burst(level: Level) -> u32 {
        if level <= Level::Info { BURST } else { BURST_DEBUG }
    }

    fn refill(&mut self, now: Instant) {
        let every = if self.level <= Level::Info { REFILL } else { REFILL_DEBUG };
        let elapsed = now.saturating_duration_since(self.refilled);
        let earned = u32::try_from(elapsed.as_millis() / every.as_millis()).unwrap_or(u32::MAX);
        if earned > 0 {
            self.tokens = Limit::burst(self.level).min(self.tokens.saturating_add(earned));
            self.refilled += every.saturating_mul(earned);
        }
    }

    /// Whether a message may pass, with the number of those that did not since the last one.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        self.refill(now);
        if self.tokens == 0 {
            self.suppressed += 1;
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// What is written.
struct Message<'a> {
    level: Level,
    target: &'a str,
    disk: Option<&'a str>,
    text: String,
    pairs: Map<String, Value>,
}

impl Style {
    fn chosen(format: LogFormat) -> Style {
        match format {
            LogFormat::Json => Style::Json,
            LogFormat::Text if stderr_is_the_journal() => Style::Journal,
            LogFormat::Text => Style::Text,
        }
    }

    fn render(self, message: &Message<'_>, several: bool) -> String {
        let Message { level, target, disk, text, pairs } = message;
        let level_name = level.as_str().to_ascii_lowercase();
        if self == Style::Json {
            let mut object = Map::new();
            object.insert("time".to_owned(), json!(now()));
            object.insert("level".to_owned(), json!(level_name));
            object.insert("target".to_owned(), json!(target));
            if let Some(disk) = disk {
                object.insert("disk".to_owned(), json!(disk));
            }
            object.insert("message".to_owned(), json!(text));
            for (key, value) in pairs {
                object.entry(key.clone()).or_insert_with(|| value.clone());
            }
            return format!("{}\n", Value::Object(object));
        }
        let start = match self {
            Style::Journal => format!("<{}>", priority(*level)),
            _ => format!("vhost-daemon: {level_name}: "),
        };
        let disk = match disk {
            Some(disk) if several => format!("[{disk}] "),
            _ => String::new(),
        };
        let pairs: String = pairs.iter().map(|(key, value)| format!(" {key}={value}")).collect();
        let mut lines = String::new();
        // What others have chosen cannot pretend to be a message of ours, nor drive a terminal.
        for line in format!("{text}{pairs}").lines() {
            let line: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            lines += &format!("{start}{disk}{line}\n");
        }
        lines
    }
}

/// Priorities of syslog.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Standard error is the stream that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM).
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(now) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", now.st_dev(), now.st_ino())
}

struct Pairs(Map<String, Value>);

impl<'kvs> VisitSource<'kvs> for Pairs {
    fn visit_pair(&mut self, key: Key<'kvs>, value: KvValue<'kvs>) -> Result<(), KvError> {
        let value = match value.to_u64() {
            Some(number) => json!(number),
            None => json!(value.to_string()),
        };
        self.0.insert(key.to_string(), value);
        Ok(())
    }
}

impl Logger {
    fn sites(&self) -> MutexGuard<'_, HashMap<Site, Limit>> {
        self.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the record may pass, with the number of similar ones that did not.
    fn admit(&self, record: &Record<'_>) -> Option<u64> {
        let site = (record.file_static().unwrap_or(""), record.line().unwrap_or(0));
        let now = Instant::now();
        let mut sites = self.sites();
        sites.entry(site).or_insert_with(|| Limit::new(record.level(), now)).admit(now)
    }

    fn write(&self, message: &Message<'_>) {
        let text = self.style.render(message, self.several.load(Ordering::Relaxed));
        // Nowhere to report that standard error is gone.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    /// Tells of what was suppressed and nothing of its kind has followed.
    fn tell_suppressed(&self, at_the_end: bool) {
        let now = Instant::now();
        let mut late = Vec::new();
        for (site, limit) in self.sites().iter_mut().filter(|(_, limit)| limit.suppressed > 0) {
            if at_the_end {
                limit.tokens += 1;
            }
            if let Some(count) = limit.admit(now) {
                late.push((site.0, limit.level, count));
            }
        }
        for (file, level, count) in late {
            let text = format!("{count} similar messages suppressed ({file})");
            self.write(&Message { level, target: "log", disk: None, text, pairs: Map::new() });
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let Some(suppressed) = self.admit(record) else { return };
        let mut text = record.args().to_string();
        if text.len() > MESSAGE_MAX {
            let end = (0..=MESSAGE_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            text.truncate(end);
            text += "...";
        }
        if suppressed > 0 {
            text += &format!(" ({suppressed} similar messages suppressed)");
        }
        let mut pairs = Pairs(Map::new());
        // Ours to visit: it does not fail.
        let _ = record.key_values().visit(&mut pairs);
        let (level, target) = (record.level(), record.target());
        self.write(&Message { level, target, disk: scope::disk(), text, pairs: pairs.0 });
    }

    fn flush(&self) {
        self.tell_suppressed(true);
    }
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sends messages to standard error from now on.
pub fn start(level: LevelFilter, format: LogFormat) {
    let logger = LOGGER.get_or_init(|| Logger {
        style: Style::chosen(format),
        sites: Mutex::default(),
        several: AtomicBool::new(false),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

/// Messages name the disk they are about from now on.
pub fn name_disks() {
    if let Some(logger) = LOGGER.get() {
        logger.several.store(true, Ordering::Relaxed);
    }
}

/// Tells how many messages were suppressed, where the flood has ended. To be called now and then.
pub fn tell_suppressed() {
    if let Some(logger) = LOGGER.get() {
        logger.tell_suppressed(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floods_are_cut_and_counted() {
        let start = Instant::now();
        let mut limit = Limit::new(Level::Error, start);
        for _ in 0..BURST {
            assert_eq!(limit.admit(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.admit(start), None);
        }
        let later = start + REFILL;
        assert_eq!(limit.admit(later), Some(1000));
        assert_eq!(limit.admit(later), None);
        let day = (24 * 3600 / REFILL.as_secs()) as usize;
        assert!(day * MESSAGE_MAX < 32 << 20, "what one place may write in a day");
    }

    fn message<'a>(text: &str, disk: Option<&'a str>) -> Message<'a> {
        let pairs = [("queue".to_owned(), json!(3))].into_iter().collect();
        Message { level: Level::Warn, target: "guest", disk, text: text.to_owned(), pairs }
    }

    #[test]
    fn styles() {
        let odd = message("two\nlines\x1b[2J", Some("data"));
        assert_eq!(
            Style::Text.render(&odd, true),
            "vhost-daemon: warn: [data] two\nvhost-daemon: warn: [data] lines?[2J queue=3\n"
        );
        assert_eq!(Style::Journal.render(&message("short", None), true), "<4>short queue=3\n");
        assert_eq!(Style::Journal.render(&message("x", Some("d")), false), "<4>x queue=3\n");
        let json: Value = serde_json::from_str(&Style::Json.render(&odd, false)).expect("JSON");
        assert_eq!((&json["level"], &json["disk"]), (&json!("warn"), &json!("data")));
        assert_eq!(json["message"], "two\nlines\x1b[2J");
        assert_eq!(json["queue"], 3);
    }
}
