//! From an input to an image: changes to its structures, and then every checksum right again.

use crate::base::Base;
use crate::memory::{IDENTITY, Memory};
use exd_format::layout::{
    area_pointer_layout, completion_log_layout, completion_slot_layout, header_layout,
    internal_entry_layout, node_layout, node_pointer_layout, record_layout, segment_layout,
    space_list_layout, superblock_layout,
};
use exd_format::{crc_of, seal};
use std::collections::HashSet;

const SUPERBLOCK: u64 = 4096;
/// More nodes are not followed.
const NODES_MAX: usize = 600;
/// More records are not looked at.
const RECORDS_MAX: usize = 400;
/// Longer structures are not sealed.
const LENGTH_MAX: u64 = 1 << 20;
/// The log's header, and its slots behind it.
const LOG_HEADER: usize = 4096;
const SLOT: usize = 40;

/// An input, read byte by byte; what is behind its end is zero.
pub struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// From the beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Input { bytes }
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.bytes.split_first().unwrap_or((&0, &[]));
        self.bytes = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(count.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// What an input may change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything in the image.
    All,
    /// The journal, and the superblock's words about it.
    Journal,
    /// The completion log.
    Log,
}

/// A structure of the image: where it is and how long.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    len: u64,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut whole = [0; 8];
    if let Some(field) = bytes.get(at..at + N) {
        whole[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(whole)
}

/// Changes a copy of the base as the input says. A change is: a byte that chooses the structure, two for
/// the offset in it, one for the length (up to 8, and whether the bytes are added), and the bytes.
pub fn apply(base: &Base, input: &mut Input<'_>, scope: Scope) -> Memory {
    let mut memory = base.memory.clone();
    let places = places(&memory, scope);
    let mut loose = HashSet::new();
    while !input.is_empty() {
        let choice = input.byte();
        let offset = u64::from(input.short());
        let shape = input.byte();
        let bytes = input.take(usize::from(shape % 8) + 1);
        let target = if scope == Scope::Log { Scope::Log } else { Scope::All };
        if target == Scope::Log {
            change_log(&mut memory, choice, offset, bytes);
            continue;
        }
        let Some(place) = places.get(usize::from(choice) % places.len()) else { continue };
        let at = place.offset + offset % place.len;
        if shape & 0x40 != 0 {
            // This one keeps a wrong checksum.
            loose.insert(place.offset);
        }
        if shape & 0x80 != 0 {
            let old = number::<8>(&memory.bytes(at, 8), 0);
            let sum = old.wrapping_add(number::<8>(&pad(bytes), 0) as i32 as i64 as u64);
            memory.put_bytes(at, &sum.to_le_bytes());
        } else {
            memory.put_bytes(at, bytes);
        }
    }
    if let Some(log) = memory.log_mut() {
        seal_log(log);
    }
    reseal(&mut memory, &loose);
    memory
}

fn pad(bytes: &[u8]) -> [u8; 8] {
    std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0))
}

/// The structures of an image that is in order.
fn places(memory: &Memory, scope: Scope) -> Vec<Place> {
    let superblock = memory.bytes(0, SUPERBLOCK);
    let slots = [0, SUPERBLOCK].map(|offset| Place { offset, len: SUPERBLOCK });
    let mut places = slots.to_vec();
    places.extend(records(memory, &superblock));
    if scope == Scope::All {
        places.extend(area(&superblock, superblock_layout::space_list));
        let mut nodes = Vec::new();
        collect_nodes(memory, &superblock, root(&superblock), &mut nodes);
        places.extend(nodes);
    }
    places
}

fn root(superblock: &[u8]) -> u64 {
    number::<8>(superblock, superblock_layout::root + node_pointer_layout::address)
}

fn node_size(superblock: &[u8]) -> u64 {
    1 << superblock[superblock_layout::node_bits].clamp(12, 16)
}

fn area(superblock: &[u8], at: usize) -> Option<Place> {
    let offset = number::<8>(superblock, at + area_pointer_layout::address);
    let len = number::<8>(superblock, at + area_pointer_layout::length);
    (offset != 0 && offset < 1 << 57 && (1..=LENGTH_MAX).contains(&len))
        .then_some(Place { offset, len })
}

fn children(node: &[u8]) -> Vec<usize> {
    let count = number::<2>(node, node_layout::count) as usize;
    let size = internal_entry_layout::SIZE;
    let room = (node.len() - node_layout::SIZE) / size;
    if node[node_layout::level] == 0 {
        return Vec::new();
    }
    let child = internal_entry_layout::child;
    (0..count.min(room)).map(|i| node_layout::SIZE + i * size + child).collect()
}

fn collect_nodes(memory: &Memory, superblock: &[u8], address: u64, nodes: &mut Vec<Place>) {
    let known = nodes.iter().any(|place| place.offset == address);
    if address == 0 || address >= 1 << 57 || known || nodes.len() >= NODES_MAX {
        return;
    }
    let len = node_size(superblock);
    let node = memory.bytes(address, len);
    nodes.push(Place { offset: address, len });
    for child in children(&node) {
        collect_nodes(memory, superblock, number::<8>(&node, child), nodes);
    }
}

/// What looks like a record, in the order of the sequences.
fn records(memory: &Memory, superblock: &[u8]) -> Vec<Place> {
    let step = 1 << superblock[superblock_layout::record_bits].clamp(9, 16);
    let mut found = Vec::new();
    for segment in segments(superblock) {
        let mut at = segment.offset;
        while at < segment.offset + segment.len && found.len() < RECORDS_MAX {
            let head = memory.bytes(at, record_layout::SIZE as u64);
            if head.starts_with(b"EXDJ") {
                let len = number::<4>(&head, record_layout::length);
                let len = len.clamp(record_layout::SIZE as u64, 65536);
                let sequence = number::<8>(&head, record_layout::sequence);
                found.push((sequence, Place { offset: at, len }));
            }
            at += step;
        }
    }
    found.sort_by_key(|(sequence, _)| *sequence);
    found.into_iter().map(|(_, place)| place).collect()
}

