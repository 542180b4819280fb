//! The output of `info`.

use super::text::{printable, utc};
use crate::size::human;
use serde::Serialize;
use std::fmt::Write;

/// What `info` tells about an image. The fields are qemu-img's JSON keys.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The layers below: the file itself.
    pub children: Vec<Child>,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// As given.
    pub filename: String,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Name of the format.
    pub format: String,
    /// Bytes the host has allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// As the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The backing file's path, resolved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// As the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// Not closed cleanly.
    pub dirty_flag: bool,
}

/// A layer below an image.
#[derive(Clone, Debug, Serialize)]
pub struct Child {
    /// Its role.
    pub name: String,
    /// What it is.
    pub info: FileInfo,
}

/// The file that holds an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileInfo {
    /// Always empty.
    pub children: Vec<Child>,
    /// Length of the file in bytes.
    pub virtual_size: u64,
    /// As given.
    pub filename: String,
    /// `file` or `host_device`.
    pub format: String,
    /// Bytes the host has allocated.
    pub actual_size: u64,
    /// Its type again, without data.
    pub format_specific: FormatSpecific,
    /// Always false.
    pub dirty_flag: bool,
}

/// The `format-specific` object.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum FormatSpecific {
    /// A plain file.
    File(Empty),
    /// A block device.
    #[serde(rename = "host_device")]
    HostDevice(Empty),
    /// EXD.
    Exd(Box<ExdData>),
    /// qcow2.
    Qcow2(Box<Qcow2Data>),
}

/// An object without keys.
#[derive(Clone, Debug, Serialize)]
pub struct Empty {}

/// What only EXD images have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExdData {
    /// Version of the format.
    pub version: String,
    /// Identity of the image.
    pub uuid: String,
    /// Checkpoints so far.
    pub generation: u64,
    /// Times it was opened for writing.
    pub epoch: u64,
    /// Entries of the extent tree at the last checkpoint.
    pub extents: u64,
    /// Nodes of the extent tree at the last checkpoint.
    pub nodes: u64,
    /// Size of the journal in bytes.
    pub journal_size: u64,
    /// How space was reserved at creation.
    pub preallocation: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Features that need a reader that knows them.
    pub incompatible_features: Vec<String>,
    /// Why this imgtool can open the image only for reading.
    pub read_only_reasons: Vec<String>,
    /// Who has it open, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder: Option<HolderData>,
}

/// Who has an image open.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HolderData {
    /// Process id.
    pub pid: u64,
    /// Host name.
    pub host: String,
    /// Program.
    pub program: String,
    /// Socket or the like.
    pub detail: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// What only qcow2 images have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Data {
    /// `0.10` or `1.1`.
    pub compat: String,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Version 3 only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Width of a reference count.
    pub refcount_bits: u64,
    /// Version 3 only: marked as damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Version 3 only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

/// The text form.
pub fn text(info: &ImageInfo) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("image: {}", printable(&info.filename)));
    line(format!("file format: {}", info.format));
    line(format!("virtual size: {} ({} bytes)", human(info.virtual_size), info.virtual_size));
    match info.actual_size {
        Some(size) => line(format!("disk size: {}", human(size))),
        None => line("disk size: unavailable".to_owned()),
    }
    if let Some(size) = info.cluster_size {
        line(format!("cluster_size: {size}"));
    }
    if info.dirty_flag {
        line("cleanly shut down: no".to_owned());
    }
    if let Some(name) = &info.backing_filename {
        let actual = info.full_backing_filename.as_ref().filter(|full| *full != name);
        let actual = actual.map(|full| format!(" (actual path: {})", printable(full)));
        line(format!("backing file: {}{}", printable(name), actual.unwrap_or_default()));
    }
    if let Some(format) = &info.backing_filename_format {
        line(format!("backing file format: {}", printable(format)));
    }
    match &info.format_specific {
        Some(FormatSpecific::Exd(data)) => out += &exd_text(data),
        Some(FormatSpecific::Qcow2(data)) => out += &qcow2_text(data),
        _ => {}
    }
    for child in &info.children {
        out += &child_text(child);
    }
    out
}

fn exd_text(data: &ExdData) -> String {
    let mut out = String::from("Format specific information:\n");
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "    {name}: {value}");
    };
    line("version", data.version.clone());
    line("uuid", data.uuid.clone());
    line("generation", data.generation.to_string());
    line("epoch", data.epoch.to_string());
    line("extents", data.extents.to_string());
    line("tree nodes", data.nodes.to_string());
    line("journal size", human(data.journal_size));
    line("preallocation", data.preallocation.clone());
    line("created", utc(data.created));
    if !data.incompatible_features.is_empty() {
        line("incompatible features", data.incompatible_features.join(", "));
    }
    if !data.read_only_reasons.is_empty() {
        line("read only because of", data.read_only_reasons.join(", "));
    }
    if let Some(holder) = &data.holder {
        let mut text = format!("{}, process {}", printable(&holder.program), holder.pid);
        if !holder.host.is_empty() {
            text += &format!(" on host {}", printable(&holder.host));
        }
        if !holder.detail.is_empty() {
            text += &format!(" ({})", printable(&holder.detail));
        }
        line("in use by", format!("{text}, since {}", utc(holder.since)));
    }
    out
}

fn qcow2_text(data: &Qcow2Data) -> String {
    let mut out = String::from("Format specific information:\n");
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "    {name}: {value}");
    };
    line("compat", &data.compat);
    line("compression type", &data.compression_type);
    if let Some(value) = data.lazy_refcounts {
        line("lazy refcounts", &value);
    }
    line("refcount bits", &data.refcount_bits);
    if let Some(value) = data.corrupt {
        line("corrupt", &value);
    }
    if let Some(value) = data.extended_l2 {
        line("extended l2", &value);
    }
    out
}

fn child_text(child: &Child) -> String {
    let info = &child.info;
    format!(
        "Child node '/{}':\n    filename: {}\n    protocol type: {}\n    \
         file length: {} ({} bytes)\n    disk size: {}\n",
        child.name,
        printable(&info.filename),
        info.format,
        human(info.virtual_size),
        info.virtual_size,
        human(info.actual_size)
    )
}
