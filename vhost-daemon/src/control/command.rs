//! The commands of the control socket.

use crate::disk::policy::limits::Limits;
use crate::run::Disks;
use crate::run::instance::Instance;
use crate::scope;
use crate::stats::prometheus;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::str::FromStr;
use std::time::Duration;

/// Longest freeze that can be asked for: a forgotten one must end.
const FREEZE_MAX: Duration = Duration::from_secs(24 * 3600);

#[derive(Deserialize, Debug)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    Status {
        disk: Option<String>,
    },
    Stats {
        disk: Option<String>,
        #[serde(default)]
        format: StatsFormat,
    },
    Resize {
        disk: Option<String>,
        /// In bytes.
        size: u64,
    },
    Checkpoint {
        disk: Option<String>,
    },
    Freeze {
        disk: Option<String>,
        /// In seconds.
        #[serde(default = "default_timeout")]
        timeout: u64,
    },
    Thaw {
        disk: Option<String>,
    },
    Limits {
        disk: Option<String>,
        /// As --throttling has it; absent: they are only shown.
        throttling: Option<String>,
    },
    Retry {
        disk: Option<String>,
    },
    LogLevel {
        level: String,
    },
    Subscribe {},
}

#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "lowercase")]
enum StatsFormat {
    #[default]
    Json,
    Prometheus,
}

fn default_timeout() -> u64 {
    60
}

/// What a request gets.
#[derive(Debug)]
pub enum Answer {
    /// One line.
    Plain(Value),
    /// A line of success, and from then on events.
    Events,
}

/// A success that says nothing more.
pub fn success() -> Value {
    json!({ "ok": true })
}

/// A failure with its reason.
pub fn failure(reason: &str) -> Value {
    json!({ "ok": false, "error": reason })
}

/// Carries a request out, which may take its time.
pub fn answer(line: &[u8], disks: &Disks) -> Answer {
    let command: Command = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => {
            let text = error.to_string();
            let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
            return Answer::Plain(failure(text));
        }
    };
    if matches!(command, Command::Subscribe {}) {
        return Answer::Events;
    }
    Answer::Plain(match carry_out(command, disks) {
        Ok(fields) => {
            let mut value = success();
            value.as_object_mut().into_iter().for_each(|object| object.extend(fields.clone()));
            value
        }
        Err(error) => failure(&error),
    })
}

/// Fields of the answer besides `ok`.
type Fields = Map<String, Value>;

fn carry_out(command: Command, disks: &Disks) -> Result<Fields, String> {
    let done = |result: Result<(), String>| result.map(|()| Fields::new());
    match command {
        Command::Status { disk } => status(disks, disk.as_deref()),
        Command::Stats { disk, format } => {
            let chosen = several(disks, disk.as_deref())?;
            Ok(match format {
                StatsFormat::Json => json_stats(&chosen),
                StatsFormat::Prometheus => prometheus_stats(&chosen),
            })
        }
        Command::Resize { disk, size } => {
            let instance = one(disks, disk.as_deref())?;
            instance.disk.resize(size)?;
            let capacity = instance.disk.properties().capacity;
            Ok(Fields::from_iter([("capacity".to_owned(), json!(capacity))]))
        }
        Command::Checkpoint { disk } => done(one(disks, disk.as_deref())?.disk.checkpoint()),
        Command::Freeze { disk, timeout } => {
            let instance = one(disks, disk.as_deref())?;
            done(freeze(instance, Duration::from_secs(timeout)))
        }
        Command::Thaw { disk } => done(one(disks, disk.as_deref())?.disk.thaw()),
        Command::Limits { disk, throttling } => {
            let limiter = one(disks, disk.as_deref())?.policy.limiter();
            if let Some(text) = throttling {
                let limits: Limits = text.parse()?;
                limiter.set(limits);
                log::info!("the limits are '{limits}' now");
            }
            let limits = limiter.limits().to_string();
            Ok(Fields::from_iter([("throttling".to_owned(), json!(limits))]))
        }
        Command::Retry { disk } => done(retry(one(disks, disk.as_deref())?)),
        Command::LogLevel { level } => {
            let filter = log::LevelFilter::from_str(&level).map_err(|_| {
                format!("'{level}' is no level: off, error, warn, info, debug, trace")
            })?;
            log::set_max_level(filter);
            done(Ok(()))
        }
        Command::Subscribe {} => done(Ok(())),
    }
}

