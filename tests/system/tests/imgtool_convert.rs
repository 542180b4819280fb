//! `imgtool convert` and `compare`: content, sparseness, interruption, refusals.

mod imgtool_common;

use imgtool_common::{disk_usage, imgtool, imgtool_command, names, qemu_img, scratch, sparse_disk};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

const GIB: u64 = 1 << 30;

/// raw -> exd -> qcow2 -> exd -> raw, 4 GiB with random data: the same bytes, and the holes kept.
#[test]
fn the_circle_through_all_formats_keeps_content_and_holes() {
    let dir = scratch();
    let raw = sparse_disk(dir.path(), "a.raw", 4 * GIB, 300, 3);
    let used = disk_usage(&raw);
    for line in [
        "convert -O exd a.raw b.exd",
        "convert -f exd -O qcow2 b.exd c.qcow2",
        "convert -f qcow2 -O exd c.qcow2 d.exd",
        "convert -f exd -O raw d.exd e.raw",
    ] {
        imgtool(dir.path(), line).ok();
    }
    if let Some(compared) = qemu_img(dir.path(), "compare -f raw -F raw a.raw e.raw") {
        assert_eq!(compared.ok(), "Images are identical.\n");
    }
    assert_eq!(imgtool(dir.path(), "compare a.raw e.raw").ok(), "Images are identical.\n");
    assert_eq!(imgtool(dir.path(), "compare a.raw d.exd").ok(), "Images are identical.\n");
    for name in ["b.exd", "c.qcow2", "d.exd", "e.raw"] {
        let now = disk_usage(&dir.path().join(name));
        assert!(now < used + (4 << 20), "{name} takes {now}, the source {used}");
    }
    imgtool(dir.path(), "check b.exd").ok();
    imgtool(dir.path(), "check d.exd").ok();
    if let Some(check) = qemu_img(dir.path(), "check c.qcow2") {
        check.ok();
    }
}

#[test]
fn block_sizes_and_odd_lengths() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", (20 << 20) + 512, 40, 4);
    for block in ["512", "4k", "64k"] {
        let line = format!("convert -O exd -o block_size={block} a.raw a.exd");
        imgtool(dir.path(), &line).ok();
        imgtool(dir.path(), "check a.exd").ok();
        imgtool(dir.path(), "compare -s -f raw -F raw a.raw a.raw").ok();
        imgtool(dir.path(), "compare a.raw a.exd").ok();
    }
    // A file that ends inside a sector: the disk has the whole sector.
    fs::write(dir.path().join("odd"), vec![7; 1000]).expect("write");
    imgtool(dir.path(), "convert -f raw -O exd odd odd.exd").ok();
    imgtool(dir.path(), "convert -O raw odd.exd odd.raw").ok();
    let back = fs::read(dir.path().join("odd.raw")).expect("read");
    assert_eq!(back, [vec![7; 1000], vec![0; 24]].concat());
}

#[test]
fn zeroes_become_holes_as_told() {
    let dir = scratch();
    let mut disk = vec![0; 8 << 20];
    disk[1 << 20] = 1;
    disk[(1 << 20) + 8192] = 1;
    fs::write(dir.path().join("a.raw"), &disk).expect("write");
    let data = |line: &str| -> u64 {
        imgtool(dir.path(), &format!("convert {line} a.raw a.exd")).ok();
        imgtool(dir.path(), "compare a.raw a.exd").ok();
        let map = imgtool(dir.path(), "map --output json a.exd").json();
        let entries = map.as_array().expect("an array").iter();
        entries
            .filter(|entry| entry["data"] == true)
            .filter_map(|entry| entry["length"].as_u64())
            .sum()
    };
    assert_eq!(data("-O exd"), 8192, "4k by default");
    assert_eq!(data("-O exd -S 64k"), 65536);
    assert_eq!(data("-O exd -S 0"), 8 << 20, "0 writes everything");
    assert_eq!(data("-O exd -S 512"), 8192, "what is shorter takes the 4 KiB around it");
}

