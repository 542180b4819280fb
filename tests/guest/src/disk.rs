//! A disk image and the daemon that serves it.

use crate::process::{self, Process};
use crate::{Programs, Result, programs};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long a daemon may take to listen, and to end after SIGTERM.
const DAEMON_LIMIT: Duration = Duration::from_secs(60);

/// What the guest's disk is stored in, and who serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An EXD image as imgtool makes it unless told otherwise, served by our daemon.
    Exd,
    /// An EXD image in blocks of 4 KiB: at sector 63 each write of that size has two blocks in part, which
    /// it shares with its neighbours.
    ExdBlocks,
    /// A raw file, served by our daemon: the baseline that shows whose fault a failure is.
    Raw,
    /// A raw file, served by qemu-storage-daemon: shows that a test itself is right.
    Reference,
}

impl Format {
    /// The image is EXD.
    pub fn is_exd(self) -> bool {
        matches!(self, Format::Exd | Format::ExdBlocks)
    }

    /// The name of the format, as our programs take it.
    fn name(self) -> &'static str {
        if self.is_exd() { "exd" } else { "raw" }
    }
}

/// An image file and, while it is served, the daemon. `EXD_IO_ENGINE` says how our daemon does its I/O.
#[derive(Debug)]
pub struct Disk {
    programs: Programs,
    format: Format,
    image: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    queues: u32,
    more: Vec<String>,
    daemon: Option<Process>,
}

impl Disk {
    /// Makes a new image `name` of `bytes` in `dir`, which must exist.
    pub fn create(
        programs: &Programs,
        dir: &Path,
        name: &str,
        format: Format,
        bytes: u64,
    ) -> Result<Disk> {
        let image = dir.join(format!("{name}.{}", format.name()));
        match format {
            Format::Exd | Format::ExdBlocks => {
                let mut command = Command::new(&programs.imgtool);
                command.arg("create").args(["-f", "exd"]);
                if format == Format::ExdBlocks {
                    command.args(["-o", "block_size=4096"]);
                }
                process::output(command.arg(&image).arg(bytes.to_string()))?;
            }
            Format::Raw | Format::Reference => File::create(&image)?.set_len(bytes)?,
        }
        Ok(Disk {
            programs: programs.clone(),
            format,
            image,
            socket: dir.join(format!("{name}.sock")),
            log: dir.join(format!("{name}.daemon.log")),
            queues: 2,
            more: Vec::new(),
            daemon: None,
        })
    }

    /// A disk that somebody else serves.
    pub fn served_elsewhere(programs: &Programs, image: &Path, socket: &Path) -> Disk {
        Disk {
            programs: programs.clone(),
            format: Format::Reference,
            image: image.to_owned(),
            socket: socket.to_owned(),
            log: image.with_extension("log"),
            queues: 1,
            more: Vec::new(),
            daemon: None,
        }
    }

    /// The same image with a daemon of its own, which has these arguments more. `name` names its socket.
    pub fn twin(&self, name: &str, more: &[&str]) -> Disk {
        let dir = self.image.parent().unwrap_or(Path::new("."));
        Disk {
            programs: self.programs.clone(),
            format: self.format,
            image: self.image.clone(),
            socket: dir.join(format!("{name}.sock")),
            log: dir.join(format!("{name}.daemon.log")),
            queues: self.queues,
            more: more.iter().map(|text| (*text).to_owned()).collect(),
            daemon: None,
        }
    }

    /// The same disk with these arguments more for its daemon.
    pub fn with(mut self, more: &[&str]) -> Disk {
        self.more.extend(more.iter().map(|text| (*text).to_owned()));
        self
    }

    /// Asks the daemon by its control socket.
    pub fn control(&self, request: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(self.socket.with_extension("control"))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        if answer["ok"] == true { Ok(answer) } else { Err(format!("{request}: {answer}").into()) }
    }

    /// How many requests the daemon has completed on its disk of this number. None, as long as it does not
    /// answer.
    pub fn completed(&self, number: usize) -> u64 {
        let stats = self.control(&json!({ "command": "stats" })).unwrap_or_default();
        let queues = stats["disks"][number]["queues"].as_array().into_iter().flatten();
        let kinds = queues.filter_map(Value::as_object).flat_map(|queue| queue.values());
        kinds.filter_map(|kind| kind["requests"].as_u64()).sum()
    }

    /// Starts the daemon and waits until it listens.
    pub fn serve(&mut self) -> Result<()> {
        self.launch()?;
        self.await_daemon(&[])
    }

    /// Starts the daemon and does not wait.
    pub fn launch(&mut self) -> Result<()> {
        let command = match self.format {
            Format::Exd | Format::ExdBlocks | Format::Raw => self.our_daemon(),
            Format::Reference => self.reference_daemon()?,
        };
        self.start(command, &[])
    }

    /// One daemon for this disk and others, which lives and ends with this one.
    pub fn serve_with(&mut self, others: &[&Disk]) -> Result<()> {
        let disks = std::iter::once(&*self).chain(others.iter().copied());
        let config = self.socket.with_extension("toml");
        std::fs::write(&config, disks.map(Disk::table).collect::<String>())?;
        let mut command = Command::new(&self.programs.vhost_daemon);
        command.arg(format!("--config={}", config.display()));
        command.arg(self.control_path());
        self.start(command, others)?;
        self.await_daemon(others)
    }

