//! The configuration file: TOML whose keys are the long options, so that nothing has to be declared or
//! documented twice. The options of the process are at the top, each disk is a `[[disk]]` table.

use crate::args::{Args, CommandLine};
use clap::{Arg, Command, CommandFactory, Parser};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use toml::{Table, Value};

/// What the process is to do.
#[derive(Debug)]
pub struct Plan {
    /// The options of the process.
    pub line: CommandLine,
    /// The disks, at least one; their names differ.
    pub disks: Vec<Args>,
}

/// Options that make no sense in a file.
const NOT_IN_A_FILE: [&str; 6] =
    ["config", "print-capabilities", "print-discovery", "generate", "help", "version"];

/// The plan that the command line makes, with the file it may name. What the command line says of the
/// process overrides the file. `words` begins with the program's name.
pub fn plan(line: CommandLine, words: Vec<OsString>) -> Result<Plan, String> {
    let Some(path) = line.process.config.clone() else {
        let disks = line.disk.clone().into_iter().collect();
        return Ok(Plan { line, disks });
    };
    read(&path, words).map_err(|error| format!("{}: {error}", path.display()))
}

fn read(path: &Path, words: Vec<OsString>) -> Result<Plan, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| error.to_string())?;
    let tables = match table.remove("disk") {
        Some(Value::Array(tables)) if !tables.is_empty() => tables,
        Some(_) => return Err("disks are written as [[disk]] tables".to_owned()),
        None => return Err("there is no [[disk]] table".to_owned()),
    };
    let mut words = words.into_iter();
    let mut line: Vec<OsString> = words.next().into_iter().collect();
    line.extend(options(&table, "process")?);
    line.extend(words);
    let line = CommandLine::try_parse_from(line).map_err(|error| reason(&error))?;
    let mut disks: Vec<Args> = Vec::with_capacity(tables.len());
    for (number, table) in tables.iter().enumerate() {
        let disk = disk(table).map_err(|error| format!("disk {}: {error}", number + 1))?;
        if disks.iter().any(|other| other.disk_name() == disk.disk_name()) {
            let name = disk.disk_name();
            return Err(format!("two disks have the name '{name}'; give one another by 'name'"));
        }
        disks.push(disk);
    }
    Ok(Plan { line, disks })
}

fn disk(table: &Value) -> Result<Args, String> {
    let table = table.as_table().ok_or("not a table")?;
    let options = options(table, "disk")?;
    let words = std::iter::once(OsString::from("vhost-daemon")).chain(options);
    let line = CommandLine::try_parse_from(words).map_err(|error| reason(&error))?;
    line.disk.ok_or_else(|| "nothing is said about the disk".to_owned())
}

/// The words that say the same on a command line.
fn options(table: &Table, group: &str) -> Result<Vec<OsString>, String> {
    let command = CommandLine::command();
    let mut words = Vec::with_capacity(table.len());
    for (key, value) in table {
        let known = find(&command, group, key);
        let arg = known.ok_or_else(|| format!("unknown key '{key}'"))?;
        if let Some(word) = word(key, value, arg.get_action().takes_values())? {
            words.push(word.into());
        }
    }
    Ok(words)
}

fn find<'a>(command: &'a Command, group: &str, key: &str) -> Option<&'a Arg> {
    if NOT_IN_A_FILE.contains(&key) {
        return None;
    }
    let group = command.get_groups().find(|known| known.get_id() == group)?;
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some(key))?;
    group.get_args().any(|id| id == arg.get_id()).then_some(arg)
}

fn word(key: &str, value: &Value, takes_value: bool) -> Result<Option<String>, String> {
    match (value, takes_value) {
        (Value::Boolean(true), false) => Ok(Some(format!("--{key}"))),
        (Value::Boolean(false), false) => Ok(None),
        (_, false) => Err(format!("'{key}' is true or false")),
        (value, true) => match plain(value) {
            Some(text) => Ok(Some(format!("--{key}={text}"))),
            None => Err(format!("'{key}' is a string, a number, or a list of them")),
        },
    }
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Array(values) => {
            let values: Option<Vec<String>> = values.iter().map(plain).collect();
            values.map(|values| values.join(","))
        }
        _ => None,
    }
}

/// What clap says, without the advice to look at the help.
fn reason(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:"));
    let lines: Vec<&str> =
        lines.filter(|line| !line.is_empty() && !line.starts_with("For more")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_of(text: &str, more: &[&str]) -> Result<Plan, String> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("c.toml");
        fs::write(&path, text).expect("write");
        let config = format!("--config={}", path.display());
        let words = ["vhost-daemon", &config].into_iter().chain(more.iter().copied());
        let words: Vec<OsString> = words.map(OsString::from).collect();
        let line = CommandLine::try_parse_from(&words).expect("valid");
        plan(line, words)
    }

    #[test]
    fn a_file_says_what_a_command_line_would() {
        let text = r#"
            log-level = "debug"
            control-path = "/run/c"
            [[disk]]
            blk-file = "/images/a.exd"
            socket-path = "/run/a"
            read-only = true
            num-queues = 4
            [[disk]]
            name = "data"
            blk-file = "/images/a.exd"
            socket-path = "/run/b"
            read-only = false
            cpu-affinity = [0, "2-3"]
        "#;
        let plan = plan_of(text, &["--log-level=warn"]).expect("valid");
        assert_eq!(plan.line.process.log_level, log::LevelFilter::Warn, "overridden");
        assert_eq!(plan.line.process.control_path.as_deref(), Some(Path::new("/run/c")));
        assert_eq!(plan.disks.len(), 2);
        assert!(plan.disks[0].read_only && !plan.disks[1].read_only);
        assert_eq!((plan.disks[0].num_queues, plan.disks[1].num_queues), (4, 64));
        assert_eq!(plan.disks[0].disk_name(), "a");
        assert_eq!(plan.disks[1].cpu_affinity, "0,2-3".parse().ok());
    }

    #[test]
    fn mistakes_are_named() {
        let disk = "[[disk]]\nblk-file='/a'\nsocket-path='/s'\n";
        for (text, part) in [
            ("", "no [[disk]] table"),
            ("disk = 1", "[[disk]] tables"),
            ("disk = []", "[[disk]] tables"),
            ("x", "TOML parse error"),
            (&format!("blk-file='/b'\n{disk}"), "unknown key 'blk-file'"),
            (&format!("config='/b'\n{disk}"), "unknown key 'config'"),
            (&format!("log-level='loud'\n{disk}"), "invalid value 'loud' for '--log-level"),
            (&format!("{disk}sockets=1"), "disk 1: unknown key 'sockets'"),
            (&format!("{disk}log-level='info'"), "unknown key 'log-level'"),
            (&format!("{disk}read-only='yes'"), "'read-only' is true or false"),
            (&format!("{disk}cache=true"), "'cache' is a string"),
            (&format!("{disk}cache='fast'"), "invalid value 'fast'"),
            (&format!("{disk}{disk}"), "two disks have the name 'a'"),
            ("[[disk]]\nsocket-path='/s'", "--blk-file"),
            ("[[disk]]\n", "--blk-file"),
        ] {
            let error = plan_of(text, &[]).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