#[test]
fn several_sources_follow_one_another() {
    let dir = scratch();
    let first = sparse_disk(dir.path(), "a.raw", 3 << 20, 5, 5);
    let second = sparse_disk(dir.path(), "b.raw", 5 << 20, 5, 6);
    imgtool(dir.path(), "convert -f raw -O exd a.raw b.raw ab.exd").ok();
    imgtool(dir.path(), "convert -O raw ab.exd ab.raw").ok();
    let whole = [fs::read(first).expect("read"), fs::read(second).expect("read")].concat();
    assert!(fs::read(dir.path().join("ab.raw")).expect("read") == whole);
}

#[test]
fn standard_input_and_output() {
    let dir = scratch();
    let raw = sparse_disk(dir.path(), "a.raw", (9 << 20) + 1024, 10, 7);
    let disk = fs::read(&raw).expect("read");
    for format in ["exd", "qcow2", "raw"] {
        let mut child = imgtool_command(dir.path(), &format!("convert -O {format} - out"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("starts");
        child.stdin.take().expect("piped").write_all(&disk).expect("write");
        assert!(child.wait().expect("ends").success());
        let output = imgtool_command(dir.path(), "convert -p -O raw out -").output().expect("runs");
        assert!(output.status.success());
        assert!(output.stdout == disk, "{format}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("(100.00/100%)"));
    }
    imgtool(dir.path(), "convert -O exd a.raw -").fails(1, "needs a file or block device");
}

#[test]
fn into_an_existing_image() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 4 << 20, 20, 8);
    sparse_disk(dir.path(), "b.raw", 4 << 20, 20, 9);
    imgtool(dir.path(), "convert -O exd a.raw t.exd").ok();
    // What was there before and is a hole in the source must go.
    imgtool(dir.path(), "convert -n -O exd b.raw t.exd").ok();
    imgtool(dir.path(), "compare b.raw t.exd").ok();
    imgtool(dir.path(), "check t.exd").ok();
    imgtool(dir.path(), "convert -n -f raw -O raw b.raw a.raw").ok();
    imgtool(dir.path(), "compare a.raw b.raw").ok();
    imgtool(dir.path(), "create -q small.exd 1M").ok();
    let small = imgtool(dir.path(), "convert -n -O exd b.raw small.exd");
    small.fails(1, "output file is smaller than input file");
    imgtool(dir.path(), "convert -n -O exd b.raw none.exd").fails(1, "No such file");
    imgtool(dir.path(), "convert --target-is-zero b.raw x").fails(1, "requires use of -n");
}

#[test]
fn progress_is_that_of_qemu_img() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 64 << 20, 20, 10);
    let text = imgtool(dir.path(), "convert -p -O exd a.raw a.exd").ok();
    assert!(text.starts_with("    (0.00/100%)\r"), "{text:?}");
    assert!(text.ends_with("    (100.00/100%)\r\n"), "{text:?}");
    assert_eq!(imgtool(dir.path(), "convert -O exd a.raw a.exd").ok(), "");
    assert_eq!(imgtool(dir.path(), "convert -p -q -O exd a.raw a.exd").ok(), "");
}

/// Kills a convert in the middle, as soon as it shows progress, and says what is left.
fn interrupted(signal: nix::sys::signal::Signal, dir: &Path, format: &str) -> Option<i32> {
    use std::io::Read;
    let mut child = imgtool_command(dir, &format!("convert -p -O {format} src/a.raw out.img"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut output = child.stdout.take().expect("piped");
    let mut seen = String::new();
    let mut byte = [0];
    // "(1" of "(10.": a part is written, most is not.
    while !seen.ends_with("(10.") && output.read(&mut byte).is_ok_and(|count| count == 1) {
        seen.push(byte[0] as char);
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, signal).expect("the child is ours");
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).expect("read");
    let status = child.wait().expect("ends");
    status.code().or(status.signal().map(|signal| -signal))
}

/// An interrupted convert leaves nothing that passes for an image, and what was there before stays.
#[test]
fn an_interrupted_convert_leaves_nothing() {
    use nix::sys::signal::Signal::{SIGINT, SIGKILL, SIGTERM};
    let dir = scratch();
    let source = dir.path().join("src");
    fs::create_dir(&source).expect("directory");
    let file = File::create(source.join("a.raw")).expect("create");
    let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 512) as u8 | 1).collect();
    for at in 0..512 {
        file.write_all_at(&block, at << 20).expect("write");
    }
    for format in ["exd", "qcow2", "raw"] {
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143), (SIGKILL, -9)] {
            assert_eq!(interrupted(signal, dir.path(), format), Some(code), "{format} {signal}");
            let left = names(dir.path());
            assert_eq!(left, ["src"], "{format} {signal}");
        }
    }
    fs::write(dir.path().join("out.img"), "precious").expect("write");
    assert_eq!(interrupted(SIGTERM, dir.path(), "exd"), Some(143));
    assert_eq!(fs::read(dir.path().join("out.img")).expect("there"), b"precious");
    assert_eq!(names(dir.path()), ["out.img", "src"]);
}