fn segments(superblock: &[u8]) -> Vec<Place> {
    let count = number::<4>(superblock, superblock_layout::segment_count).min(16) as usize;
    let places = (0..count).map(|i| {
        let at = superblock_layout::segments + i * segment_layout::SIZE;
        Place {
            offset: number::<8>(superblock, at + segment_layout::offset),
            len: number::<8>(superblock, at + segment_layout::length),
        }
    });
    places.filter(|place| place.offset < 1 << 57 && place.len <= LENGTH_MAX).collect()
}

/// Makes the checksums right, those in pointers too, as far as the structures can be found.
fn reseal(memory: &mut Memory, loose: &HashSet<u64>) {
    let superblock = memory.bytes(0, SUPERBLOCK);
    seal_records(memory, &superblock, loose);
    let root_crc = seal_nodes(memory, &superblock, root(&superblock), loose, &mut HashSet::new());
    let list = area(&superblock, superblock_layout::space_list);
    let list_crc = list.map(|place| seal_at(memory, place, loose));
    for slot in [0, SUPERBLOCK] {
        let mut bytes = memory.bytes(slot, SUPERBLOCK);
        // A slot that points elsewhere keeps the checksums it has.
        if let Some(crc) = root_crc.filter(|_| root(&bytes) == root(&superblock)) {
            store(&mut bytes, superblock_layout::root + node_pointer_layout::crc, crc);
        }
        if let Some(crc) = list_crc {
            store(&mut bytes, superblock_layout::space_list + area_pointer_layout::crc, crc);
        }
        if !loose.contains(&slot) {
            seal(&mut bytes);
        }
        memory.put_bytes(slot, &bytes);
    }
}

fn store(bytes: &mut [u8], at: usize, crc: u32) {
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn seal_at(memory: &mut Memory, place: Place, loose: &HashSet<u64>) -> u32 {
    let mut bytes = memory.bytes(place.offset, place.len);
    if !loose.contains(&place.offset) {
        seal(&mut bytes);
        memory.put_bytes(place.offset, &bytes[..bytes.len().min(header_layout::SIZE)]);
    }
    crc_of(&bytes)
}

fn seal_nodes(
    memory: &mut Memory,
    superblock: &[u8],
    address: u64,
    loose: &HashSet<u64>,
    seen: &mut HashSet<u64>,
) -> Option<u32> {
    if address == 0 || address >= 1 << 57 || seen.len() >= NODES_MAX || !seen.insert(address) {
        return None;
    }
    let len = node_size(superblock);
    let mut node = memory.bytes(address, len);
    if !node.starts_with(b"EXDN") {
        return None;
    }
    for child in children(&node) {
        let pointed = number::<8>(&node, child);
        if let Some(crc) = seal_nodes(memory, superblock, pointed, loose, seen) {
            store(&mut node, child + node_pointer_layout::crc, crc);
        }
    }
    memory.put_bytes(address, &node);
    Some(seal_at(memory, Place { offset: address, len }, loose))
}

/// Seals the records and chains each to the one before it.
fn seal_records(memory: &mut Memory, superblock: &[u8], loose: &HashSet<u64>) {
    let mut chain = number::<4>(superblock, superblock_layout::tail_chain) as u32;
    let first = number::<8>(superblock, superblock_layout::tail_sequence);
    for place in records(memory, superblock) {
        let mut bytes = memory.bytes(place.offset, place.len);
        if number::<8>(&bytes, record_layout::sequence) >= first && !loose.contains(&place.offset) {
            store(&mut bytes, record_layout::chain, chain);
            memory.put_bytes(place.offset, &bytes);
        }
        chain = seal_at(memory, place, loose);
    }
}

/// A change to the log: to its header, to a slot, or its length.
fn change_log(memory: &mut Memory, choice: u8, offset: u64, bytes: &[u8]) {
    let Some(log) = memory.log_mut() else { return };
    if choice == 255 {
        log.truncate(offset as usize);
        return;
    }
    let at = match usize::from(choice).checked_sub(16) {
        None => offset as usize % 128,
        Some(slot) => LOG_HEADER + slot * SLOT + offset as usize % SLOT,
    };
    for (i, byte) in bytes.iter().enumerate() {
        if let Some(place) = log.get_mut(at + i) {
            *place = *byte;
        }
    }
}

/// Makes the checksums of a log right: of the header, and of each slot that is not all zero.
pub fn seal_log(log: &mut [u8]) {
    let uuid: Vec<u8> =
        log.get(header_layout::uuid..header_layout::uuid + 16).unwrap_or(&IDENTITY).to_vec();
    if let Some(header) = log.get_mut(..LOG_HEADER) {
        let flags = completion_log_layout::flags;
        let kept: [u8; 4] = std::array::from_fn(|i| header[flags + i]);
        header[flags..flags + 4].fill(0);
        seal(header);
        header[flags..flags + 4].copy_from_slice(&kept);
    }
    let slots = log.get_mut(LOG_HEADER..).unwrap_or_default();
    for slot in slots.chunks_exact_mut(SLOT).filter(|slot| slot.iter().any(|byte| *byte != 0)) {
        let crc = completion_slot_layout::crc;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&uuid);
        hasher.update(&slot[..crc]);
        store(slot, crc, hasher.finalize());
    }
}

const _: () = assert!(space_list_layout::SIZE == 64);
