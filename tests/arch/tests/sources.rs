//! Rules for the files of the repository.

use exd_arch::{root, text_files, wrong_lines};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "format-spec/DESIGN.md",
    "format-spec/SPEC.md",
];

/// The files of the daemon that print: what `--print-capabilities` and the like answer, and the client.
const DAEMON_PRINTS: [&str; 2] = ["vhost-daemon/src/main.rs", "vhost-daemon/src/bin"];

/// Words that say where something was made, and names of hosts that a build or test must not depend on.
/// They are put together here, so that this file does not contain them.
const BANNED: [&str; 11] = [
    concat!("/wo", "rk/"),
    concat!("/tmp/", "exd/"),
    concat!("/tmp/", "target-"),
    concat!("/ro", "ot/"),
    concat!("debian", ".org"),
    concat!("crates", ".io"),
    concat!("rust-lang", ".org"),
    concat!("cla", "ude"),
    concat!("anthro", "pic"),
    concat!("found", "er"),
    concat!("other he", "lper"),
];

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

#[test]
fn the_documents_are_there() {
    for document in DOCUMENTS {
        let content = std::fs::read_to_string(root().join(document)).unwrap_or_default();
        assert!(!content.trim().is_empty(), "{document} is missing or empty");
    }
    let run = std::fs::metadata(root().join(".ci/run")).expect(".ci/run");
    assert_ne!(run.permissions().mode() & 0o111, 0, ".ci/run can be executed");
}

#[test]
fn sources_are_ascii() {
    let wrong = wrong_lines(|_| true, |line| !line.is_ascii());
    assert!(wrong.is_empty(), "not ASCII:\n{}", wrong.join("\n"));
}

#[test]
fn nothing_names_a_workplace_or_a_package_host() {
    let banned = |line: &str| {
        let line = line.to_lowercase();
        BANNED.iter().any(|word| line.contains(word))
    };
    let wrong = wrong_lines(|path| !path.ends_with("Cargo.lock"), banned);
    assert!(wrong.is_empty(), "banned:\n{}", wrong.join("\n"));
}

#[test]
fn only_programs_for_people_print() {
    let may_print = |path: &Path| {
        let printers = ["imgtool", "xtask", "tests", DAEMON_PRINTS[0], DAEMON_PRINTS[1]];
        let is_example = path.iter().any(|part| part == "examples" || part == "benches");
        is_example || printers.iter().any(|place| path.starts_with(place))
    };
    let prints = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        ["println!", "print!("].iter().any(|name| code.contains(name))
    };
    let wrong = wrong_lines(|path| is_rust(path) && !may_print(path), prints);
    assert!(wrong.is_empty(), "prints:\n{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_unfinished() {
    let names = [concat!("to", "do!"), concat!("unimple", "mented!"), concat!("db", "g!(")];
    let wrong = wrong_lines(is_rust, |line| names.iter().any(|name| line.contains(name)));
    assert!(wrong.is_empty(), "unfinished:\n{}", wrong.join("\n"));
}

/// The engine is a deterministic state machine: what it knows of time, files and chance it is told.
#[test]
fn the_engine_does_no_input_or_output_of_its_own() {
    let names = ["std::fs", "std::net", "std::thread", "Instant::now", "SystemTime", "libc::"];
    let engine = |path: &Path| path.starts_with("image/src") && is_rust(path);
    let wrong = wrong_lines(engine, |line| names.iter().any(|name| line.contains(name)));
    assert!(wrong.is_empty(), "not deterministic:\n{}", wrong.join("\n"));
}

#[test]
fn every_source_file_says_what_it_is() {
    let is_source = |path: &Path| is_rust(path) && !path.starts_with("tests/fuzz");
    let silent: Vec<String> = text_files()
        .iter()
        .filter(|(path, content)| is_source(path) && !content.starts_with("//!"))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert!(silent.is_empty(), "no module comment in:\n{}", silent.join("\n"));
}
