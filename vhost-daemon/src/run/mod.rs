//! The running program: disks opened, served each on its own thread, and closed.

pub mod affinity;
pub mod config;
mod confine;
pub mod discovery;
pub mod generate;
pub mod instance;
pub mod systemd;

use crate::control::Control;
use crate::front::socket::{Permissions, Socket};
use crate::logger;
use crate::sandbox;
use crate::signals;
use instance::{Instance, Sockets, Stop};
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the main thread looks around although nothing has happened.
const ROUND: Duration = Duration::from_secs(10);

/// What a disk's thread tells.
enum News {
    Open(Arc<Instance>),
    Ended(Result<(), String>),
}

/// All disks of the process, once they are open.
#[derive(Default)]
pub struct Disks {
    open: OnceLock<Vec<Arc<Instance>>>,
    stops: Mutex<Vec<Stop>>,
}

impl Disks {
    /// The disks; none before all are open.
    pub fn all(&self) -> &[Arc<Instance>] {
        self.open.get().map_or(&[], Vec::as_slice)
    }

    /// Tells all servers to end.
    fn stop(&self) {
        for stop in self.stops.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            stop.request();
        }
    }
}

/// Serves the disks of the plan until a signal ends it.
pub fn run(plan: config::Plan) -> Result<(), String> {
    let mut passed = systemd::Passed::take()?;
    signals::block().map_err(|error| format!("could not block signals: {error}"))?;
    if let Some(user) = &plan.line.process.user {
        sandbox::become_user(user)?;
    }
    let alone = plan.disks.len() == 1;
    if !alone {
        logger::name_disks();
    }
    let control = control_socket(plan.line.process.control_path.as_deref(), &mut passed)?;
    let plans = plan.disks.into_iter().map(|args| instance::Plan::new(args, &mut passed, alone));
    let plans = plans.collect::<Result<Vec<_>, _>>()?;
    if !passed.rest().is_empty() {
        return Err(format!("systemd passed sockets that no disk claims: {:?}", passed.rest()));
    }
    if plan.line.process.no_sandbox {
        log::info!("not confined: --no-sandbox");
    } else {
        // Before the first thread: what is given up is the calling thread's and its children's.
        sandbox::enter(&confine::reach(&plan.line.process, &plans))?;
    }
    let disks = Arc::new(Disks::default());
    receive_signals(&disks)
        .map_err(|error| format!("could not start the signal thread: {error}"))?;
    let (tell, news) = channel();
    let count = plans.len();
    for plan in plans {
        start(plan, alone, &disks, tell.clone())
            .map_err(|error| format!("could not start a disk's thread: {error}"))?;
    }
    drop(tell);
    let _control = control
        .map(|socket| Control::start(socket, disks.clone()))
        .transpose()
        .map_err(|error| format!("could not serve the control socket: {error}"))?;
    supervise(&disks, &news, count)
}

fn control_socket(
    path: Option<&Path>,
    passed: &mut systemd::Passed,
) -> Result<Option<Socket>, String> {
    let socket = match (path, passed.named(systemd::CONTROL)) {
        (Some(path), _) => Socket::bind(path, &Permissions::default()),
        (None, Some(fd)) => Socket::inherit(fd),
        (None, None) => return Ok(None),
    };
    let name = path.unwrap_or(Path::new("the control socket of systemd"));
    let failed =
        |error| format!("could not listen on {}: {}", name.display(), instance::reason(&error));
    socket.map(Some).map_err(failed)
}

fn receive_signals(disks: &Arc<Disks>) -> io::Result<()> {
    let (ending, reporting) = (disks.clone(), disks.clone());
    let end = move || {
        systemd::stopping();
        ending.stop();
    };
    let report = move || reporting.all().iter().for_each(|instance| instance.report());
    signals::receive(end, report)
}

/// Starts the thread of a disk.
fn start(plan: instance::Plan, alone: bool, disks: &Disks, tell: Sender<News>) -> io::Result<()> {
    let stops = [Stop::new()?, Stop::new()?];
    disks.stops.lock().unwrap_or_else(PoisonError::into_inner).extend(stops.iter().cloned());
    let name = plan.name;
    // The supervisor is there until all have told their end.
    let tell = move |news| drop(tell.send(news));
    let work = move || {
        let opened: Result<(Arc<Instance>, Sockets), String> = Instance::open(plan);
        let ended = opened.and_then(|(instance, sockets)| {
            tell(News::Open(instance.clone()));
            instance.serve(sockets, &stops)
        });
        if let Err(error) = &ended
            && !alone
        {
            log::error!("{error}");
        }
        tell(News::Ended(ended));
    };
    thread::Builder::new().name(name.chars().take(15).collect()).spawn(work)?;
    Ok(())
}

/// Waits until the last disk has ended. While disks are being opened, a failure ends all: a start that
/// fails in part has failed. Later it concerns that disk alone.
fn supervise(disks: &Disks, news: &Receiver<News>, count: usize) -> Result<(), String> {
    let mut open: Vec<Arc<Instance>> = Vec::with_capacity(count);
    let mut failed = Vec::new();
    let watchdog = systemd::watchdog();
    let round = watchdog.map_or(ROUND, |every| every.min(ROUND));
    let mut next = Instant::now() + round;
    loop {
        match news.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(News::Open(instance)) => {
                open.push(instance);
                if open.len() == count {
                    open.sort_by_key(|instance| instance.name);
                    let names: Vec<&str> = open.iter().map(|instance| instance.name).collect();
                    systemd::ready(&format!("serving {}", names.join(", ")));
                    // Set once, here.
                    let _ = disks.open.set(std::mem::take(&mut open));
                }
            }
            Ok(News::Ended(result)) => {
                failed.extend(result.err());
                if disks.all().is_empty() {
                    disks.stop();
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                next = Instant::now() + round;
                logger::tell_suppressed();
                if watchdog.is_some() {
                    systemd::alive();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    match failed.pop() {
        None => Ok(()),
        Some(error) if count == 1 => Err(error),
        Some(_) => Err(format!("{} of {count} disks have failed", failed.len() + 1)),
    }
}
