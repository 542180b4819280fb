//! Sizes as people write and read them, in qemu-img's way: units of 1024.

use crate::failure::{Failure, Result};

/// The unit of virtual sizes, in bytes.
pub const SECTOR: u64 = 512;

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Parses `512`, `64k`, `1.5G`; the suffix is one of `b k K M G T P E`.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, factor) = match text.char_indices().next_back()? {
        (at, suffix) if !suffix.is_ascii_digit() => (text.get(..at)?, factor_of(suffix)?),
        _ => (text, 1),
    };
    match digits.split_once('.') {
        None => parse_digits(digits)?.checked_mul(factor),
        Some((whole, fraction)) => {
            // Exact in integers: a fraction of at most 18 digits of at most 2^60.
            if fraction.is_empty() || fraction.len() > 18 {
                return None;
            }
            let numerator = u128::from(parse_digits(fraction)?) * u128::from(factor);
            let part = u64::try_from(numerator / 10u128.pow(fraction.len() as u32)).ok()?;
            parse_digits(whole)?.checked_mul(factor)?.checked_add(part)
        }
    }
}

fn parse_digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

fn factor_of(suffix: char) -> Option<u64> {
    let power = match suffix {
        'b' | 'B' => 0,
        'k' | 'K' => 1,
        'm' | 'M' => 2,
        'g' | 'G' => 3,
        't' | 'T' => 4,
        'p' | 'P' => 5,
        'e' | 'E' => 6,
        _ => return None,
    };
    Some(1 << (10 * power))
}

/// The size of an image from the command line, not rounded.
pub fn image_size(text: &str) -> Result<u64> {
    parse_size(text).filter(|size| i64::try_from(*size).is_ok()).ok_or_else(|| {
        Failure::new(format_args!(
            "Invalid image size specified: '{}'. You may use k, M, G, T, P or E suffixes for \
             kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
            text.escape_debug()
        ))
    })
}

/// An option whose value is a size; for clap.
pub fn size_value(text: &str) -> std::result::Result<u64, String> {
    parse_size(text).ok_or_else(|| "not a size such as 512, 64k or 1.5G".to_owned())
}

/// Rounds up to whole sectors; `None` past 2^63.
pub fn round_up_to_sector(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(SECTOR).filter(|size| i64::try_from(*size).is_ok())
}

/// `64 MiB`, `1.32 GiB`: three significant digits.
pub fn human(bytes: u64) -> String {
    let mut unit = 0;
    let mut value = bytes as f64;
    // 1000 would need a fourth digit.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        value if value >= 99.95 || value == 0.0 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_qemu_img_parses() {
        for (text, size) in [
            ("0", Some(0)),
            ("1234", Some(1234)),
            ("10b", Some(10)),
            ("1k", Some(1024)),
            ("1K", Some(1024)),
            ("1.5G", Some(3 << 29)),
            ("64T", Some(64 << 40)),
            ("0.5k", Some(512)),
            ("10Z", None),
            ("", None),
            ("k", None),
            ("-1", None),
            ("1.", None),
            (".5k", None),
            ("1.2.3", None),
            ("99999999E", None),
            ("1\u{e9}", None),
        ] {
            assert_eq!(parse_size(text), size, "{text:?}");
        }
    }

    #[test]
    fn prints_as_qemu_img_prints() {
        for (size, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (69632, "68 KiB"),
            (10 << 20, "10 MiB"),
            (10_738_466_816, "10 GiB"),
            (1_384_448, "1.32 MiB"),
            (64 << 40, "64 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(size), text);
        }
    }
}
