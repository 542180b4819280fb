//! Which disk the calling thread serves, for messages and events.

use std::cell::Cell;

thread_local! {
    static DISK: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// The calling thread serves this disk from now on.
pub fn enter(disk: &'static str) {
    DISK.set(Some(disk));
}

/// The disk that the calling thread serves.
pub fn disk() -> Option<&'static str> {
    // A thread that is ending serves nothing any more.
    DISK.try_with(Cell::get).ok().flatten()
}

/// A name that lives as long as the process, as its disks do.
pub fn keep(name: String) -> &'static str {
    Box::leak(name.into_boxed_str())
}
