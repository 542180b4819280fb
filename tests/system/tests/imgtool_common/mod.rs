//! What the tests of imgtool share.

#![allow(dead_code, reason = "each test program uses a part of it")]

use exd_system_tests::programs::program;
pub use exd_system_tests::programs::scratch;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// How a program ended.
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    fn new(output: Output) -> Ended {
        Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts success and returns standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts success and parses standard output.
    #[track_caller]
    pub fn json(self) -> Value {
        serde_json::from_str(&self.ok()).expect("JSON")
    }

    /// Asserts the exit code and that standard error contains `text`.
    #[track_caller]
    pub fn fails(self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.contains(text), "{:?} is not in: {}", text, self.stderr);
    }
}

/// A command line: words are split at blanks.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Prepares imgtool with these words, in this directory.
pub fn imgtool_command(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(program("imgtool"));
    command.args(words(line)).current_dir(directory).stdin(Stdio::null());
    command
}

/// Runs imgtool with these words, in this directory.
pub fn imgtool(directory: &Path, line: &str) -> Ended {
    Ended::new(imgtool_command(directory, line).output().expect("imgtool runs"))
}

/// Runs one of QEMU's tools; `None` where it is not installed.
pub fn qemu(directory: &Path, tool: &str, line: &str) -> Option<Ended> {
    let mut command = Command::new(tool);
    let output = command.args(words(line)).current_dir(directory).stdin(Stdio::null()).output();
    match output {
        Ok(output) => Some(Ended::new(output)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{tool} is not installed: the comparison with it is left out");
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

/// Runs qemu-img.
pub fn qemu_img(directory: &Path, line: &str) -> Option<Ended> {
    qemu(directory, "qemu-img", line)
}

/// Bytes the host has allocated for a file.
pub fn disk_usage(path: &Path) -> u64 {
    path.metadata().expect("the file is there").blocks() * 512
}

/// Names in a directory, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("readable directory");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A sparse raw disk with random data of many lengths at random sectors; returns its path.
pub fn sparse_disk(directory: &Path, name: &str, size: u64, writes: usize, seed: u64) -> PathBuf {
    let path = directory.join(name);
    let file = File::create(&path).expect("create");
    file.set_len(size).expect("grow");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..writes {
        let len = [512, 1024, 4096, 65536, 1 << 20][random.usize(..5)].min(size) as usize;
        let at = random.u64(0..=(size - len as u64) / 512) * 512;
        let data: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
        file.write_all_at(&data, at).expect("write");
    }
    path
}

/// All keys of a JSON value with the paths to them, array positions left out.
pub fn keys(value: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let path = format!("{path}/{key}");
                    walk(value, &path, found);
                    found.push(path);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, path, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(value, "", &mut found);
    found.sort();
    found.dedup();
    found
}
