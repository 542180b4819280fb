//! Takes rights away from a program before it starts.

#![allow(unsafe_code)]

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// io_uring_setup, io_uring_enter and io_uring_register, which have these numbers everywhere.
const IO_URING: [i64; 3] = [425, 426, 427];

/// Lets the program start with io_uring forbidden, as container runtimes do it.
pub fn forbid_io_uring(command: &mut Command) {
    let rules = IO_URING.into_iter().map(|call| (call, Vec::new())).collect();
    let errno = SeccompAction::Errno(1);
    let arch = std::env::consts::ARCH.try_into().expect("an architecture with seccomp");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, arch).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    // SAFETY: between fork and exec this makes two system calls and allocates nothing, unless it fails.
    unsafe {
        command.pre_exec(move || {
            seccompiler::apply_filter(&program).map_err(|_| io::ErrorKind::PermissionDenied.into())
        });
    }
}
