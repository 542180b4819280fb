//! The metadata of an EXD image as JSON, straight from the tables of the codec: damaged structures
//! are shown too, marked by `crc_ok`.

use crate::failure::{During, Result};
use exd_file::HostFile;
use exd_format::layout::{
    area_pointer_layout, entry_layout, extent_layout, holder_layout, internal_entry_layout,
    node_layout, node_pointer_layout, record_layout, segment_layout, space_list_layout,
    space_range_layout, superblock_layout,
};
use exd_format::{FieldInfo, HOLDER_OFFSET, HOLDER_SIZE, SUPERBLOCK_SIZE, Superblock, seal};
use serde_json::{Map, Value, json};
use std::collections::{HashSet, VecDeque};

/// Most structures of one kind that are shown.
const SHOWN_MAX: usize = 100_000;
/// Longest structure that is read, in bytes.
const STRUCTURE_MAX: u64 = 64 << 20;

/// All metadata that can be found.
pub fn dump(file: &HostFile) -> Result<Value> {
    let mut slots = Vec::new();
    for slot in 0..2 {
        let bytes = read(file, Superblock::slot_address(slot), SUPERBLOCK_SIZE as u64)?;
        let mut value = structure(&bytes, superblock_layout::FIELDS);
        match Superblock::decode(&bytes, slot, None) {
            Ok(_) => value.insert("valid".to_owned(), true.into()),
            Err(error) => value.insert("error".to_owned(), error.to_string().into()),
        };
        slots.push(Value::Object(value));
    }
    let holder = read(file, HOLDER_OFFSET, HOLDER_SIZE as u64)?;
    let mut all = json!({
        "superblocks": slots,
        "holder": structure(&holder, holder_layout::FIELDS),
    });
    let superblock = super::exd::read_superblock(file);
    if let (Ok(superblock), Value::Object(all)) = (superblock, &mut all) {
        all.insert("journal".to_owned(), journal(file, &superblock)?);
        all.insert("nodes".to_owned(), nodes(file, &superblock)?);
        all.insert("space_list".to_owned(), space_list(file, &superblock)?);
    }
    Ok(all)
}

fn read(file: &HostFile, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len.min(STRUCTURE_MAX) as usize];
    file.read_at(offset, &mut bytes).during(format_args!("could not read at offset {offset}"))?;
    Ok(bytes)
}

/// Every record in the ring, also those of earlier laps and epochs.
fn journal(file: &HostFile, superblock: &Superblock) -> Result<Value> {
    let step = 1usize << superblock.record_bits;
    let mut records = Vec::new();
    for segment in &superblock.segments {
        let ring = read(file, segment.offset, segment.length)?;
        for start in (0..ring.len()).step_by(step) {
            let Some(rest) = ring.get(start..).filter(|rest| rest.starts_with(b"EXDJ")) else {
                continue;
            };
            let field = |name: &str| number_of(rest, record_layout::FIELDS, name);
            let len = usize::try_from(field("length")).unwrap_or(0).min(rest.len());
            let record = rest.get(..len.max(record_layout::SIZE).min(rest.len())).unwrap_or(rest);
            let mut value = structure(record, record_layout::FIELDS);
            let entries = array(record, record_layout::SIZE, entry_layout::FIELDS, field("count"));
            value.insert("entries".to_owned(), entries);
            records.push(Value::Object(value));
        }
        if records.len() > SHOWN_MAX {
            break;
        }
    }
    Ok(Value::Array(records))
}

/// The tree, from the root downwards.
fn nodes(file: &HostFile, superblock: &Superblock) -> Result<Value> {
    let mut shown = Vec::new();
    let mut seen = HashSet::new();
    let mut waiting = VecDeque::from([superblock.root.address]);
    while let Some(address) = waiting.pop_front() {
        if address == 0 || !seen.insert(address) || shown.len() >= SHOWN_MAX {
            continue;
        }
        let bytes = read(file, address, 1 << superblock.node_bits)?;
        let field = |name: &str| number_of(&bytes, node_layout::FIELDS, name);
        let mut value = structure(&bytes, node_layout::FIELDS);
        let count = field("count");
        let leaf = field("level") == 0;
        let fields = if leaf { extent_layout::FIELDS } else { internal_entry_layout::FIELDS };
        value.insert("entries".to_owned(), array(&bytes, node_layout::SIZE, fields, count));
        if !leaf {
            waiting.extend(children(&bytes, count));
        }
        shown.push(Value::Object(value));
    }
    Ok(Value::Array(shown))
}

