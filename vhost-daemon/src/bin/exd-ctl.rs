//! Asks and tells a running vhost-daemon by its control socket.

#![forbid(unsafe_code)]

use clap::Parser;
use serde_json::Value;
use std::io::{ErrorKind, Write, stdout};
use std::process::ExitCode;
use vhost_daemon::ctl::{Args, Command, Connection, Output, request, show};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exd-ctl: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), String> {
    let mut connection = Connection::open(&args.path)?;
    let request = request(&mut connection, args)?;
    let answer = connection.ask(&request)?;
    if args.command != Command::Events {
        return print(&shown(args, &answer));
    }
    while let Some(event) = connection.receive()? {
        let line = match args.output {
            Output::Json => event.to_string(),
            Output::Human => show::event(&event),
        };
        print(&format!("{line}\n"))?;
    }
    Err("the daemon has ended".to_owned())
}

/// The answer as it is to be printed.
fn shown(args: &Args, answer: &Value) -> String {
    match (&args.command, args.output) {
        (Command::Stats { prometheus: true }, _) => {
            answer["text"].as_str().unwrap_or_default().to_owned()
        }
        (_, Output::Json) => format!("{answer}\n"),
        (Command::Status, _) => show::status(answer),
        (Command::Stats { .. }, _) => show::stats(answer),
        (Command::Limits { .. }, _) => show::limits(answer),
        _ => String::new(),
    }
}

fn print(text: &str) -> Result<(), String> {
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        // Whoever stops reading has seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.to_string()),
        _ => Ok(()),
    }
}
