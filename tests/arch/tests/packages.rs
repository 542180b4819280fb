//! The arrows between the packages go one way: codec <- engine <- files <- programs; tests see all.

use exd_arch::{packages, root};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// What each package of the product may depend on inside the workspace.
const ARROWS: [(&str, &[&str]); 5] = [
    ("exd-format", &[]),
    ("exd-image", &["exd-format"]),
    ("exd-file", &["exd-image", "exd-format"]),
    ("imgtool", &["exd-file", "exd-image", "exd-format"]),
    ("vhost-daemon", &["exd-file", "exd-image"]),
];

/// Packages with `unsafe` in them: system calls, shared memory, the guest's rings.
const WITH_UNSAFE: [&str; 5] =
    ["exd-bench", "exd-file", "vhost-daemon", "exd-guest-tests", "exd-system-tests"];

#[test]
fn dependencies_follow_the_arrows() {
    let packages = packages();
    let own: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for package in packages.iter().filter(|package| !package.is_tooling()) {
        let arrow = ARROWS.iter().find(|(name, _)| *name == package.name);
        let (_, allowed) = arrow.unwrap_or_else(|| panic!("{} has no place here", package.name));
        for dependency in package.dependency_names(true).intersection(&own) {
            assert!(allowed.contains(dependency), "{} depends on {dependency}", package.name);
        }
    }
}

#[test]
fn nothing_depends_on_tests_or_tasks() {
    let packages = packages();
    let tooling: BTreeSet<&str> =
        packages.iter().filter(|p| p.is_tooling()).map(|p| p.name.as_str()).collect();
    for package in packages.iter().filter(|package| !package.is_tooling()) {
        let names = package.dependency_names(true);
        let wrong: Vec<_> = names.intersection(&tooling).collect();
        assert!(wrong.is_empty(), "{} depends on {wrong:?}", package.name);
    }
}

#[test]
fn the_codec_needs_only_the_checksum() {
    let packages = packages();
    let codec = packages.iter().find(|package| package.name == "exd-format").expect("the codec");
    assert_eq!(codec.dependency_names(false), BTreeSet::from(["crc32fast"]));
}

#[test]
fn only_the_daemon_knows_virtio() {
    for package in packages().iter().filter(|p| p.name != "vhost-daemon" && !p.is_tooling()) {
        for name in package.dependency_names(true) {
            let virtio = ["virtio", "vhost", "vm-memory"].iter().any(|part| name.starts_with(part));
            assert!(!virtio, "{} depends on {name}", package.name);
        }
    }
}

#[test]
fn unsafe_code_is_forbidden_where_it_has_no_business() {
    let packages = packages();
    let without = packages.iter().filter(|p| !WITH_UNSAFE.contains(&p.name.as_str()));
    let roots = without.flat_map(|package| &package.roots);
    let allows = |file: &&PathBuf| {
        let content = std::fs::read_to_string(root().join(file)).expect("a source file");
        !content.contains("#![forbid(unsafe_code)]")
    };
    let wrong: Vec<_> = roots.filter(allows).collect();
    assert!(wrong.is_empty(), "these do not forbid unsafe code: {wrong:?}");
}