fn retry(instance: &Instance) -> Result<(), String> {
    let full_host = instance.policy.full_host();
    let full_host = full_host.ok_or("no request is ever held: the disk has no --on-enospc=stop")?;
    full_host.retry();
    Ok(())
}

fn freeze(instance: &Instance, timeout: Duration) -> Result<(), String> {
    if timeout.is_zero() || timeout > FREEZE_MAX {
        return Err(format!("a timeout is 1 to {} seconds", FREEZE_MAX.as_secs()));
    }
    instance.disk.freeze(timeout)
}

fn status(disks: &Disks, disk: Option<&str>) -> Result<Fields, String> {
    let chosen = match disk {
        None => disks.all().iter().map(AsRef::as_ref).collect(),
        some => several(disks, some)?,
    };
    let list: Vec<Value> = chosen.iter().map(|instance| instance.status()).collect();
    Ok(Fields::from_iter([
        ("version".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
        ("pid".to_owned(), json!(std::process::id())),
        ("ready".to_owned(), json!(!disks.all().is_empty())),
        ("log_level".to_owned(), json!(log::max_level().as_str().to_ascii_lowercase())),
        ("disks".to_owned(), Value::Array(list)),
    ]))
}

fn json_stats(chosen: &[&Instance]) -> Fields {
    let disks = chosen.iter().map(|instance| {
        let mut value = instance.statistics();
        if let Some(object) = value.as_object_mut() {
            object.insert("disk".to_owned(), json!(instance.name));
        }
        value
    });
    Fields::from_iter([("disks".to_owned(), disks.collect())])
}

fn prometheus_stats(chosen: &[&Instance]) -> Fields {
    let source = |instance: &&Instance| prometheus::Source {
        monitors: instance.monitors.clone(),
        capacity: instance.disk.properties().capacity,
        engine: instance.disk.statistics(),
    };
    let sources: Vec<_> = chosen.iter().map(source).collect();
    Fields::from_iter([("text".to_owned(), json!(prometheus::render(&sources)))])
}

/// The disk of this name, or all.
fn several<'a>(disks: &'a Disks, name: Option<&str>) -> Result<Vec<&'a Instance>, String> {
    if disks.all().is_empty() {
        return Err("the disks are still being opened".to_owned());
    }
    let matches = |instance: &&Instance| name.is_none_or(|name| instance.name == name);
    let chosen: Vec<&Instance> = disks.all().iter().map(AsRef::as_ref).filter(matches).collect();
    match name {
        Some(name) if chosen.is_empty() => Err(format!("there is no disk '{name}'")),
        _ => Ok(chosen),
    }
}

/// The disk of this name, or the only one. The calling thread then works for it.
fn one<'a>(disks: &'a Disks, name: Option<&str>) -> Result<&'a Instance, String> {
    match several(disks, name)?[..] {
        [instance] => {
            scope::enter(instance.name);
            Ok(instance)
        }
        ref all => {
            let names: Vec<&str> = all.iter().map(|instance| instance.name).collect();
            Err(format!("there are several disks, name one of: {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(line: &str) -> Value {
        match answer(line.as_bytes(), &Disks::default()) {
            Answer::Plain(value) => value,
            Answer::Events => json!("events"),
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, part) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "missing field `command`"),
            ("{}", "missing field `command`"),
            (r#"{"command":"explode"}"#, "unknown variant `explode`"),
            (r#"{"command":"resize"}"#, "missing field `size`"),
            (r#"{"command":"resize","size":-1}"#, "invalid value"),
            (r#"{"command":"status","verbose":true}"#, "unknown field `verbose`"),
            (r#"{"command":"log-level","level":"loud"}"#, "'loud' is no level"),
            (r#"{"command":"stats"}"#, "being opened"),
            (r#"{"command":"retry","now":1}"#, "unknown field `now`"),
            (r#"{"command":"thaw","disk":"x"}"#, "being opened"),
        ] {
            let answer = ask(line);
            assert_eq!(answer["ok"], false, "{line}");
            let text = answer["error"].as_str().expect("a reason");
            assert!(text.contains(part) && !text.contains(" at line "), "{line}: {text}");
        }
    }

    #[test]
    fn before_disks_are_open() {
        let status = ask(r#"{"command":"status"}"#);
        assert_eq!((&status["ok"], &status["ready"]), (&json!(true), &json!(false)));
        assert_eq!(ask(r#"{"command":"subscribe"}"#), "events");
    }
}
