//! `imgtool check`, `resize` and `dump`: exit codes, repair, sizes, locks.

mod imgtool_common;

use exd_file::lock::{LockMode, lock, lock_for_qemu};
use exd_file::{HostFile, OpenMode};
use imgtool_common::{disk_usage, imgtool, keys, qemu_img, scratch, sparse_disk};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// An image with enough extents for a tree of two levels.
fn image(dir: &Path) -> Value {
    let path = dir.join("a.raw");
    let file = File::create(&path).expect("create");
    file.set_len(64 << 20).expect("grow");
    for at in 0..1000 {
        file.write_all_at(&[at as u8 | 1; 4096], at * 65536).expect("write");
    }
    imgtool(dir, "convert -f raw -O exd a.raw a.exd").ok();
    imgtool(dir, "dump a.exd").json()
}

fn damage(path: &Path, offset: u64) {
    let file = File::options().write(true).open(path).expect("open");
    file.write_all_at(&[0xa5; 512], offset).expect("write");
}

#[test]
fn check_exit_codes_0_1_2_3_63() {
    let dir = scratch();
    let dump = image(dir.path());
    let path = dir.path().join("a.exd");
    let clean = imgtool(dir.path(), "check --output=json a.exd").json();
    assert_eq!(clean["check-errors"], 0);
    assert_eq!(clean["total-clusters"], 131_072);
    assert_eq!(clean["allocated-clusters"], 8000);
    let found = keys(&clean);
    assert!(!found.iter().any(|key| key == "/corruptions" || key == "/leaks"), "{found:?}");
    let text = imgtool(dir.path(), "check a.exd").ok();
    assert!(
        text.starts_with("No errors were found on the image.\n8000/131072 = 6.10% allocated, ")
    );
    assert!(text.contains("\nImage end offset: "), "{text}");

    imgtool(dir.path(), "check none.exd").fails(1, "No such file");
    imgtool(dir.path(), "check a.raw").fails(63, "does not support checks");

    // Host space past the end of the image, written with zeroes: wasted, harmless.
    let end = path.metadata().expect("there").len().next_multiple_of(4096);
    let file = File::options().write(true).open(&path).expect("open");
    file.write_all_at(&[0; 4096], end).expect("write");
    let leaked = imgtool(dir.path(), "check a.exd");
    assert!(leaked.stdout.contains("1 leaked clusters were found on the image."));
    assert!(leaked.stderr.contains("Leaked space at offset"));
    assert_eq!(leaked.code, 3);
    let json = imgtool(dir.path(), "check --output=json a.exd");
    assert_eq!(json.code, 3);
    assert_eq!(serde_json::from_str::<Value>(&json.stdout).expect("JSON")["leaks"], 1);
    let repaired = imgtool(dir.path(), "check -r leaks a.exd").ok();
    assert!(repaired.contains("found and repaired:\n\n    1 leaked clusters\n    0 corruptions"));
    imgtool(dir.path(), "check a.exd").ok();

    // Data in free space that is said to be zero would show through in new blocks.
    let zero = dump["space_list"]["ranges"]
        .as_array()
        .and_then(|ranges| ranges.iter().find(|range| range["kind"] == 2))
        .and_then(|range| range["start"].as_u64())
        .expect("a range of known zeroes");
    let offset = (zero * 512).next_multiple_of(4096);
    damage(&path, offset);
    imgtool(dir.path(), "check a.exd").fails(2, "free space that is not zero");
    file.write_all_at(&[0; 512], offset).expect("write");
    imgtool(dir.path(), "check --repair=leaks a.exd").ok();

    // A damaged node.
    let node = dump["nodes"][0]["address"].as_u64().expect("an address");
    damage(&path, node + 1024);
    let corrupt = imgtool(dir.path(), "check a.exd");
    assert_eq!(corrupt.code, 2, "{}", corrupt.stderr);
    assert!(corrupt.stdout.contains("errors were found on the image."), "{}", corrupt.stdout);
    assert!(corrupt.stderr.contains("ERROR at offset"), "{}", corrupt.stderr);
    let quiet = imgtool(dir.path(), "check -q a.exd");
    assert_eq!((quiet.code, quiet.stdout.as_str(), quiet.stderr.as_str()), (2, "", ""));
    let dump = imgtool(dir.path(), "dump a.exd").json();
    assert_eq!(dump["nodes"][0]["crc_ok"], false);
}

/// P6: a damaged copy of the superblock, as an interrupted commit leaves it, is never used and keeps
/// nobody from the image.
#[test]
fn p6_one_damaged_superblock_does_no_harm_and_two_are_refused() {
    let dir = scratch();
    image(dir.path());
    let path = dir.path().join("a.exd");
    damage(&path, 100);
    imgtool(dir.path(), "check a.exd").ok();
    assert_eq!(imgtool(dir.path(), "info --output=json a.exd").json()["format"], "exd");
    imgtool(dir.path(), "compare a.raw a.exd").ok();
    let dump = imgtool(dir.path(), "dump a.exd").json();
    assert_eq!(dump["superblocks"][0]["crc_ok"], false);
    assert_eq!(dump["superblocks"][1]["valid"], true);
    damage(&path, 4096 + 100);
    let text = "neither superblock (offsets 0 and 4096) is usable";
    imgtool(dir.path(), "info a.exd").fails(1, text);
    imgtool(dir.path(), "map a.exd").fails(1, "superblock");
    assert_ne!(imgtool(dir.path(), "check a.exd").code, 0);
}

