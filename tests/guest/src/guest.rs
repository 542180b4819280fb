//! A running machine and the conversation with its agent.

use crate::process::Process;
use crate::{Disk, Kit, Qmp, Result, programs};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A boot under an emulated processor takes about 10 s on an idle machine, and minutes on a very busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// No request may leave the guest silent for longer, unless a test is less patient.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);
/// What a machine that stands still has said has arrived by then.
const QUIET: Duration = Duration::from_secs(1);
/// How often QEMU looks for a daemon that is gone.
pub const RECONNECT_MS: u32 = 200;
/// Memory of the guest, MiB.
const MEMORY_MIB: u32 = 1024;

/// Kinds of machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// What it has at its start is what it has.
    Fixed,
    /// Each disk is in a slot of its own, and there is room for more memory.
    HotPlug,
}

/// A running machine. It ends when this value goes away.
#[derive(Debug)]
pub struct Guest {
    qemu: Process,
    to_agent: ChildStdin,
    from_agent: Receiver<String>,
    console: PathBuf,
    monitor: PathBuf,
    kernel: String,
    patience: Duration,
}

impl Guest {
    /// Boots a machine with the disks as /dev/vda, /dev/vdb, .. and waits for its agent.
    pub fn boot(kit: &Kit, dir: &Path, disks: &[&Disk], queues: u32) -> Result<Guest> {
        let mut guest = Guest::power_on(kit, dir, "", disks, queues, Machine::Fixed)?;
        guest.wait_for_start()?;
        Ok(guest)
    }

    /// A machine of this name, which starts meanwhile. Disk number N is the device `diskN`.
    pub fn power_on(
        kit: &Kit,
        dir: &Path,
        name: &str,
        disks: &[&Disk],
        queues: u32,
        machine: Machine,
    ) -> Result<Guest> {
        Guest::start(kit, dir, name, disks, queues, machine, &[])
    }

    /// A machine of this name that waits for a guest to come by migration from a machine like it.
    pub fn await_migration(
        kit: &Kit,
        dir: &Path,
        name: &str,
        disks: &[&Disk],
        queues: u32,
    ) -> Result<Guest> {
        Guest::start(kit, dir, name, disks, queues, Machine::Fixed, &["-incoming", "defer"])
    }

