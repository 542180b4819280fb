//! A Linux guest in QEMU on a disk of ours.
//!
//! [`Kit`] is the guest's kernel and initramfs, [`Disk`] an image with the daemon that serves it, and
//! [`Guest`] a running machine whose agent does what it is asked. The machine needs `qemu-system-x86_64`
//! and the kernel that `cargo xtask setup` fetches. `EXD_QEMU_ACCEL` overrides the accelerator (`tcg`).

pub mod disk;
pub mod guest;
pub mod kit;
pub mod process;
pub mod programs;
pub mod qmp;
pub mod stamp;
pub mod steps;
pub mod world;

pub use disk::{Disk, Format};
pub use guest::Guest;
pub use kit::Kit;
pub use programs::Programs;
pub use qmp::Qmp;
pub use world::World;

/// What went wrong, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// Result of everything here.
pub type Result<T> = std::result::Result<T, Error>;