#[test]
fn resize_as_qemu_img_spells_it() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 8 << 20, 20, 21);
    imgtool(dir.path(), "convert -f raw -O exd a.raw a.exd").ok();
    imgtool(dir.path(), "convert -f raw -O qcow2 a.raw a.qcow2").ok();
    for name in ["a.raw", "a.exd", "a.qcow2"] {
        let size = || {
            let line = format!("info --output=json {name}");
            imgtool(dir.path(), &line).json()["virtual-size"].as_u64().expect("a number")
        };
        let format = name.split('.').next_back().expect("an ending");
        let resize = |line: &str| imgtool(dir.path(), &format!("resize -f {format} {line}"));
        assert_eq!(resize(&format!("{name} +4M")).ok(), "Image resized.\n");
        assert_eq!(size(), 12 << 20, "{name}");
        resize(&format!("{name} 1M")).fails(1, "Use the --shrink option");
        assert_eq!(size(), 12 << 20, "{name}");
        assert_eq!(resize(&format!("--shrink -q {name} -10M")).ok(), "");
        assert_eq!(size(), 2 << 20, "{name}");
        resize(&format!("--shrink {name} 0")).fails(1, "New image size must be positive");
        resize(&format!("{name} 10Z")).fails(1, "Invalid image size");
        resize(&format!("{name} 3M")).ok();
    }
    imgtool(dir.path(), "check a.exd").ok();
    // Past the old end of the shrunken disk all reads as zeroes.
    imgtool(dir.path(), "compare -s -f raw a.raw a.raw").ok();
    assert_eq!(imgtool(dir.path(), "compare -f raw a.raw a.exd").ok(), "Images are identical.\n");
    assert_eq!(imgtool(dir.path(), "compare -f raw a.raw a.qcow2").ok(), "Images are identical.\n");
    imgtool(dir.path(), "resize -f raw --preallocation=falloc a.raw 16M").ok();
    assert!(disk_usage(&dir.path().join("a.raw")) >= 13 << 20);
    imgtool(dir.path(), "resize a.raw 17M").ok();
}

/// P9: nobody opens an image that another process writes to, and the error says which process.
#[test]
fn p9_an_image_in_use_is_left_alone_and_its_holder_named() {
    let dir = scratch();
    imgtool(dir.path(), "create -q a.exd 1M").ok();
    imgtool(dir.path(), "resize a.exd 2M").ok();
    let path = dir.path().join("a.exd");
    let held = HostFile::open(&path, OpenMode { write: true, direct: false }).expect("open");
    lock(&held, LockMode::Writer, Duration::ZERO).expect("free");
    for line in
        ["info a.exd", "check a.exd", "map a.exd", "convert -O raw a.exd b.raw", "dump a.exd"]
    {
        let refused = imgtool(dir.path(), line);
        // The record of the last writer names imgtool; who has the file open counts.
        let holder = format!(", process {}.", std::process::id());
        assert!(refused.stderr.contains(&holder), "{}", refused.stderr);
        refused.fails(1, "Is another process using the image [a.exd]?");
    }
    for line in ["resize a.exd 4M", "create a.exd 1M", "check -r all a.exd"] {
        imgtool(dir.path(), line).fails(1, "Failed to get \"write\" lock");
    }
    let info = imgtool(dir.path(), "info -U --output=json a.exd").json();
    assert_eq!(info["format-specific"]["data"]["holder"]["program"], "imgtool");
    assert!(imgtool(dir.path(), "info -U a.exd").ok().contains("in use by: imgtool, process "));
    imgtool(dir.path(), "check -U a.exd").ok();
    imgtool(dir.path(), "check -U -r all a.exd").fails(1, "read-only images");
    drop(held);
    imgtool(dir.path(), "check a.exd").ok();
    let info = imgtool(dir.path(), "info a.exd").ok();
    assert!(!info.contains("in use by"), "{info}");
}

/// P9: QEMU's tools and imgtool see each other's use of raw files.
#[test]
fn p9_raw_files_are_locked_against_qemu() {
    let dir = scratch();
    imgtool(dir.path(), "create -q -f raw a.raw 1M").ok();
    let path = dir.path().join("a.raw");
    let held = HostFile::open(&path, OpenMode { write: true, direct: false }).expect("open");
    lock_for_qemu(&held, LockMode::Writer).expect("free");
    imgtool(dir.path(), "info -f raw a.raw").fails(1, "Failed to get shared \"write\" lock");
    if let Some(theirs) = qemu_img(dir.path(), "convert -f raw -O raw a.raw b.raw") {
        theirs.fails(1, "Failed to get shared \"write\" lock");
        qemu_img(dir.path(), "convert -U -f raw -O raw a.raw b.raw").expect("there").ok();
    }
}

#[test]
fn generated_man_pages_and_completions() {
    let dir = scratch();
    imgtool(dir.path(), "generate out").ok();
    let man = std::fs::read_to_string(dir.path().join("out/man/imgtool-convert.1")).expect("page");
    assert!(man.contains("Holes and zeroes"));
    assert!(dir.path().join("out/completions/_imgtool").exists());
    assert!(dir.path().join("out/completions/imgtool.bash").exists());
    for command in ["create", "info", "check", "convert", "map", "resize", "compare", "measure"] {
        let help = imgtool(dir.path(), &format!("{command} --help")).ok();
        assert!(help.contains("Example"), "{command}");
    }
}