    fn start(
        kit: &Kit,
        dir: &Path,
        name: &str,
        disks: &[&Disk],
        queues: u32,
        machine: Machine,
        more: &[&str],
    ) -> Result<Guest> {
        let console = dir.join(format!("{name}console.log"));
        let monitor = dir.join(format!("{name}monitor"));
        let mut command = Command::new(programs::find("qemu-system-x86_64")?);
        arguments(&mut command, kit, &console, queues, machine);
        command.args(more);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        for (index, disk) in disks.iter().enumerate() {
            let socket = disk.socket().display();
            let chardev =
                format!("socket,id=socket{index},path={socket},reconnect-ms={RECONNECT_MS}");
            let mut device = format!(
                "vhost-user-blk-pci,id=disk{index},chardev=socket{index},num-queues={queues}"
            );
            if machine == Machine::HotPlug {
                let port = format!("pcie-root-port,id=port{index},chassis={}", index + 1);
                command.args(["-device", &port]);
                device += &format!(",bus=port{index}");
            }
            command.args(["-chardev", &chardev, "-device", &device]);
        }
        let log = std::fs::File::options().create(true).append(true).open(dir.join("qemu.log"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut qemu = Process::start(&mut command)?;
        let to_agent = qemu.child().stdin.take().ok_or("QEMU without standard input")?;
        let output = qemu.child().stdout.take().ok_or("QEMU without standard output")?;
        let (sender, from_agent) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(output).split(b'\n');
            while let Some(Ok(line)) = lines.next() {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let kernel = String::new();
        let patience = SILENCE_LIMIT;
        Ok(Guest { qemu, to_agent, from_agent, console, monitor, kernel, patience })
    }

    /// From now on a guest that is silent for so long has failed.
    pub fn set_patience(&mut self, limit: Duration) {
        self.patience = limit;
    }

    /// Waits for the end of what [`Guest::call_with_events`] left working and shows its events. Returns the
    /// error that ended it, if one did.
    pub fn see_end(&mut self, mut event: impl FnMut(&Value)) -> Result<Option<String>> {
        loop {
            let message = self.receive(self.patience)?;
            match (message.get("event"), message.get("error")) {
                (Some(value), _) => event(value),
                (None, None) => return Ok(None),
                (None, Some(error)) => return Ok(Some(error.as_str().unwrap_or("").to_owned())),
            }
        }
    }

    /// Goes on with what [`Guest::call_with_events`] left working, perhaps in another machine: shows its
    /// events until `event` returns false. The first may be lost.
    pub fn go_on(&mut self, mut event: impl FnMut(&Value) -> bool) -> Result<()> {
        loop {
            let message = self.receive(self.patience)?;
            match (message.get("event"), message.get("error")) {
                (Some(value), _) if !event(value) => return Ok(()),
                (Some(_), _) => {}
                (None, Some(error)) => return Err(self.failure(&error.to_string())),
                (None, None) => return Err(self.failure("the agent has ended its work")),
            }
        }
    }

    /// Shows the events that a machine that stands still has yet to be asked for.
    pub fn see_rest(&mut self, mut event: impl FnMut(&Value)) {
        while let Ok(message) = self.receive(QUIET) {
            message.get("event").into_iter().for_each(&mut event);
        }
    }

    /// Version of the guest's kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// A connection to the machine's monitor. One at a time.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.monitor)
    }

    /// What the guest's kernel has printed: warnings and worse.
    pub fn console(&self) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned()
    }

    /// An error if the guest's kernel has seen an I/O error or a task that waited for too long.
    pub fn see_no_errors(&self) -> Result<()> {
        const SIGNS: [&str; 5] =
            ["I/O error", "blocked for more than", "is not a head", "BUG:", "Oops"];
        let console = self.console();
        let found: Vec<&str> =
            console.lines().filter(|line| SIGNS.iter().any(|sign| line.contains(sign))).collect();
        if found.is_empty() { Ok(()) } else { Err(self.failure(&found.join("\n"))) }
    }

    /// Waits until the guest's kernel and its agent have started anew.
    pub fn wait_for_start(&mut self) -> Result<()> {
        self.wait_for_agent()
    }

    /// Asks the agent for something that has no events, and waits for its answer.
    pub fn call(&mut self, request: Value) -> Result<Value> {
        match self.call_with_events(request, |_| false) {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(self.failure("an event instead of an answer: is the agent at work?")),
            Err(error) => Err(error),
        }
    }

    /// As `call`, and shows the events that come before the answer. If `event` returns false, this
    /// returns `None` at once and the agent is left working.
    pub fn call_with_events(
        &mut self,
        request: Value,
        mut event: impl FnMut(&Value) -> bool,
    ) -> Result<Option<Value>> {
        self.send(&request)?;
        loop {
            let message = self.receive(self.patience).map_err(|e| format!("{request}: {e}"))?;
            if let Some(error) = message.get("error") {
                let error = error.as_str().unwrap_or_default();
                return Err(self.failure(&format!("{request}: {error}")));
            }
            if let Some(value) = message.get("ok") {
                return Ok(Some(value.clone()));
            }
            match message.get("event") {
                Some(value) if !event(value) => return Ok(None),
                Some(_) => {}
                None => return Err(self.failure(&format!("{request}: unexpected {message}"))),
            }
        }
    }

    /// Runs a program in the guest; its exit code must be 0. Returns its output.
    pub fn run(&mut self, argv: &[&str]) -> Result<String> {
        self.run_with_input(argv, "")
    }

    /// As `run`, with standard input.
    pub fn run_with_input(&mut self, argv: &[&str], input: &str) -> Result<String> {
        let answer = self.call(json!({ "op": "run", "argv": argv, "stdin": input }))?;
        let output = answer["output"].as_str().unwrap_or_default();
        if answer["status"] != 0 {
            let status = &answer["status"];
            return Err(self.failure(&format!("{argv:?} ended with {status}:\n{output}")));
        }
        Ok(output.to_owned())
    }

    /// Restarts the guest's kernel; QEMU and the daemon stay.
    pub fn reboot(&mut self) -> Result<()> {
        self.send(&json!({ "op": "reboot" }))?;
        self.wait_for_agent()
    }

    /// Ends the guest in an orderly way.
    pub fn power_off(mut self) -> Result<()> {
        self.send(&json!({ "op": "poweroff" }))?;
        self.qemu.wait(SILENCE_LIMIT)
    }

    /// Waits for the end of QEMU.
    pub fn wait_for_end(mut self) -> Result<()> {
        self.qemu.wait(SILENCE_LIMIT)
    }

    fn send(&mut self, request: &Value) -> Result<()> {
        // The agent's line takes a few bytes at a time, and QEMU waits for the guest to read them.
        self.to_agent.write_all(format!("{request}\n").as_bytes())?;
        Ok(self.to_agent.flush()?)
    }

    fn wait_for_agent(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.receive(left)?;
            if let Some(kernel) = message["hello"]["kernel"].as_str() {
                self.kernel = kernel.to_owned();
                return Ok(());
            }
        }
    }

    fn receive(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.from_agent.recv_timeout(left) {
                // The firmware may write to the line before the agent does; that is not JSON.
                Ok(line) => match line.find('{').map(|at| serde_json::from_str(&line[at..])) {
                    Some(Ok(message)) => return Ok(message),
                    _ => continue,
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.failure(&format!("the guest was silent for {limit:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failure("QEMU ended"));
                }
            }
        }
    }

    /// An error with the end of the guest's console, which is where a kernel says what hurt it.
    fn failure(&self, what: &str) -> crate::Error {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("{what}\n--- end of the guest's console ---\n{tail}").into()
    }
}

fn arguments(command: &mut Command, kit: &Kit, console: &Path, processors: u32, machine: Machine) {
    let accelerator = std::env::var("EXD_QEMU_ACCEL").unwrap_or_else(|_| "tcg".into());
    let memory = format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on");
    let processor = if accelerator.starts_with("kvm") { "host" } else { "max,la57=off" };
    command.args(["-accel", &accelerator, "-machine", "q35", "-cpu", processor]);
    let mut size = format!("{MEMORY_MIB}M");
    if machine == Machine::HotPlug {
        size += &format!(",slots=4,maxmem={}M", 2 * MEMORY_MIB);
    }
    command.args(["-smp", &processors.to_string(), "-m", &size]);
    command.args(["-object", &memory, "-numa", "node,memdev=mem"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    let console = format!("file,id=console,path={}", console.display());
    command.args(["-chardev", &console, "-serial", "chardev:console"]);
    command.args(["-chardev", "stdio,id=agent,signal=off", "-serial", "chardev:agent"]);
    command.arg("-kernel").arg(&kit.kernel).arg("-initrd").arg(&kit.initramfs);
    let line = "console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on tsc=reliable \
                memhp_default_state=online";
    command.args(["-append", line]);
}
