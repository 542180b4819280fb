//! System calls that remain, by seccomp.
//!
//! What is listed is allowed. A call that is not gets EPERM, not a signal: a list like this is never sure
//! to be complete for the next C library, and a guest's disk that fails one call it can do without is
//! better than one that dies and dies again at each restart. Calls that nothing here could ever make, and
//! that code of an attacker would (another program, another process's memory, another name space, the
//! kernel itself), end the process at once: it has nothing left to lose, and what the guest was told is
//! durable or in the completion log (P1, P2).
//!
//! io_uring goes past these lists once it is set up; what it can open and connect to is Landlock's to
//! say, and it can start no program.

use libc::{c_long, *};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allowed whatever the arguments are.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Files, by descriptor and by name: names are Landlock's.
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv,
    SYS_pwritev, SYS_preadv2, SYS_pwritev2, SYS_lseek, SYS_fallocate, SYS_ftruncate, SYS_fsync,
    SYS_fdatasync, SYS_sync_file_range, SYS_fadvise64, SYS_openat, SYS_close, SYS_fstat,
    SYS_newfstatat, SYS_statx, SYS_statfs, SYS_fstatfs, SYS_fcntl, SYS_flock, SYS_ioctl, SYS_dup,
    SYS_dup3, SYS_getdents64, SYS_renameat, SYS_renameat2, SYS_unlinkat, SYS_mkdirat, SYS_fchmod,
    SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_readlinkat, SYS_faccessat, SYS_faccessat2,
    SYS_getcwd, SYS_umask,
    // Memory; executable memory is below.
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_msync, SYS_mlock, SYS_munlock,
    SYS_membarrier, SYS_memfd_create,
    // Threads; making them is below.
    SYS_futex, SYS_set_robust_list, SYS_get_robust_list, SYS_rseq, SYS_set_tid_address,
    SYS_gettid, SYS_getpid, SYS_getppid, SYS_tgkill, SYS_exit, SYS_exit_group, SYS_prctl,
    SYS_sched_yield, SYS_sched_getaffinity, SYS_sched_setaffinity,
    // Signals.
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait,
    SYS_rt_sigsuspend, SYS_rt_sigpending, SYS_sigaltstack, SYS_signalfd4, SYS_restart_syscall,
    // Time and chance.
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday,
    SYS_getrandom,
    // Events.
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_ppoll, SYS_pselect6,
    SYS_eventfd2, SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime, SYS_pipe2,
    // Sockets; making them is below.
    SYS_bind, SYS_listen, SYS_accept, SYS_accept4, SYS_connect, SYS_getsockopt, SYS_setsockopt,
    SYS_getsockname, SYS_getpeername, SYS_sendmsg, SYS_recvmsg, SYS_sendto, SYS_recvfrom,
    SYS_shutdown,
    // The rings.
    SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
    // Questions.
    SYS_uname, SYS_sysinfo, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_getgroups,
    SYS_prlimit64, SYS_getrusage, SYS_capget, SYS_getcpu,
];

/// Calls of the same kind that only this architecture has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_HERE: &[c_long] = &[
    SYS_open, SYS_stat, SYS_lstat, SYS_access, SYS_rename, SYS_unlink, SYS_mkdir, SYS_rmdir,
    SYS_chmod, SYS_readlink, SYS_dup2, SYS_poll, SYS_select, SYS_epoll_wait, SYS_epoll_create,
    SYS_eventfd, SYS_pipe, SYS_getdents, SYS_time, SYS_arch_prctl, SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// The process ends.
#[rustfmt::skip]
const FATAL: &[c_long] = &[
    SYS_execve, SYS_execveat, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_mount,
    SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_setns, SYS_unshare, SYS_init_module,
    SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_bpf, SYS_perf_event_open,
    SYS_keyctl, SYS_add_key, SYS_request_key, SYS_open_by_handle_at, SYS_userfaultfd, SYS_reboot,
    SYS_swapon, SYS_swapoff, SYS_setuid, SYS_setgid, SYS_setresuid, SYS_setresgid, SYS_setgroups,
    SYS_capset, SYS_personality,
];

/// Confines the calling thread and those it starts.
pub fn confine() -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("could not set up seccomp: {error}");
    let filters = filters().map_err(|error| failed(&error))?;
    for filter in filters {
        seccompiler::apply_filter(&filter).map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// Of several filters the strictest answer counts.
fn filters() -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let plain =
        |calls: &[c_long]| -> Rules { calls.iter().map(|call| (*call, Vec::new())).collect() };
    let mut allowed = plain(ALLOWED);
    allowed.extend(plain(ALLOWED_HERE));
    // Memory that is not executable: all code has been loaded.
    let exec = PROT_EXEC as u64;
    allowed.insert(SYS_mmap, vec![masked(2, exec, 0)?]);
    allowed.insert(SYS_mprotect, vec![masked(2, exec, 0)?]);
    // Threads, not processes.
    let thread = CLONE_THREAD as u64;
    allowed.insert(SYS_clone, vec![masked(0, thread, thread)?]);
    // Unix sockets.
    let family = u64::from(u32::MAX);
    let unix = AF_UNIX as u64;
    allowed.insert(SYS_socket, vec![masked(0, family, unix)?]);
    allowed.insert(SYS_socketpair, vec![masked(0, family, unix)?]);
    // Its flags lie in memory, where no filter sees them; the C library then takes `clone`.
    allowed.insert(SYS_clone3, Vec::new());
    let errno = |number: c_int| SeccompAction::Errno(number as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    let make = |rules, other, listed| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, other, listed, arch)?.try_into()
    };
    Ok([
        make(plain(&[SYS_clone3]), SeccompAction::Allow, errno(ENOSYS))?,
        make(plain(FATAL), SeccompAction::Allow, SeccompAction::KillProcess)?,
        make(allowed, errno(EPERM), SeccompAction::Allow)?,
    ])
}

/// Argument `number`, as far as the mask goes, is `value`.
fn masked(number: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    let condition = SeccompCondition::new(number, SeccompCmpArgLen::Qword, operator, value)?;
    SeccompRule::new(vec![condition])
}
