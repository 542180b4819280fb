//! Finds the programs under test, built with the profile of the test that asks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

/// The program of this name, brought up to date once per test process.
pub fn program(name: &str) -> PathBuf {
    static BUILT: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Default::default);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    let profile_dir = profile_dir();
    let target_dir = profile_dir.parent().expect("the profile's directory has a parent");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let package = if name == "exd-ctl" { "vhost-daemon" } else { name };
    cargo.args(["build", "--quiet", "--package", package, "--bin", name]);
    cargo.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"));
    cargo.arg("--target-dir").arg(target_dir);
    if profile_dir.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "{name} could not be built");
    profile_dir.join(name)
}

/// Where the running test's profile puts its programs: `target/debug` for `target/debug/deps/test-123`.
fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its name");
    let deps = test.parent().expect("it lies in a directory");
    deps.parent().expect("which lies in the profile's").to_owned()
}

/// A directory of the test's own on a disk (the system's temporary directory may be memory, where there
/// is no direct I/O), or in EXD_TEST_DIR, to try another file system. Removed with the returned value.
pub fn scratch() -> tempfile::TempDir {
    let parent = std::env::var_os("EXD_TEST_DIR").map_or_else(profile_dir, PathBuf::from);
    tempfile::Builder::new().prefix("exd-system-").tempdir_in(parent).expect("temporary directory")
}
