//! `imgtool create`: spelling of options, sizes, cost, refusals.

mod imgtool_common;

use imgtool_common::{disk_usage, imgtool, names, qemu_img, scratch};

#[test]
fn a_disk_of_64_tib_costs_nothing() {
    let dir = scratch();
    let text = imgtool(dir.path(), "create x.exd 64T").ok();
    assert_eq!(
        text,
        "Formatting 'x.exd', fmt=exd size=70368744177664 block_size=512 preallocation=off\n"
    );
    assert!(disk_usage(&dir.path().join("x.exd")) < 2 << 20);
    let info = imgtool(dir.path(), "info --output=json x.exd").json();
    assert_eq!(info["virtual-size"], 64u64 << 40);
    assert_eq!(info["dirty-flag"], false);
    imgtool(dir.path(), "check x.exd").ok();
}

/// More than 2^32 blocks: an extent has fewer.
#[test]
fn extents_of_a_preallocated_disk_of_many_blocks() {
    let dir = scratch();
    imgtool(dir.path(), "create -q -o preallocation=metadata x.exd 8T").ok();
    imgtool(dir.path(), "check x.exd").ok();
    let map = imgtool(dir.path(), "map --output=json x.exd").json();
    let pieces = map.as_array().expect("an array").iter();
    assert_eq!(pieces.filter_map(|piece| piece["length"].as_u64()).sum::<u64>(), 8 << 40);
}

#[test]
fn options_short_and_long() {
    let dir = scratch();
    imgtool(dir.path(), "create -q -f exd -o block_size=64k,preallocation=metadata a.exd 1.5M")
        .ok();
    imgtool(dir.path(), "create --quiet --format=exd --options cluster_size=512 b.exd 1000").ok();
    imgtool(dir.path(), "create -f raw -o size=1M -o preallocation=full c.raw").ok();
    imgtool(dir.path(), "create -f qcow2 -o cluster_size=4k d.qcow2 1G").ok();
    let info = |name: &str| imgtool(dir.path(), &format!("info --output json {name}")).json();
    assert_eq!(info("a.exd")["virtual-size"], 3 << 19);
    assert_eq!(info("a.exd")["cluster-size"], 65536);
    assert_eq!(info("b.exd")["virtual-size"], 1024, "rounded up to a sector");
    assert_eq!(info("b.exd")["cluster-size"], 512);
    assert_eq!(info("c.raw")["format"], "raw");
    assert!(disk_usage(&dir.path().join("c.raw")) >= 1 << 20);
    assert_eq!(info("d.qcow2")["cluster-size"], 4096);
    if let Some(check) = qemu_img(dir.path(), "check d.qcow2") {
        check.ok();
    }
}

#[test]
fn every_preallocation_gives_a_sound_image() {
    let dir = scratch();
    for mode in ["off", "metadata", "falloc", "full"] {
        imgtool(dir.path(), &format!("create -o preallocation={mode} {mode}.exd 32M")).ok();
        imgtool(dir.path(), &format!("check {mode}.exd")).ok();
        let used = disk_usage(&dir.path().join(format!("{mode}.exd")));
        match mode {
            "off" | "metadata" => assert!(used < 4 << 20, "{mode}: {used}"),
            _ => assert!(used >= 32 << 20, "{mode}: {used}"),
        }
    }
}

#[test]
fn help_lists_the_options() {
    let dir = scratch();
    for format in ["exd", "raw", "qcow2"] {
        for word in ["help", "?", "list"] {
            let text = imgtool(dir.path(), &format!("create -f {format} -o {word}")).ok();
            assert!(text.contains("preallocation=<str>") && text.contains("size=<size>"), "{text}");
        }
    }
    assert!(names(dir.path()).is_empty());
}

#[test]
fn refusals() {
    let dir = scratch();
    let refuse = |line: &str, text: &str| imgtool(dir.path(), line).fails(1, text);
    refuse("create x.exd", "imgtool: x.exd: Image creation needs a size parameter");
    refuse("create x.exd 10Z", "Invalid image size specified: '10Z'");
    refuse("create x.exd -1", "Invalid image size specified: '-1'");
    refuse("create -f vmdk x 1M", "Unknown file format 'vmdk'");
    refuse("create -o foo=1 x.exd 1M", "Invalid parameter 'foo'");
    refuse("create -o block_size=3k x.exd 1M", "must be a power of two between 512 and 64k");
    refuse(
        "create -f qcow2 -o cluster_size=1 x 1M",
        "must be a power of two between 512 and 2048k",
    );
    refuse("create -f raw -o preallocation=metadata x 1M", "does not accept value 'metadata'");
    refuse("create no/such/x.exd 1M", "No such file or directory");
    refuse("create", "required arguments");
    refuse("frobnicate", "unrecognized subcommand");
    assert!(names(dir.path()).is_empty(), "a refusal leaves nothing behind");
}

#[test]
fn an_existing_file_is_replaced_with_its_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let dir = scratch();
    let path = dir.path().join("x.exd");
    std::fs::write(&path, "something else").expect("write");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    imgtool(dir.path(), "create x.exd 1M").ok();
    imgtool(dir.path(), "check x.exd").ok();
    let mode = path.metadata().expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(names(dir.path()), ["x.exd"]);
}

#[test]
fn names_do_nothing_to_a_terminal() {
    let dir = scratch();
    imgtool(dir.path(), "info no\u{1b}[31msuch").fails(1, "imgtool: no\\u{1b}[31msuch: ");
}
