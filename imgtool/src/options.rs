//! The `-o name=value,...` options of image formats.

use crate::failure::{Failure, Result};
use crate::formats::Format;
use crate::size::{human, parse_size};

/// How much space of a new image is reserved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// The map is complete, the space is not reserved.
    Metadata,
    /// The space is reserved, not written.
    Falloc,
    /// Everything is written with zeroes.
    Full,
}

impl Preallocation {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

/// The options of a new image, resolved.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FormatOptions {
    /// `size`.
    pub size: Option<u64>,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// `block_size` (exd) or `cluster_size` (exd, qcow2), in bytes.
    pub block_size: Option<u32>,
    /// `refcount_bits` (qcow2).
    pub refcount_bits: Option<u32>,
}

/// What the user asked for with `-o`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// These options.
    Options(FormatOptions),
    /// `-o help`.
    Help,
}

/// Default block size of EXD, in bytes, where the host's direct I/O needs no larger unit.
pub const EXD_BLOCK_SIZE: u32 = 512;
/// Default cluster size of qcow2, in bytes.
pub const QCOW2_CLUSTER_SIZE: u32 = 65536;

/// Parses all `-o` arguments for `format`.
pub fn parse(format: Format, arguments: &[String]) -> Result<Request> {
    let mut options = FormatOptions::default();
    for item in arguments.iter().flat_map(|argument| argument.split(',')) {
        match item {
            "" => {}
            "help" | "?" | "list" => return Ok(Request::Help),
            item => {
                let (name, value) = item.split_once('=').unwrap_or((item, "on"));
                set(format, &mut options, name, value)?;
            }
        }
    }
    Ok(Request::Options(options))
}

fn set(format: Format, options: &mut FormatOptions, name: &str, value: &str) -> Result<()> {
    let size = || {
        parse_size(value).ok_or_else(|| {
            Failure::new(format_args!(
                "Parameter '{name}' expects a non-negative number below 2^64, with an optional \
                 suffix k, M, G, T, P or E, not '{}'",
                value.escape_debug()
            ))
        })
    };
    match (format, name) {
        (_, "size") => options.size = Some(size()?),
        (_, "preallocation") => options.preallocation = preallocation(format, value)?,
        (Format::Exd, "block_size" | "cluster_size") => {
            let range = 512..=65536;
            options.block_size = Some(power_of_two(size()?, range, "Block size", "512 and 64k")?);
        }
        (Format::Qcow2, "cluster_size") => {
            let range = 512..=2 << 20;
            options.block_size =
                Some(power_of_two(size()?, range, "Cluster size", "512 and 2048k")?);
        }
        (Format::Qcow2, "refcount_bits") => {
            let text = "Refcount width";
            options.refcount_bits = Some(power_of_two(size()?, 1..=64, text, "1 and 64 bits")?);
        }
        (Format::Qcow2, "compat") if matches!(value, "1.1" | "v3") => {}
        (Format::Qcow2, "compression_type") if value == "zlib" => {}
        (Format::Qcow2, "lazy_refcounts" | "extended_l2") if value == "off" => {}
        (Format::Qcow2, "compat" | "compression_type" | "lazy_refcounts" | "extended_l2") => {
            return Err(Failure::new(format_args!(
                "imgtool does not write qcow2 images with {name}={}; qemu-img does",
                value.escape_debug()
            )));
        }
        _ => {
            return Err(Failure::new(format_args!(
                "Invalid parameter '{}'; '-o help' lists those of format {}",
                name.escape_debug(),
                format.name()
            )));
        }
    }
    Ok(())
}

/// Parses a preallocation mode that `format` has.
pub fn preallocation(format: Format, value: &str) -> Result<Preallocation> {
    let mode = match value {
        "off" => Some(Preallocation::Off),
        "metadata" if format != Format::Raw => Some(Preallocation::Metadata),
        "falloc" => Some(Preallocation::Falloc),
        "full" => Some(Preallocation::Full),
        _ => None,
    };
    mode.ok_or_else(|| {
        Failure::new(format_args!(
            "Parameter 'preallocation' does not accept value '{}'; format {} takes {}",
            value.escape_debug(),
            format.name(),
            preallocation_modes(format)
        ))
    })
}

fn preallocation_modes(format: Format) -> &'static str {
    match format {
        Format::Raw => "off, falloc, full",
        _ => "off, metadata, falloc, full",
    }
}

fn power_of_two(
    value: u64,
    range: std::ops::RangeInclusive<u64>,
    what: &str,
    bounds: &str,
) -> Result<u32> {
    match u32::try_from(value) {
        Ok(fits) if value.is_power_of_two() && range.contains(&value) => Ok(fits),
        _ => Err(Failure::new(format_args!("{what} must be a power of two between {bounds}"))),
    }
}

/// The answer to `-o help`.
pub fn help(format: Format) -> String {
    let modes = preallocation_modes(format);
    let mut lines = Vec::new();
    let mut option = |name: &str, text: String| lines.push(format!("  {name:<22} - {text}"));
    if format == Format::Exd {
        let default = human(EXD_BLOCK_SIZE.into());
        option("block_size=<size>", format!("EXD block size, 512 to 64k (default {default}, or"));
        option("", "the unit of the host's direct I/O if that is larger)".to_owned());
        option("cluster_size=<size>", "Another name for block_size".to_owned());
    }
    if format == Format::Qcow2 {
        let default = human(QCOW2_CLUSTER_SIZE.into());
        option("cluster_size=<size>", format!("qcow2 cluster size (default {default})"));
    }
    option("preallocation=<str>", format!("Preallocation mode (allowed values: {modes})"));
    if format == Format::Qcow2 {
        option("refcount_bits=<num>", "Width of a reference count entry in bits".to_owned());
    }
    option("size=<size>", "Virtual disk size".to_owned());
    format!("Supported {} options:\n{}\n", format.name(), lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(format: Format, text: &str) -> Result<Request> {
        parse(format, &[text.to_owned()])
    }

    #[test]
    fn names_and_values() {
        let Ok(Request::Options(options)) =
            parsed(Format::Exd, "block_size=8k,preallocation=metadata,size=1M")
        else {
            panic!("valid")
        };
        assert_eq!(options.block_size, Some(8192));
        assert_eq!(options.preallocation, Preallocation::Metadata);
        assert_eq!(options.size, Some(1 << 20));
        assert_eq!(parsed(Format::Raw, "size=1,help"), Ok(Request::Help));
        assert!(parsed(Format::Raw, "preallocation=metadata").is_err());
        assert!(parsed(Format::Raw, "block_size=4096").is_err());
        assert!(parsed(Format::Exd, "block_size=3000").is_err());
        assert!(parsed(Format::Exd, "block_size=128k").is_err());
        assert!(parsed(Format::Qcow2, "lazy_refcounts=on").is_err());
        assert!(parsed(Format::Qcow2, "compat=1.1,cluster_size=2M").is_ok());
    }
}