/// Addresses that the entries of an inner node point at.
fn children(node: &[u8], count: u64) -> Vec<u64> {
    let entries = node.get(node_layout::SIZE..).unwrap_or_default();
    entries
        .chunks_exact(internal_entry_layout::SIZE)
        .take(usize::try_from(count).unwrap_or(usize::MAX))
        .filter_map(|entry| entry.get(internal_entry_layout::child..))
        .map(|pointer| number_of(pointer, node_pointer_layout::FIELDS, "address"))
        .collect()
}

fn space_list(file: &HostFile, superblock: &Superblock) -> Result<Value> {
    let area = &superblock.space_list;
    if area.is_none() {
        return Ok(Value::Null);
    }
    let bytes = read(file, area.address, area.length)?;
    let mut value = structure(&bytes, space_list_layout::FIELDS);
    let count = number_of(&bytes, space_list_layout::FIELDS, "count");
    let ranges = array(&bytes, space_list_layout::SIZE, space_range_layout::FIELDS, count);
    value.insert("ranges".to_owned(), ranges);
    Ok(Value::Object(value))
}

/// A whole structure with its checksum judged.
fn structure(bytes: &[u8], fields: &[FieldInfo]) -> Map<String, Value> {
    let mut value = object(bytes, fields);
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    value.insert("crc_ok".to_owned(), (sealed == bytes).into());
    value
}

/// `count` things of one kind one after another.
fn array(bytes: &[u8], start: usize, fields: &[FieldInfo], count: u64) -> Value {
    let size = fields.last().map_or(1, |last| last.offset + last.size);
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(SHOWN_MAX);
    let things = bytes.get(start..).unwrap_or_default().chunks_exact(size).take(count);
    things.map(|thing| Value::Object(object(thing, fields))).collect()
}

fn object(bytes: &[u8], fields: &[FieldInfo]) -> Map<String, Value> {
    let mut value = Map::new();
    for field in fields {
        let Some(part) = bytes.get(field.offset..field.offset + field.size) else { continue };
        match field.name {
            // Shown only where it is not what it should be.
            "reserved" if part.iter().all(|byte| *byte == 0) => continue,
            name => value.insert(name.to_owned(), field_value(name, part)),
        };
    }
    value
}

fn field_value(name: &str, part: &[u8]) -> Value {
    match (name, part.len()) {
        ("reserved" | "magic", _) => hex(part).into(),
        ("kind", 4) => String::from_utf8_lossy(part).into_owned().into(),
        ("uuid" | "boot_id" | "identity", 16) => hex(part).into(),
        ("root" | "child", node_pointer_layout::SIZE) => {
            Value::Object(object(part, node_pointer_layout::FIELDS))
        }
        (_, area_pointer_layout::SIZE) => Value::Object(object(part, area_pointer_layout::FIELDS)),
        ("segments", _) => {
            let all = part.chunks_exact(segment_layout::SIZE);
            let used = all.filter(|segment| segment.iter().any(|byte| *byte != 0));
            used.map(|segment| Value::Object(object(segment, segment_layout::FIELDS))).collect()
        }
        (_, 1..=8) => number(part).into(),
        _ => text(part),
    }
}

/// A text field: its length in 2 bytes, then so many bytes.
fn text(part: &[u8]) -> Value {
    let len = number(part.get(..2).unwrap_or_default()) as usize;
    match part.get(2..2 + len) {
        Some(text) => String::from_utf8_lossy(text).into_owned().into(),
        None => hex(part).into(),
    }
}

fn number_of(bytes: &[u8], fields: &[FieldInfo], name: &str) -> u64 {
    fields
        .iter()
        .find(|field| field.name == name)
        .and_then(|field| bytes.get(field.offset..field.offset + field.size))
        .map_or(0, number)
}

/// A little-endian number of at most 8 bytes.
fn number(part: &[u8]) -> u64 {
    part.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn hex(part: &[u8]) -> String {
    part.iter().map(|byte| format!("{byte:02x}")).collect()
}