/// P8: what imago would misread or cannot read is refused by name, also as a backing file.
#[test]
fn p8_qcow2_images_that_would_be_misread_are_refused() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 1 << 20, 5, 11);
    let secret = "--object secret,id=s,data=abc";
    let luks = "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let Some(made) = qemu_img(dir.path(), &format!("create -q -f qcow2 {secret} {luks} luks 1M"))
    else {
        return;
    };
    made.ok();
    let make = |line: &str| qemu_img(dir.path(), line).expect("there").ok();
    make("convert -f raw -O qcow2 -o compression_type=zstd -c a.raw zstd");
    make("create -q -f qcow2 -o extended_l2=on,cluster_size=128k ext 1M");
    make("create -q -f qcow2 -u -b luks -F qcow2 over 1M");
    for (name, word) in
        [("luks", "LUKS"), ("zstd", "zstd"), ("ext", "extended L2"), ("over", "LUKS")]
    {
        imgtool(dir.path(), &format!("convert -O raw {name} out")).fails(1, word);
        imgtool(dir.path(), &format!("info {name}")).ok();
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn qcow2_with_backing_file_and_compression() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 4 << 20, 10, 12);
    let Some(made) = qemu_img(dir.path(), "convert -c -f raw -O qcow2 a.raw base.qcow2") else {
        return;
    };
    made.ok();
    qemu_img(dir.path(), "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2")
        .expect("there")
        .ok();
    imgtool(dir.path(), "convert -O exd top.qcow2 top.exd").ok();
    imgtool(dir.path(), "compare a.raw top.exd").ok();
    imgtool(dir.path(), "map base.qcow2").fails(1, "compressed clusters");
}

#[test]
fn compare_has_the_exit_codes_of_qemu_img() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 1 << 20, 3, 13);
    sparse_disk(dir.path(), "b.raw", 1 << 20, 3, 14);
    fs::copy(dir.path().join("a.raw"), dir.path().join("long.raw")).expect("copy");
    let file = File::options().write(true).open(dir.path().join("long.raw")).expect("open");
    file.set_len(2 << 20).expect("grow");
    for line in [
        "compare -f raw -F raw a.raw a.raw",
        "compare -f raw -F raw a.raw b.raw",
        "compare -f raw -F raw a.raw long.raw",
        "compare -s -f raw -F raw a.raw long.raw",
        "compare -q -f raw -F raw a.raw b.raw",
    ] {
        let ours = imgtool(dir.path(), line);
        let Some(theirs) = qemu_img(dir.path(), line) else { return };
        assert_eq!((ours.code, ours.stdout), (theirs.code, theirs.stdout), "{line}");
    }
    assert_eq!(imgtool(dir.path(), "compare a.raw none").code, 2);
}

#[test]
fn measure_bounds_what_convert_makes() {
    let dir = scratch();
    sparse_disk(dir.path(), "a.raw", 64 << 20, 50, 15);
    for format in ["exd", "qcow2", "raw"] {
        let line = format!("measure -f raw -O {format} --output=json a.raw");
        let bound = imgtool(dir.path(), &line).json();
        imgtool(dir.path(), &format!("convert -f raw -O {format} a.raw out")).ok();
        let used = disk_usage(&dir.path().join("out"));
        let required = bound["required"].as_u64().expect("a number");
        assert!(used <= required, "{format}: {used} > {required}");
        assert!(required <= bound["fully-allocated"].as_u64().expect("a number"));
    }
    let ours = imgtool(dir.path(), "measure --size 1G -O qcow2 --output json").json();
    if let Some(theirs) = qemu_img(dir.path(), "measure --size 1G -O qcow2 --output json") {
        let theirs = theirs.json();
        assert_eq!(ours["required"], theirs["required"]);
        assert_eq!(ours["fully-allocated"], theirs["fully-allocated"]);
    }
}
