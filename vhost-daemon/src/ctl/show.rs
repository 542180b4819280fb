//! Answers, written for people.

use crate::stats::KINDS;
use serde_json::Value;
use std::fmt::Write;

/// Units of bytes.
const UNITS: [(&str, u64); 4] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// The answer to `status`.
pub fn status(answer: &Value) -> String {
    let mut text = format!(
        "vhost-daemon {}, process {}, log level {}\n",
        text_of(&answer["version"]),
        answer["pid"],
        text_of(&answer["log_level"])
    );
    if answer["ready"] != true {
        text += "the disks are still being opened\n";
    }
    for disk in answer["disks"].as_array().into_iter().flatten() {
        let read_only = if disk["read_only"] == true { ", read-only" } else { "" };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "\ndisk {}: {}\n  format {}, {}{read_only}, {}",
            text_of(&disk["disk"]),
            text_of(&disk["image"]),
            text_of(&disk["format"]),
            bytes(disk["capacity"].as_u64().unwrap_or(0)),
            text_of(&disk["state"]),
        );
        if let Some(limits) = disk["throttling"].as_str().filter(|limits| !limits.is_empty()) {
            let _ = writeln!(text, "  limits {limits}");
        }
        if let Some(held) = disk["held_for_space"].as_u64().filter(|held| *held > 0) {
            let held = count(held, "request");
            let _ = writeln!(text, "  the host is full: {held} held until there is space");
        }
        for socket in disk["sockets"].as_array().into_iter().flatten() {
            let connected = if socket["connected"] == true { "connected" } else { "not connected" };
            // Nobody believes in a cache where nobody is connected.
            let cache = socket["cache_type"].as_str().filter(|_| socket["connected"] == true);
            let cache = cache.map(|cache| format!(", cache: {cache}"));
            let _ = writeln!(
                text,
                "  {} socket: {connected}, {} so far{}",
                text_of(&socket["socket"]),
                count(socket["connections"].as_u64().unwrap_or(0), "connection"),
                cache.unwrap_or_default(),
            );
        }
    }
    text
}

/// The answer to `limits`.
pub fn limits(answer: &Value) -> String {
    match answer["throttling"].as_str() {
        Some("") | None => "no limits\n".to_owned(),
        Some(limits) => format!("{}\n", limits.replace(',', "\n")),
    }
}

/// The answer to `stats`.
pub fn stats(answer: &Value) -> String {
    let mut text = String::new();
    for disk in answer["disks"].as_array().into_iter().flatten() {
        if !text.is_empty() {
            text.push('\n');
        }
        let _ = writeln!(text, "disk {}", text_of(&disk["disk"]));
        for (key, title) in [("queues", "queue"), ("read_only_queues", "read-only queue")] {
            table(&mut text, disk[key].as_array().map_or(&[], Vec::as_slice), title);
        }
        for (key, value) in disk.as_object().into_iter().flatten() {
            if !value.is_array() && !value.is_object() && key != "disk" {
                let _ = writeln!(text, "  {key}: {}", text_of(value));
            }
        }
    }
    text
}

fn table(text: &mut String, queues: &[Value], title: &str) {
    if queues.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "  {title:<15} {:<12} {:>12} {:>12} {:>8} {:>10} {:>10} {:>10}",
        "kind", "requests", "bytes", "errors", "p50 us <", "p99 us <", "p99.9 us <"
    );
    for queue in queues {
        for (_, kind) in KINDS {
            let Some(stats) = queue.get(kind) else { continue };
            let quantiles = |latency: &Value| {
                ["p50_us_max", "p99_us_max", "p999_us_max"]
                    .map(|name| latency[name].as_u64().map_or("-".to_owned(), |us| us.to_string()))
            };
            let [p50, p99, p999] = quantiles(&stats["latency"]);
            let _ = writeln!(
                text,
                "  {:<15} {kind:<12} {:>12} {:>12} {:>8} {p50:>10} {p99:>10} {p999:>10}",
                queue["queue"].to_string(),
                stats["requests"].to_string(),
                bytes(stats["bytes"].as_u64().unwrap_or(0)),
                stats["errors"].to_string(),
            );
            let part = &stats["latency_in_checkpoints"];
            if let Some(log2) = part["log2_us"].as_array() {
                let [p50, p99, p999] = quantiles(part);
                let _ = writeln!(
                    text,
                    "  {:<15} {:<12} {:>12} {:>12} {:>8} {p50:>10} {p99:>10} {p999:>10}",
                    "",
                    "in checkpts",
                    log2.iter().filter_map(Value::as_u64).sum::<u64>(),
                    "",
                    "",
                );
            }
        }
    }
}

/// An event.
pub fn event(event: &Value) -> String {
    let mut text = text_of(&event["event"]);
    if let Some(disk) = event["disk"].as_str() {
        text = format!("{disk}: {text}");
    }
    for (key, value) in event["data"].as_object().into_iter().flatten() {
        let _ = write!(text, " {key}={}", text_of(value));
    }
    text
}

/// Strings without quotes, with what could drive a terminal made visible.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        other => other.to_string(),
    }
}

fn bytes(bytes: u64) -> String {
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        None => format!("{bytes} B"),
        Some((name, unit)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
    }
}

fn count(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_status() {
        let answer = json!({
            "ok": true, "version": "1.0", "pid": 7, "ready": true, "log_level": "info",
            "disks": [{
                "disk": "root", "image": "/a\x1b.exd", "format": "exd", "capacity": 3u64 << 29,
                "read_only": false, "state": "held",
                "throttling": "iops-read=5", "held_for_space": 2,
                "sockets": [{
                    "socket": "main", "connected": true, "connections": 1,
                    "cache_type": "write back",
                }],
            }],
        });
        assert_eq!(
            status(&answer),
            "vhost-daemon 1.0, process 7, log level info\n\n\
             disk root: /a?.exd\n  format exd, 1.5 GiB, held\n  limits iops-read=5\n  \
             the host is full: 2 requests held until there is space\n  \
             main socket: connected, 1 connection so far, cache: write back\n"
        );
    }

    #[test]
    fn figures() {
        let latency = json!({ "p50_us_max": 8, "p99_us_max": 64, "p999_us_max": null });
        let read = json!({ "requests": 5, "bytes": 20480, "errors": 0, "latency": latency });
        let queue = json!({ "queue": 3, "read": read });
        let text = stats(&json!({ "disks": [{ "disk": "d", "syncs": 9, "queues": [queue] }] }));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(words, ["3", "read", "5", "20", "KiB", "0", "8", "64", "-"]);
        assert_eq!(lines[3], "  syncs: 9");
        let line = json!({ "event": "connection", "disk": "d", "data": { "socket": "main" } });
        assert_eq!(event(&line), "d: connection socket=main");
    }
}
