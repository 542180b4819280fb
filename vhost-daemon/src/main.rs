//! A vhost-user-blk back-end for EXD and raw images.

#![forbid(unsafe_code)]

use clap::Parser;
use vhost_daemon::args::{self, Args};
use vhost_daemon::disk::{self, Disk, Router};
use vhost_daemon::event::Event;
use vhost_daemon::front::device::Presentation;
use vhost_daemon::front::notify::Notifier;
use vhost_daemon::front::private::PrivateListener;
use vhost_daemon::front::server::Server;
use vhost_daemon::front::socket::Socket;
use vhost_daemon::logger;
use vhost_daemon::signals::{self, Shutdown};

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

fn main() -> ExitCode {
    // By convention everything else on the command line is ignored then.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    logger::start(args.log_level);
    abort_on_panic();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
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

fn run(args: &Args) -> Result<(), String> {
    signals::block().map_err(|error| format!("could not block signals: {error}"))?;
    let shutdown = Arc::new(Shutdown::default());
    let wake = Arc::new(Event::new().map_err(|error| format!("no eventfd: {error}"))?);
    let router = Arc::new(Router::default());
    let disk = disk::open::open(args, &router)?;
    let report = reporter(disk.clone(), args.stats_file.clone());
    signals::receive(shutdown.clone(), wake.clone(), report.clone())
        .map_err(|error| format!("could not start the signal thread: {error}"))?;
    let socket = listen(args)?;
    let beside = args.socket_path.as_deref().and_then(Path::parent);
    let private = PrivateListener::new(beside)
        .map_err(|error| format!("could not make a socket for ourselves: {error}"))?;
    let properties = disk.properties();
    let presentation = Presentation {
        queues: args.num_queues,
        workers: workers(args),
        writeback: args.cache.is_writeback(),
        serial: args.serial.clone().unwrap_or(properties.serial),
    };
    log::info!(
        "serving {} ({} bytes{})",
        args.blk_file.display(),
        properties.capacity,
        if properties.read_only { ", read-only" } else { "" }
    );
    let server = Server {
        disk: disk.clone(),
        presentation,
        router,
        socket: &socket,
        private,
        notifier: Notifier::default(),
        shutdown,
        wake,
    };
    let served = server.run();
    drop(socket);
    let closed = disk.close();
    report();
    served.and(closed)
}

/// Writes the disk's statistics to the log and, where there is one, to the file.
fn reporter(disk: Arc<dyn Disk>, file: Option<PathBuf>) -> impl Fn() + Clone + Send + 'static {
    move || {
        let statistics = disk.statistics();
        log::debug!("statistics: {statistics}");
        if let Some(file) = &file
            && let Err(error) = replace(file, &format!("{statistics}\n"))
        {
            log::error!("could not write {}: {error}", file.display());
        }
    }
}

/// Replaces the file at once: a reader sees the old content or the new.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

fn listen(args: &Args) -> Result<Socket, String> {
    match (&args.socket_path, args.fd) {
        (Some(path), _) => Socket::bind(path)
            .map_err(|error| format!("could not listen on {}: {error}", path.display())),
        (None, Some(fd)) => Socket::inherit(fd)
            .map_err(|error| format!("could not listen on descriptor {fd}: {error}")),
        (None, None) => Err("neither --socket-path nor --fd".to_owned()),
    }
}

/// One thread per queue, as far as there are processors for them.
fn workers(args: &Args) -> u16 {
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    let wanted = args.threads.unwrap_or(u16::try_from(processors).unwrap_or(u16::MAX));
    wanted.clamp(1, args.num_queues)
}