    fn start(&mut self, mut command: Command, others: &[&Disk]) -> Result<()> {
        for socket in std::iter::once(&*self).chain(others.iter().copied()).map(Disk::socket) {
            if socket.exists() {
                std::fs::remove_file(socket)?;
            }
        }
        let log = File::options().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.daemon = Some(Process::start(&mut command)?);
        Ok(())
    }

    fn await_daemon(&mut self, others: &[&Disk]) -> Result<()> {
        let daemon = self.daemon.as_mut().ok_or("no daemon")?;
        process::wait_until("the daemon listens", DAEMON_LIMIT, || {
            if !daemon.is_running() {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                return Err(format!("the daemon ended at its start:\n{log}").into());
            }
            Ok(self.socket.exists() && others.iter().all(|disk| disk.socket.exists()))
        })
    }

    /// What the kernel says of the running daemon in /proc/PID/`file`.
    pub fn daemon_proc(&self, file: &str) -> Result<String> {
        let daemon = self.daemon.as_ref().ok_or("no daemon")?;
        Ok(std::fs::read_to_string(format!("/proc/{}/{file}", daemon.id()))?)
    }

    /// SIGTERM: the daemon must close the image and exit 0.
    pub fn stop(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.terminate(DAEMON_LIMIT),
            None => Ok(()),
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        drop(self.daemon.take());
    }

    /// Whether the running daemon has an io_uring.
    pub fn has_io_uring(&self) -> Result<bool> {
        let daemon = self.daemon.as_ref().ok_or("no daemon")?;
        let files = std::fs::read_dir(format!("/proc/{}/fd", daemon.id()))?.flatten();
        let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        Ok(targets.any(|target| target.to_string_lossy().contains("io_uring")))
    }

    /// The image file.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The socket that the daemon listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether the daemon is ours.
    pub fn is_ours(&self) -> bool {
        self.format != Format::Reference
    }

    /// What the daemon has printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The same from this byte on.
    pub fn log_from(&self, start: usize) -> String {
        let mut text = Vec::new();
        let read = File::open(&self.log).and_then(|mut log| {
            log.seek(SeekFrom::Start(start as u64))?;
            log.read_to_end(&mut text)
        });
        read.map(|_| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }

    /// Bytes of host space that the image takes, as `du` counts them.
    pub fn host_bytes(&self) -> Result<u64> {
        Ok(std::fs::metadata(&self.image)?.blocks() * 512)
    }

    /// `imgtool check`: fails unless the image has no corruption and no leak. Returns what it printed.
    pub fn check(&self) -> Result<String> {
        if !self.format.is_exd() {
            return Ok(String::new());
        }
        process::output(&mut self.check_command())
    }

    /// `imgtool check` of the image as a killed daemon left it. The kernel may still be carrying out writes
    /// of the dead, and until they have landed the image is locked.
    pub fn check_after_death(&self) -> Result<String> {
        let mut report = String::new();
        process::wait_until("the image is unlocked and without fault", DAEMON_LIMIT, || {
            let (code, stdout, stderr) = process::output_with_code(&mut self.check_command())?;
            report = stdout + &stderr;
            Ok(!self.format.is_exd() || code == 0)
        })
        .map_err(|error| format!("{error}\n{report}"))?;
        Ok(report)
    }

    fn check_command(&self) -> Command {
        let mut command = Command::new(&self.programs.imgtool);
        command.arg("check").arg(&self.image);
        command
    }

    fn our_daemon(&self) -> Command {
        let mut command = Command::new(&self.programs.vhost_daemon);
        command.arg(format!("--socket-path={}", self.socket.display()));
        command.arg(format!("--blk-file={}", self.image.display()));
        command.arg(format!("--num-queues={}", self.queues));
        let format = self.format.name();
        command.arg(format!("--format={format}")).args(&self.more);
        command.arg(self.control_path());
        if let Some(engine) = self.io_engine() {
            command.arg(format!("--io-engine={engine}"));
        }
        command
    }

    /// How the daemons of this run are to do their I/O, unless the disk has its own way.
    fn io_engine(&self) -> Option<String> {
        let own = self.more.iter().any(|option| option.starts_with("--io-engine"));
        std::env::var("EXD_IO_ENGINE").ok().filter(|_| !own)
    }

    fn control_path(&self) -> String {
        format!("--control-path={}", self.socket.with_extension("control").display())
    }

    /// What a daemon of several disks reads of this one.
    fn table(&self) -> String {
        let (image, socket) = (self.image.display(), self.socket.display());
        let format = self.format.name();
        let mut text = format!(
            "[[disk]]\nblk-file = '{image}'\nsocket-path = '{socket}'\nformat = '{format}'\n\
             num-queues = {}\n",
            self.queues
        );
        if let Some(engine) = self.io_engine() {
            text += &format!("io-engine = '{engine}'\n");
        }
        for option in &self.more {
            let option = option.trim_start_matches('-');
            text += &match option.split_once('=') {
                Some((key, value)) => format!("{key} = '{value}'\n"),
                None => format!("{option} = true\n"),
            };
        }
        text
    }

    fn reference_daemon(&self) -> Result<Command> {
        let mut command = Command::new(programs::find("qemu-storage-daemon")?);
        let (image, socket) = (self.image.display(), self.socket.display());
        let node = format!("driver=file,node-name=f,filename={image},discard=unmap,aio=io_uring");
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,\
             num-queues={}",
            self.queues
        );
        command.args(["--blockdev", &node, "--export", &export]);
        Ok(command)
    }
}
