//! A vhost-user-blk back-end for EXD and raw images.

#![forbid(unsafe_code)]

use clap::{CommandFactory, Parser};
use std::ffi::OsString;
use std::process::ExitCode;
use vhost_daemon::args::{self, CommandLine};
use vhost_daemon::ctl;
use vhost_daemon::logger;
use vhost_daemon::run::{self, config, discovery, generate};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    // By convention everything else on the command line is ignored then.
    if words.iter().any(|word| word == "--print-capabilities") {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let line = CommandLine::parse_from(&words);
    if let Some(result) = side_task(&line) {
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("vhost-daemon: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let plan = match config::plan(line, words) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("vhost-daemon: {error}");
            return ExitCode::FAILURE;
        }
    };
    logger::start(plan.line.process.log_level, plan.line.process.log_format);
    abort_on_panic();
    let result = run::run(plan);
    log::logger().flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// What the program does instead of serving, if the command line asks for it.
fn side_task(line: &CommandLine) -> Option<Result<(), String>> {
    let process = &line.process;
    if process.print_discovery {
        let binary = std::env::current_exe().and_then(std::fs::canonicalize);
        let binary = binary.map_err(|error| format!("could not find the program's file: {error}"));
        return Some(binary.map(|binary| println!("{}", discovery::describe(&binary))));
    }
    let directory = process.generate.as_ref()?;
    let commands = [CommandLine::command(), ctl::Args::command()];
    let generated = commands.iter().try_for_each(|command| generate::generate(command, directory));
    Some(generated.map_err(|error| format!("{}: {error}", directory.display())))
}

/// A thread that dies alone would leave its queues hanging. Dead as a whole, the daemon can be started
/// again, and every completed write is still there (P2).
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}
