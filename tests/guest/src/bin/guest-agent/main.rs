//! The first process of the test guest: does what the host asks over the second serial line.
//!
//! One JSON object per line. A request is `{"op": .., ..}`; while it runs the agent may send
//! `{"event": ..}` lines, and it ends with `{"ok": value}` or `{"error": text}`. After each boot the
//! agent says `{"hello": ..}`.

mod aio;
mod init;
mod patterns;

use patterns::{Before, Place};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::process::Command;

fn main() {
    if std::process::id() != 1 {
        eprintln!("this program runs as the first process of a test guest");
        std::process::exit(2);
    }
    let error = match serve() {
        Ok(()) => io::Error::other("the host closed the line"),
        Err(error) => error,
    };
    eprintln!("guest-agent: {error}");
    init::finish(false);
}

fn serve() -> io::Result<()> {
    init::start()?;
    let line = init::open_line()?;
    let mut answers = Line { to_host: line.try_clone()? };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    answers.send(&json!({ "hello": { "kernel": kernel.trim() } }))?;
    for request in BufReader::new(line).lines() {
        let request: Value = serde_json::from_str(&request?)?;
        let answer = match handle(&request, &mut answers) {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        answers.send(&answer)?;
    }
    Ok(())
}

struct Line {
    to_host: File,
}

impl Line {
    fn send(&mut self, value: &Value) -> io::Result<()> {
        self.to_host.write_all(format!("{value}\n").as_bytes())
    }
}

fn handle(request: &Value, line: &mut Line) -> io::Result<Value> {
    match text(request, "op")?.as_str() {
        "run" => run(request),
        "read" => Ok(json!(std::fs::read_to_string(text(request, "path")?)?.trim())),
        "write" => {
            std::fs::write(text(request, "path")?, text(request, "text")?).map(|()| Value::Null)
        }
        "list" => {
            let entries = std::fs::read_dir(text(request, "path")?)?;
            let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
            Ok(json!(names.collect::<Vec<_>>()))
        }
        "remove" => {
            std::fs::remove_file(text(request, "path")?)?;
            // ext4 gives the blocks of a deleted file to fstrim only after its journal's next commit.
            init::sync();
            Ok(Value::Null)
        }
        "mount" => {
            let [source, target, kind] = ["source", "target", "kind"].map(|k| text(request, k));
            let (source, target, kind) = (source?, target?, kind?);
            std::fs::create_dir_all(&target)?;
            let options = text(request, "options").unwrap_or_default();
            init::mount(&source, &target, &kind, &options).map(|()| Value::Null)
        }
        "umount" => init::umount(&text(request, "target")?).map(|()| Value::Null),
        "reboot" => Err(init::finish(true)),
        "poweroff" => Err(init::finish(false)),
        "neighbours" => patterns::neighbours(
            &place(request)?,
            number(request, "block")?,
            number(request, "writers")? as usize,
            before(request)?,
        ),
        "fresh" => {
            patterns::fresh(&place(request)?, number(request, "block")?, number(request, "shift")?)
        }
        "storm" => patterns::storm(
            &place(request)?,
            number(request, "rounds")?,
            number(request, "depth")? as usize,
            number(request, "max_sectors")?,
            number(request, "seed")?,
        ),
        "acked" => patterns::acked(
            &place(request)?,
            number(request, "writes")?,
            number(request, "depth")? as usize,
            number(request, "max_sectors")?,
            number(request, "seed")?,
            |acked| line.send(&json!({ "event": { "acked": acked } })),
        ),
        "scan" => {
            let mut runs = Vec::new();
            patterns::scan(&place(request)?, |first, count, generation| {
                runs.push(json!([first, count, generation]));
            })?;
            for part in runs.chunks(100) {
                line.send(&json!({ "event": { "runs": part } }))?;
            }
            Ok(json!({ "runs": runs.len() }))
        }
        "write_files" => patterns::write_files(
            &text(request, "dir")?,
            number(request, "first")?,
            number(request, "count")?,
            |number| line.send(&json!({ "event": { "synced": number } })),
        ),
        "verify_files" => patterns::verify_files(&text(request, "dir")?, number(request, "count")?),
        other => Err(io::Error::other(format!("unknown operation {other:?}"))),
    }
}

/// Runs a program and returns its output, both streams together as it wrote them.
fn run(request: &Value) -> io::Result<Value> {
    let words = request["argv"].as_array().into_iter().flatten();
    let argv: Vec<&str> = words.filter_map(Value::as_str).collect();
    let (program, arguments) =
        argv.split_first().ok_or_else(|| io::Error::other("run without argv"))?;
    let input = request["stdin"].as_str().unwrap_or_default();
    let output = File::create("/run/output")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/tmp")
        .current_dir("/tmp")
        .stdin(std::process::Stdio::piped())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .map_err(|error| io::Error::other(format!("{program}: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let status = child.wait()?;
    let output = std::fs::read("/run/output")?;
    let output = String::from_utf8_lossy(&output);
    let kept: String = output.chars().rev().take(8000).collect::<Vec<_>>().iter().rev().collect();
    Ok(json!({ "status": status.code(), "output": kept }))
}

fn place(request: &Value) -> io::Result<Place> {
    Ok(Place {
        path: text(request, "path")?,
        start: number(request, "start")?,
        length: number(request, "length")?,
    })
}

fn before(request: &Value) -> io::Result<Before> {
    match request["before"].as_str() {
        None => Ok(Before::Nothing),
        Some("zeroes") => Ok(Before::Zeroes),
        Some("discard") => Ok(Before::Discard),
        Some(other) => Err(io::Error::other(format!("unknown preparation {other:?}"))),
    }
}

fn text(request: &Value, key: &str) -> io::Result<String> {
    let value = request[key].as_str().map(str::to_owned);
    value.ok_or_else(|| io::Error::other(format!("the request has no text {key:?}: {request}")))
}

fn number(request: &Value, key: &str) -> io::Result<u64> {
    let value = request[key].as_u64();
    value.ok_or_else(|| io::Error::other(format!("the request has no number {key:?}: {request}")))
}
