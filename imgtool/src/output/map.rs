//! The output of `map`.

use super::text::printable;
use crate::failure::{Failure, Result};
use serde::Serialize;

/// A range of the virtual disk. The fields are qemu-img's JSON keys.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct MapEntry {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
    /// Position in the backing chain; 0 is the image itself.
    pub depth: u32,
    /// This chain provides the range.
    pub present: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Holds stored data.
    pub data: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// Where it lies in the file, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl MapEntry {
    /// True if `next` continues this entry, so that both can be shown as one.
    fn continues_with(&self, next: &MapEntry) -> bool {
        let places_match = match (self.offset, next.offset) {
            (None, None) => true,
            (Some(place), Some(next_place)) => place.checked_add(self.length) == Some(next_place),
            _ => false,
        };
        let kind = |entry: &MapEntry| {
            (entry.depth, entry.present, entry.zero, entry.data, entry.compressed)
        };
        places_match && kind(self) == kind(next) && self.start + self.length == next.start
    }
}

/// Appends `entry`, joined with the last one where it continues it.
pub fn push(entries: &mut Vec<MapEntry>, entry: MapEntry) {
    match entries.last_mut() {
        Some(last) if last.continues_with(&entry) => last.length += entry.length,
        _ => entries.push(entry),
    }
}

/// The JSON form: an array with one object per line.
pub fn json(entries: &[MapEntry]) -> Result<String> {
    let mut out = b"[".to_vec();
    for (index, entry) in entries.iter().enumerate() {
        if index > 0 {
            out.extend_from_slice(b",\n");
        }
        serde_json::to_writer(&mut out, entry)
            .map_err(|error| Failure::new(format_args!("could not make JSON: {error}")))?;
    }
    out.extend_from_slice(b"]\n");
    String::from_utf8(out).map_err(|_| Failure::new("could not make JSON: not UTF-8"))
}

/// The text form: a table of the data that lies plainly in a file.
pub fn text(entries: &[MapEntry], filename: &str) -> Result<String> {
    let mut out = format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    let mut shown: Vec<MapEntry> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.data && !entry.zero) {
        if entry.offset.is_none() {
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        }
        push(&mut shown, entry.clone());
    }
    for entry in shown {
        let hex = |value: u64| if value == 0 { "0".to_owned() } else { format!("{value:#x}") };
        out += &format!(
            "{:<16}{:<16}{:<16}{}\n",
            hex(entry.start),
            hex(entry.length),
            hex(entry.offset.unwrap_or(0)),
            printable(filename)
        );
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, offset: Option<u64>) -> MapEntry {
        let data = offset.is_some();
        MapEntry {
            start,
            length: 10,
            depth: 0,
            present: data,
            zero: !data,
            data,
            compressed: false,
            offset,
        }
    }

    #[test]
    fn neighbours_are_joined_where_they_continue() {
        let mut entries = Vec::new();
        for next in
            [entry(0, Some(100)), entry(10, Some(110)), entry(20, Some(90)), entry(30, None)]
        {
            push(&mut entries, next);
        }
        let lengths: Vec<u64> = entries.iter().map(|entry| entry.length).collect();
        assert_eq!(lengths, [20, 10, 10]);
    }
}
