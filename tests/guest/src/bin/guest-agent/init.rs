//! The agent as the guest's first process: file systems, kernel modules, the report line, reboot.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Mounts what every program expects, loads the modules named in /modules in order, and brings up the
/// standard streams.
pub fn start() -> io::Result<()> {
    for dir in ["/proc", "/sys", "/dev", "/tmp", "/run", "/mnt"] {
        std::fs::create_dir_all(dir)?;
    }
    mount("proc", "/proc", "proc", "")?;
    mount("sysfs", "/sys", "sysfs", "")?;
    mount("devtmpfs", "/dev", "devtmpfs", "")?;
    mount("tmpfs", "/tmp", "tmpfs", "")?;
    mount("tmpfs", "/run", "tmpfs", "")?;
    for name in std::fs::read_to_string("/modules/order")?.lines() {
        load_module(&Path::new("/modules").join(name))?;
    }
    Ok(())
}

/// mount(2).
pub fn mount(source: &str, target: &str, kind: &str, options: &str) -> io::Result<()> {
    let [source, target, kind, options] = [source, target, kind, options].map(CString::new);
    let (source, target, kind, options) = (source?, target?, kind?, options?);
    // SAFETY: four C strings that live through the call.
    check(unsafe {
        let data = options.as_ptr().cast();
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, data)
    })
}

/// umount(2).
pub fn umount(target: &str) -> io::Result<()> {
    let target = CString::new(target)?;
    // SAFETY: a C string that lives through the call.
    check(unsafe { libc::umount(target.as_ptr()) })
}

/// sync(2).
pub fn sync() {
    // SAFETY: no memory is passed.
    unsafe { libc::sync() };
}

/// Ends the guest: sync(2), then a reboot or a power-off.
pub fn finish(again: bool) -> io::Error {
    let command = if again { libc::RB_AUTOBOOT } else { libc::RB_POWER_OFF };
    sync();
    // SAFETY: no memory is passed; the call does not return on success.
    unsafe { libc::reboot(command) };
    io::Error::last_os_error()
}

/// Opens the serial line to the host in raw mode: bytes go through unchanged and without echo.
pub fn open_line() -> io::Result<File> {
    let line = OpenOptions::new().read(true).write(true).open("/dev/ttyS1")?;
    // SAFETY: termios is plain data that tcgetattr fills in, on a descriptor that is open.
    check(unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        libc::tcgetattr(line.as_raw_fd(), &raw mut settings);
        libc::cfmakeraw(&raw mut settings);
        libc::cfsetspeed(&raw mut settings, libc::B115200);
        libc::tcsetattr(line.as_raw_fd(), libc::TCSANOW, &raw const settings)
    })?;
    Ok(line)
}

/// Binds the calling thread to one processor, and so to that processor's queue of the disk.
pub fn bind_to_processor(index: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain data; the kernel reads it during the call.
    check(unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(index, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    })
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open descriptor and an empty C string.
    let code = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if code == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(()),
        _ => Err(io::Error::new(error.kind(), format!("module {}: {error}", path.display()))),
    }
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
