//! The figures in Prometheus' text format (version 0.0.4).

use super::histogram::Reading;
use super::{KINDS, Monitor, QueueStats};
use serde_json::Value;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is to be shown of a disk.
#[derive(Debug)]
pub struct Source {
    /// Its sockets.
    pub monitors: Vec<Arc<Monitor>>,
    /// Size in bytes.
    pub capacity: u64,
    /// Figures of the format: those that are numbers or true or false are shown.
    pub engine: Value,
}

/// The figures of all disks.
pub fn render(sources: &[Source]) -> String {
    let mut page = Page(String::new());
    page.family("exd_disk_capacity_bytes", "gauge", "Size of the disk.");
    for source in sources {
        page.sample("exd_disk_capacity_bytes", &labels(source), source.capacity);
    }
    page.sockets(sources);
    page.queues(sources);
    page.engines(sources);
    page.0
}

struct Page(String);

/// Name, type, help and value.
type Figure = (&'static str, &'static str, &'static str, fn(&QueueStats) -> u64);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }

    fn sockets(&mut self, sources: &[Source]) {
        let all = || sources.iter().flat_map(|source| &source.monitors);
        self.family("exd_connected", "gauge", "Whether a front-end is connected.");
        for monitor in all() {
            let connected = u8::from(monitor.is_connected());
            self.sample("exd_connected", &socket_labels(monitor), connected);
        }
        self.family("exd_connections_total", "counter", "Front-ends that have connected.");
        for monitor in all() {
            self.sample("exd_connections_total", &socket_labels(monitor), monitor.connections());
        }
    }

    fn queues(&mut self, sources: &[Source]) {
        let figures: [Figure; 3] = [
            ("exd_queue_refused_total", "counter", "Requests that were refused.", |queue| {
                queue.refused.get()
            }),
            ("exd_queue_interrupts_total", "counter", "Interrupts sent to the guest.", |queue| {
                queue.interrupts.get()
            }),
            ("exd_queue_in_flight", "gauge", "Requests under way.", |queue| {
                queue.in_flight.load(Ordering::Relaxed)
            }),
        ];
        for (name, kind, help, value) in figures {
            self.family(name, kind, help);
            for (labels, queue) in used_queues(sources) {
                self.sample(name, &labels, value(queue));
            }
        }
        self.kinds(sources);
    }

    fn kinds(&mut self, sources: &[Source]) {
        self.family("exd_request_bytes_total", "counter", "Bytes of requests that have ended.");
        self.each_kind(sources, |page, labels, stats| {
            page.sample("exd_request_bytes_total", labels, stats.bytes.get());
        });
        self.family("exd_request_errors_total", "counter", "Requests that have failed.");
        self.each_kind(sources, |page, labels, stats| {
            page.sample("exd_request_errors_total", labels, stats.errors.get());
        });
        let name = "exd_request_duration_seconds";
        self.family(name, "histogram", "From the ring to the used entry.");
        self.each_kind(sources, |page, labels, stats| {
            page.histogram(name, labels, &stats.latency.read());
        });
        let name = "exd_checkpoint_write_duration_seconds";
        self.family(name, "histogram", "The same of writes under way while a checkpoint was.");
        for (labels, queue) in used_queues(sources) {
            if let Some(reading) = queue.in_checkpoints() {
                self.histogram(name, &labels, &reading);
            }
        }
    }

    /// One reading: the parts of a histogram have to agree.
    fn histogram(&mut self, name: &str, labels: &str, reading: &Reading) {
        for (bound, count) in reading.cumulative() {
            let bound = bound.map_or("+Inf".to_owned(), |us| (us as f64 / 1e6).to_string());
            self.sample(&format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), count);
        }
        self.sample(&format!("{name}_sum"), labels, reading.sum_us() as f64 / 1e6);
        self.sample(&format!("{name}_count"), labels, reading.count());
    }

    fn each_kind(
        &mut self,
        sources: &[Source],
        mut show: impl FnMut(&mut Page, &str, &super::KindStats),
    ) {
        for (labels, queue) in used_queues(sources) {
            for (kind, name) in KINDS {
                if let Some(stats) = queue.kind(kind) {
                    show(self, &format!("{labels},kind=\"{name}\""), stats);
                }
            }
        }
    }

    /// Whatever numbers the formats have; sums since the image was opened or states of the moment.
    fn engines(&mut self, sources: &[Source]) {
        let mut names: Vec<&str> = Vec::new();
        for (name, value) in sources.iter().filter_map(|s| s.engine.as_object()).flatten() {
            if number(value).is_some() && !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        for name in names {
            let metric = format!("exd_image_{name}");
            self.family(&metric, "untyped", "A figure of the image's format.");
            for source in sources {
                if let Some(value) = source.engine.get(name).and_then(number) {
                    self.sample(&metric, &labels(source), value);
                }
            }
        }
    }
}

fn number(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(u8::from(*value).to_string()),
        _ => None,
    }
}

fn used_queues(sources: &[Source]) -> Vec<(String, &QueueStats)> {
    let monitors = sources.iter().flat_map(|source| &source.monitors);
    let mut queues = Vec::new();
    for monitor in monitors {
        for (number, queue) in monitor.queues().iter().enumerate().filter(|(_, q)| q.is_used()) {
            queues.push((format!("{},queue=\"{number}\"", socket_labels(monitor)), queue));
        }
    }
    queues
}

/// Names of disks need no escapes: they are letters, digits, dots, dashes and underscores.
fn socket_labels(monitor: &Monitor) -> String {
    format!("disk=\"{}\",socket=\"{}\"", monitor.disk(), monitor.access().name())
}

fn labels(source: &Source) -> String {
    format!("disk=\"{}\"", source.monitors.first().map_or("", |monitor| monitor.disk()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Access;
    use crate::stats::{Checkpoints, Kind, Start};
    use serde_json::json;
    use std::time::{Duration, Instant};

    #[test]
    fn the_format_is_kept() {
        let checkpoints = Arc::new(Checkpoints::default());
        let monitor = Arc::new(Monitor::new("root", Access::Main, 2, checkpoints.clone()));
        let at = Instant::now();
        let start = Start { kind: Kind::Read, bytes: 512, at };
        monitor.ended(1, &start, at + Duration::from_micros(3), false);
        checkpoints.set_running(true);
        let start = Start { kind: Kind::Write, ..start };
        monitor.ended(1, &start, at + Duration::from_micros(3), false);
        let engine = json!({ "syncs": 7, "open": true, "format": "exd" });
        let source = Source { monitors: vec![monitor], capacity: 1 << 20, engine };
        let text = render(&[source]);
        let labels = "disk=\"root\",socket=\"main\",queue=\"1\",kind=\"read\"";
        for line in [
            "exd_disk_capacity_bytes{disk=\"root\"} 1048576".to_owned(),
            format!("exd_request_duration_seconds_bucket{{{labels},le=\"0.000002\"}} 0"),
            format!("exd_request_duration_seconds_bucket{{{labels},le=\"0.000004\"}} 1"),
            format!("exd_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} 1"),
            format!("exd_request_duration_seconds_count{{{labels}}} 1"),
            "exd_checkpoint_write_duration_seconds_count{disk=\"root\",socket=\"main\",queue=\"1\"} 1"
                .to_owned(),
            "exd_image_syncs{disk=\"root\"} 7".to_owned(),
            "exd_image_open{disk=\"root\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("queue=\"0\"") && !text.contains("exd_image_format"));
        let families = text.lines().filter(|line| line.starts_with("# TYPE"));
        let mut names: Vec<_> = families.collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count, "each family is declared once");
    }
}
