//! `imgtool info` and `map`: the same answers as qemu-img where qemu-img has one, in the same keys.

mod imgtool_common;

use imgtool_common::{imgtool, keys, qemu, qemu_img, scratch, sparse_disk};
use serde_json::Value;

/// A raw file and a qcow2 image with data, zeroes and holes; false where QEMU is not installed.
fn samples(dir: &std::path::Path) -> bool {
    sparse_disk(dir, "a.raw", 10 << 20, 5, 1);
    let Some(made) = qemu_img(dir, "create -q -f qcow2 a.qcow2 64M") else { return false };
    made.ok();
    let mut io = std::process::Command::new("qemu-io");
    let script =
        ["write 0 64k", "write 1M 128k", "write -z 2M 64k", "write 10M 512", "write 63M 1M"];
    io.args(["-f", "qcow2"]).args(script.iter().flat_map(|line| ["-c", line])).arg("a.qcow2");
    match io.current_dir(dir).output() {
        Ok(output) => output.status.success(),
        Err(_) => qemu(dir, "qemu-io", "--version").is_some(),
    }
}

#[test]
fn info_has_the_keys_and_values_of_qemu_img() {
    let dir = scratch();
    if !samples(dir.path()) {
        return;
    }
    for name in ["a.raw", "a.qcow2"] {
        let ours = imgtool(dir.path(), &format!("info --output json {name}")).json();
        let theirs = qemu_img(dir.path(), &format!("info --output json {name}")).expect("there");
        assert_eq!(ours, theirs.json(), "{name}");
        let ours = imgtool(dir.path(), &format!("info {name}")).ok();
        let theirs = qemu_img(dir.path(), &format!("info {name}")).expect("there").ok();
        assert_eq!(ours, theirs, "{name}");
        let chain =
            imgtool(dir.path(), &format!("info --backing-chain --output=json {name}")).json();
        assert_eq!(chain.as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn info_follows_a_backing_chain_as_qemu_img_does() {
    let dir = scratch();
    if !samples(dir.path()) {
        return;
    }
    qemu_img(dir.path(), "create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2").expect("there").ok();
    let line = "info --backing-chain --output=json top.qcow2";
    let ours = imgtool(dir.path(), line).json();
    let theirs = qemu_img(dir.path(), line).expect("there").json();
    assert_eq!(ours, theirs);
}

#[test]
fn info_of_exd_has_the_keys_qemu_img_would_use() {
    let dir = scratch();
    imgtool(dir.path(), "create -q x.exd 1G").ok();
    let info = imgtool(dir.path(), "info --output=json x.exd").json();
    let found = keys(&info);
    for key in [
        "filename",
        "format",
        "virtual-size",
        "actual-size",
        "cluster-size",
        "dirty-flag",
        "children/name",
        "children/info/virtual-size",
        "format-specific/type",
        "format-specific/data/uuid",
    ] {
        assert!(found.contains(&format!("/{key}")), "{key} is not in {found:?}");
    }
    assert_eq!(info["format-specific"]["type"], "exd");
    let text = imgtool(dir.path(), "info x.exd").ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..3],
        ["image: x.exd", "file format: exd", "virtual size: 1 GiB (1073741824 bytes)"]
    );
    assert!(lines.contains(&"cluster_size: 512"));
}

/// Ranges of a map with neighbours that differ only in how they were cut joined.
fn ranges(value: &Value) -> Vec<(u64, u64, bool, bool, bool, Option<u64>)> {
    let mut joined: Vec<(u64, u64, bool, bool, bool, Option<u64>)> = Vec::new();
    for entry in value.as_array().expect("an array") {
        let number = |key: &str| entry[key].as_u64();
        let flag = |key: &str| entry[key].as_bool().expect("a flag");
        let (start, len) = (number("start").expect("start"), number("length").expect("length"));
        let next = (start, len, flag("present"), flag("zero"), flag("data"), number("offset"));
        match joined.last_mut() {
            Some(last)
                if (last.2, last.3, last.4) == (next.2, next.3, next.4)
                    && last.5.map(|offset| offset + last.1) == next.5 =>
            {
                last.1 += len;
            }
            _ => joined.push(next),
        }
    }
    joined
}

#[test]
fn map_is_that_of_qemu_img() {
    let dir = scratch();
    if !samples(dir.path()) {
        return;
    }
    for name in ["a.raw", "a.qcow2"] {
        for line in [
            format!("map --output=json {name}"),
            format!("map --output=json --start-offset=1M --max-length=2M {name}"),
        ] {
            let ours = imgtool(dir.path(), &line).json();
            let theirs = qemu_img(dir.path(), &line).expect("there").json();
            assert_eq!(ranges(&ours), ranges(&theirs), "{line}");
            assert_eq!(keys(&ours), keys(&theirs), "{line}");
        }
        let ours = imgtool(dir.path(), &format!("map {name}")).ok();
        let theirs = qemu_img(dir.path(), &format!("map {name}")).expect("there").ok();
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn map_of_exd_finds_the_data_where_it_lies() {
    let dir = scratch();
    let raw = sparse_disk(dir.path(), "a.raw", 64 << 20, 20, 2);
    imgtool(dir.path(), "convert -f raw -O exd a.raw a.exd").ok();
    let map = imgtool(dir.path(), "map --output=json a.exd").json();
    let disk = std::fs::read(raw).expect("read");
    let image = std::fs::read(dir.path().join("a.exd")).expect("read");
    let mut position = 0;
    for (start, len, present, zero, data, offset) in ranges(&map) {
        assert_eq!(start, position, "no gaps");
        position += len;
        let content = &disk[start as usize..(start + len) as usize];
        if data {
            let offset = offset.expect("data has a place") as usize;
            assert!(present && !zero);
            assert!(&image[offset..offset + len as usize] == content, "data at {start}");
        } else {
            assert!(zero && content.iter().all(|byte| *byte == 0), "zeroes at {start}");
        }
    }
    assert_eq!(position, 64 << 20);
    imgtool(dir.path(), "map -f exd -s 1M -l 1M a.exd").ok();
}
