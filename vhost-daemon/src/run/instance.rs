//! One disk with its sockets, served on threads of its own.

use crate::args::Args;
use crate::disk::policy::full_host::Notice;
use crate::disk::policy::{Choice, Policy};
use crate::disk::{self, Access, Disk, Router};
use crate::event::Event;
use crate::events;
use crate::front::device::Presentation;
use crate::front::notify::Notifier;
use crate::front::private::PrivateListener;
use crate::front::server::Server;
use crate::front::socket::{Permissions, Socket};
use crate::run::systemd::Passed;
use crate::scope;
use crate::signals::Shutdown;
use crate::stats::Monitor;
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Where a socket comes from.
#[derive(Debug)]
pub enum Source {
    /// A name to be made.
    Path(PathBuf),
    /// A listening socket that somebody left us.
    Inherited(RawFd),
}

/// What is known of a disk before it is opened.
#[derive(Debug)]
pub struct Plan {
    /// Its options.
    pub args: Args,
    /// Its name.
    pub name: &'static str,
    /// The guest's socket.
    pub main: Source,
    /// The socket for a second front-end.
    pub read_only: Option<Source>,
    /// Who may connect, or why that cannot be told.
    permissions: Result<Permissions, String>,
    /// Our own ends of their connections.
    private: PrivateListener,
    private_read_only: Option<PrivateListener>,
}

impl Plan {
    /// The plan for the disk: which sockets are its own. A process with only one disk takes the only
    /// socket that systemd has passed, whatever its name.
    pub fn new(args: Args, passed: &mut Passed, alone: bool) -> Result<Plan, String> {
        // While the group's name can still be looked up.
        let permissions = Permissions { mode: args.socket_mode, group: args.socket_group.clone() };
        let permissions = permissions.looked_up().map_err(|error| reason(&error));
        let name = scope::keep(args.disk_name());
        let read_only = match &args.read_only_socket {
            Some(path) => Some(Source::Path(path.clone())),
            None => passed.named(&format!("{name}.read-only")).map(Source::Inherited),
        };
        let main = match (&args.socket_path, args.fd) {
            (Some(path), _) => Source::Path(path.clone()),
            (None, Some(fd)) => Source::Inherited(fd),
            (None, None) => {
                let fd = passed.named(name).or_else(|| if alone { passed.only() } else { None });
                Source::Inherited(fd.ok_or_else(|| {
                    format!(
                        "disk '{name}' has no socket: give --socket-path or --fd, or let systemd pass \
                         one with FileDescriptorName={name}"
                    )
                })?)
            }
        };
        let beside = args.socket_path.as_deref().and_then(Path::parent);
        let private = || {
            PrivateListener::new(beside)
                .map_err(|error| format!("could not make a socket for ourselves: {error}"))
        };
        let private_read_only = read_only.is_some().then(private).transpose()?;
        let private = private()?;
        Ok(Plan { args, name, main, read_only, permissions, private, private_read_only })
    }
}

/// How a server is told to end.
#[derive(Clone)]
pub struct Stop {
    shutdown: Arc<Shutdown>,
    wake: Arc<Event>,
}

impl Stop {
    /// Nobody has been told yet.
    pub fn new() -> io::Result<Stop> {
        Ok(Stop { shutdown: Arc::default(), wake: Arc::new(Event::new()?) })
    }

    /// Tells it.
    pub fn request(&self) {
        self.shutdown.request();
        self.wake.signal();
    }
}

/// A disk that is open.
pub struct Instance {
    /// Its name.
    pub name: &'static str,
    /// Its options.
    pub args: Args,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// Its sockets: the guest's first.
    pub monitors: Vec<Arc<Monitor>>,
    /// Its limits, and what is held for want of space.
    pub policy: Arc<Policy>,
}

/// Its listening sockets, with the router to the workers of all of them.
pub struct Sockets {
    router: Arc<Router>,
    main: (Socket, PrivateListener),
    read_only: Option<(Socket, PrivateListener)>,
}

impl Instance {
    /// Opens the disk and its sockets. The calling thread is the disk's own.
    pub fn open(plan: Plan) -> Result<(Arc<Instance>, Sockets), String> {
        let Plan { args, name, main, read_only, permissions, private, private_read_only } = plan;
        scope::enter(name);
        if let Some(cpus) = &args.cpu_affinity {
            cpus.apply().map_err(|error| format!("could not set the CPU affinity: {error}"))?;
        }
        let policy = Arc::new(policy(name, &args)?);
        let router = Arc::new(Router::default());
        let disk = disk::open::open(&args, &router)?;
        let least = disk.properties().logical_block;
        if let Some(block) = args.logical_block_size.filter(|block| *block < least) {
            let image = args.blk_file.display();
            return Err(format!("{image}: its blocks have {least} bytes, not {block}"));
        }
        // Not before the disk is open: who can connect is served.
        let sockets = Sockets {
            router,
            main: (listen(&main, &permissions)?, private),
            read_only: match read_only.zip(private_read_only) {
                Some((source, private)) => Some((listen(&source, &permissions)?, private)),
                None => None,
            },
        };
        let monitor = |access| {
            Arc::new(Monitor::new(name, access, args.num_queues, disk.gate().checkpoints().clone()))
        };
        let mut monitors = vec![monitor(Access::Main)];
        if sockets.read_only.is_some() {
            monitors.push(monitor(Access::ReadOnly));
        }
        let properties = disk.properties();
        log::info!(
            "serving {} ({} bytes{})",
            args.blk_file.display(),
            properties.capacity,
            if properties.read_only { ", read-only" } else { "" }
        );
        Ok((Arc::new(Instance { name, args, disk, monitors, policy }), sockets))
    }

