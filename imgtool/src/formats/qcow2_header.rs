//! The header of a qcow2 file, as far as it decides what may be done with the file.
//!
//! The imago crate reads and writes the format; this is the check before it, which refuses what it
//! would misread (it does not look at `crypt_method` and would hand out ciphertext as data) and
//! names what it would refuse without a name. Source of the fields: QEMU's docs/interop/qcow2.txt.

use crate::failure::{Failure, Result};
use crate::output::info::Qcow2Data;

/// The first bytes of a qcow2 file.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes that [`Qcow2Header::parse`] wants.
pub const HEADER_BYTES: usize = 4096;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes.
    pub cluster_size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// log2 of the bits of a reference count.
    pub refcount_order: u32,
    /// 0 zlib, 1 zstd.
    pub compression: u8,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
}

impl Qcow2Header {
    /// Parses the first [`HEADER_BYTES`] of a file (fewer if it is shorter).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let damaged = || Failure::new("the qcow2 header is damaged (offset 0)");
        if bytes.get(..4) != Some(&MAGIC[..]) {
            return Err(Failure::new("Image is not in qcow2 format"));
        }
        let u32_at = |at| u32_at(bytes, at).ok_or_else(damaged);
        let u64_at = |at| u64_at(bytes, at).ok_or_else(damaged);
        let version = u32_at(4)?;
        if !(2..=3).contains(&version) {
            return Err(Failure::new(format_args!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Failure::new(format_args!(
                "the qcow2 header is damaged (offset 20: cluster bits {cluster_bits})"
            )));
        }
        let (backing_offset, backing_len) = (u64_at(8)?, u32_at(16)?);
        let backing_file = match backing_offset {
            0 => None,
            _ => Some(text_at(bytes, backing_offset, backing_len).ok_or_else(damaged)?),
        };
        let mut header = Qcow2Header {
            version,
            size: u64_at(24)?,
            cluster_size: 1 << cluster_bits,
            crypt_method: u32_at(32)?,
            snapshots: u32_at(60)?,
            incompatible: 0,
            compatible: 0,
            refcount_order: 4,
            compression: 0,
            backing_file,
            backing_format: None,
        };
        let mut extensions = 72;
        if version >= 3 {
            header.incompatible = u64_at(72)?;
            header.compatible = u64_at(80)?;
            header.refcount_order = u32_at(96)?;
            if header.refcount_order > 6 {
                return Err(Failure::new("the qcow2 header is damaged (offset 96)"));
            }
            extensions = u32_at(100)?;
            if extensions > 104 {
                header.compression = bytes.get(104).copied().ok_or_else(damaged)?;
            }
        }
        header.backing_format = backing_format(bytes, extensions);
        Ok(header)
    }

    /// Refuses what imago cannot read or would misread.
    pub fn refuse_unreadable(&self) -> Result<()> {
        let refuse = |what: &str| {
            Err(Failure::new(format_args!(
                "{what}; use 'qemu-img convert' to make a plain qcow2 or raw image of it first"
            )))
        };
        match self.crypt_method {
            0 => {}
            1 => return refuse("the qcow2 image is encrypted (AES), which imgtool does not read"),
            2 => return refuse("the qcow2 image is encrypted (LUKS), which imgtool does not read"),
            other => return refuse(&format!("unknown qcow2 encryption method {other}")),
        }
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(Failure::new(
                "the qcow2 image is marked corrupt; repair it with 'qemu-img check -r all'",
            ));
        }
        if self.incompatible & INCOMPATIBLE_DIRTY != 0 {
            return Err(Failure::new(
                "the qcow2 image was not closed cleanly and its reference counts may be wrong \
                 (lazy_refcounts); repair it with 'qemu-img check -r all'",
            ));
        }
        if self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 {
            return refuse("the qcow2 image has extended L2 entries, which imgtool does not read");
        }
        if self.incompatible & INCOMPATIBLE_COMPRESSION != 0 || self.compression != 0 {
            return refuse("the qcow2 image is compressed with zstd, which imgtool does not read");
        }
        let known = INCOMPATIBLE_DATA_FILE;
        if self.incompatible & !known != 0 {
            return Err(Failure::new(format_args!(
                "Unsupported qcow2 feature(s): Unknown incompatible feature: {:x}",
                self.incompatible & !known
            )));
        }
        Ok(())
    }

    /// Marked as not closed cleanly.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// For `info`.
    pub fn data(&self) -> Qcow2Data {
        let v3 = |value: bool| (self.version >= 3).then_some(value);
        Qcow2Data {
            compat: if self.version >= 3 { "1.1" } else { "0.10" }.to_owned(),
            compression_type: if self.compression == 1 { "zstd" } else { "zlib" }.to_owned(),
            lazy_refcounts: v3(self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0),
            refcount_bits: 1 << self.refcount_order,
            corrupt: v3(self.incompatible & INCOMPATIBLE_CORRUPT != 0),
            extended_l2: v3(self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0),
        }
    }
}

/// The backing format extension among the header extensions.
fn backing_format(bytes: &[u8], start: u32) -> Option<String> {
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    let mut at = start as usize;
    loop {
        let kind = u32_at(bytes, at)?;
        let len = u32_at(bytes, at.checked_add(4)?)?;
        let content = at.checked_add(8)?;
        match kind {
            0 => return None,
            BACKING_FORMAT => return text_at(bytes, content as u64, len),
            _ => at = content.checked_add((len as usize).checked_next_multiple_of(8)?)?,
        }
    }
}

// qcow2 is a big-endian format.
#[expect(clippy::big_endian_bytes, reason = "the byte order of qcow2")]
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[expect(clippy::big_endian_bytes, reason = "the byte order of qcow2")]
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn text_at(bytes: &[u8], at: u64, len: u32) -> Option<String> {
    let at = usize::try_from(at).ok()?;
    let text = bytes.get(at..at.checked_add(len as usize)?)?;
    Some(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(crypt_method: u8, incompatible: u8) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[35] = crypt_method;
        bytes[79] = incompatible;
        bytes[99] = 4;
        bytes[103] = 112;
        bytes
    }

    fn verdict(bytes: &[u8]) -> String {
        let result = Qcow2Header::parse(bytes).and_then(|header| header.refuse_unreadable());
        result.err().map(|failure| failure.text).unwrap_or_default()
    }

    #[test]
    fn p8_what_would_be_misread_is_refused_by_name() {
        assert_eq!(verdict(&header(0, 0)), "");
        assert_eq!(verdict(&header(0, 4)), "");
        assert!(verdict(&header(2, 0)).contains("LUKS"));
        assert!(verdict(&header(1, 0)).contains("AES"));
        assert!(verdict(&header(0, 8)).contains("zstd"));
        assert!(verdict(&header(0, 16)).contains("extended L2"));
        assert!(verdict(&header(0, 2)).contains("corrupt"));
        assert!(verdict(&header(0, 1)).contains("not closed cleanly"));
        assert!(verdict(&header(0, 128)).contains("Unknown incompatible feature: 80"));
    }

    #[test]
    fn p8_any_bytes_parse_without_panic() {
        let good = header(0, 0);
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = Qcow2Header::parse(&bytes);
                let _ = Qcow2Header::parse(&bytes[..at]);
            }
        }
    }
}