    /// Serves until it is told to stop, and closes the disk.
    pub fn serve(&self, sockets: Sockets, stops: &[Stop; 2]) -> Result<(), String> {
        let [main, read_only] = stops;
        let served = thread::scope(|threads| {
            let second = sockets.read_only.as_ref().zip(self.monitors.get(1));
            let second = second.map(|(ends, monitor)| {
                threads.spawn(|| {
                    scope::enter(self.name);
                    let server = self.server(&sockets.router, ends, monitor, read_only);
                    // Whoever only reads cannot end what others do with the disk.
                    if let Err(error) = server.run() {
                        log::error!("the read-only socket is not served any more: {error}");
                    }
                })
            });
            let server = self.server(&sockets.router, &sockets.main, &self.monitors[0], main);
            let served = server.run();
            read_only.request();
            drop(second);
            served
        });
        let router = sockets.router.clone();
        drop(sockets);
        let closed = self.disk.close();
        if let Some(recorder) = router.recorder() {
            recorder.finish();
        }
        self.report();
        served.and(closed)
    }

    fn server<'a>(
        &'a self,
        router: &Arc<Router>,
        ends: &'a (Socket, PrivateListener),
        monitor: &Arc<Monitor>,
        stop: &Stop,
    ) -> Server<'a> {
        let (socket, private) = ends;
        let serial = self.args.serial.clone();
        let presentation = Presentation {
            queues: self.args.num_queues,
            workers: workers(&self.args),
            writeback: self.args.cache.is_writeback(),
            incoming: self.args.incoming,
            logical_block: self.args.logical_block_size.unwrap_or(512),
            serial: serial.unwrap_or_else(|| self.disk.properties().serial),
            monitor: monitor.clone(),
            policy: self.policy.clone(),
            inflight: !self.args.no_inflight,
            poll: Duration::from_micros(self.args.poll_us.into()),
            beside: (monitor.access() == Access::ReadOnly).then(|| self.monitors[0].clone()),
        };
        Server {
            disk: self.disk.clone(),
            presentation,
            router: router.clone(),
            socket,
            private,
            notifier: Notifier::default(),
            shutdown: stop.shutdown.clone(),
            wake: stop.wake.clone(),
        }
    }

    /// All figures.
    pub fn statistics(&self) -> Value {
        let mut statistics = self.disk.statistics();
        if let Some(object) = statistics.as_object_mut() {
            for monitor in &self.monitors {
                let key = match monitor.access() {
                    Access::Main => "queues",
                    Access::ReadOnly => "read_only_queues",
                };
                object.insert(key.to_owned(), monitor.to_json());
            }
        }
        statistics
    }

    /// Writes the statistics to the log and, where there is one, to the file.
    pub fn report(&self) {
        let statistics = self.statistics();
        log::debug!("statistics: {statistics}");
        if let Some(file) = &self.args.stats_file
            && let Err(error) = replace(file, &format!("{statistics}\n"))
        {
            log::error!("could not write {}: {error}", file.display());
        }
    }

    /// The state of the disk, for people and programs.
    pub fn status(&self) -> Value {
        let properties = self.disk.properties();
        let sockets: Vec<Value> = self
            .monitors
            .iter()
            .map(|monitor| {
                let cache =
                    if monitor.has_volatile_cache() { "write back" } else { "write through" };
                json!({
                    "socket": monitor.access().name(),
                    "connected": monitor.is_connected(),
                    "connections": monitor.connections(),
                    "cache_type": if monitor.is_connected() { json!(cache) } else { Value::Null },
                })
            })
            .collect();
        json!({
            "disk": self.name,
            "image": self.args.blk_file.to_string_lossy(),
            "format": format!("{:?}", self.args.format).to_lowercase(),
            "capacity": properties.capacity,
            "read_only": properties.read_only,
            "state": format!("{:?}", self.disk.hold()).to_lowercase(),
            "throttling": self.policy.limiter().limits().to_string(),
            "held_for_space": self.policy.full_host().map(|full_host| full_host.held()),
            "sockets": sockets,
        })
    }
}

fn policy(name: &'static str, args: &Args) -> Result<Policy, String> {
    let policy = Policy::new(Choice {
        on_enospc: args.on_enospc,
        discard: args.discard,
        detect_zeroes: args.detect_zeroes,
        limits: args.throttling,
    })?;
    if let Some(full_host) = policy.full_host() {
        full_host.listen(Box::new(move |notice| {
            let event = match notice {
                Notice::HostFull => "host-full",
                Notice::SpaceAgain => "space-again",
            };
            events::publish_of(Some(name), event, Value::Null);
        }));
    }
    Ok(policy)
}

fn listen(source: &Source, permissions: &Result<Permissions, String>) -> Result<Socket, String> {
    match source {
        Source::Path(path) => {
            let bind = |permissions: &Permissions| {
                Socket::bind(path, permissions).map_err(|error| reason(&error))
            };
            let bound = permissions.as_ref().map_err(String::clone).and_then(bind);
            bound.map_err(|reason| format!("could not listen on {}: {reason}", path.display()))
        }
        Source::Inherited(fd) => Socket::inherit(*fd)
            .map_err(|error| format!("could not listen on descriptor {fd}: {error}")),
    }
}

/// A live socket's owner is worth naming as what it is.
pub fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens there, or it is no socket".to_owned(),
        _ => error.to_string(),
    }
}

/// Replaces the file at once: a reader sees the old content or the new.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

/// One thread per queue, as far as there are processors for them.
fn workers(args: &Args) -> u16 {
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    let wanted = args.threads.unwrap_or(u16::try_from(processors).unwrap_or(u16::MAX));
    wanted.clamp(1, args.num_queues)
}
