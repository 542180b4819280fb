//! The bodies of the fuzz targets (P6, P8): whatever bytes an image or a ring consists of, the code that
//! reads it neither panics nor hangs nor takes memory by an untrusted length.
//!
//! An input is a list of changes to a small image whose checksums are put right afterwards, so that what
//! the fuzzer invents gets past them. `bin/plain.rs` runs the same bodies on random inputs.
#![forbid(unsafe_code)]

mod base;
mod decoders;
mod memory;
mod patch;

pub use decoders::decode;

use base::Base;
use exd_image::blocking::Image;
use exd_image::check::{check, repair};
use exd_image::{ErrorKind, OpenOptions, State, Storage};
use memory::Memory;
use patch::{Input, Scope};

/// Bytes read or written in one step.
const STEP: u64 = 4096;
/// Places of the virtual disk that are read.
const PLACES: usize = 32;

/// A patched image of any kind: check, open, read, write, close, check, repair.
pub fn image(data: &[u8]) {
    let mut input = Input::new(data);
    let base = Base::any(input.byte());
    let steps = input.byte();
    exercise(patch::apply(base, &mut input, Scope::All), steps);
}

/// A patched journal.
pub fn journal(data: &[u8]) {
    let mut input = Input::new(data);
    let base = Base::with_journal(input.byte());
    let steps = input.byte();
    exercise(patch::apply(base, &mut input, Scope::Journal), steps);
}

/// A patched completion log.
pub fn log(data: &[u8]) {
    let mut input = Input::new(data);
    let base = Base::with_log();
    let steps = input.byte();
    exercise(patch::apply(base, &mut input, Scope::Log), steps);
}

/// A guest's rings, descriptors and request headers, and an inflight region, in front of a fake disk.
pub fn ring(data: &[u8]) {
    vhost_daemon::queue::exercise::exercise(data);
}

/// Every target, by name.
pub const TARGETS: [(&str, fn(&[u8])); 5] =
    [("decode", decode), ("image", image), ("journal", journal), ("log", log), ("ring", ring)];

/// Does with an image what programs do. What `check` finds in order must stay usable and in order.
fn exercise(memory: Memory, steps: u8) {
    let mut storage = memory.clone();
    let report = check(&mut storage);
    assert!(!storage.written(), "check writes nothing");
    let sound = report.as_ref().is_ok_and(|report| report.corruption_count == 0);
    read(memory.clone(), sound);
    if steps & 1 != 0 {
        write(memory.clone(), steps, sound);
    }
    if steps & 2 != 0 {
        mend(memory, steps & 4 != 0);
    }
}

/// The options that programs use, with less of everything.
fn options(read_only: bool, completion_log: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        completion_log,
        cache_bytes: 1 << 20,
        window_bytes: 1 << 20,
        log_slots: 1024,
        journal_max: 256 << 10,
        ..OpenOptions::default()
    }
}

/// Reads the map and some of what it shows.
fn read(memory: Memory, sound: bool) {
    let mut image = match Image::open(memory, options(true, false)) {
        Ok(image) => image,
        Err(error) => {
            assert!(!sound, "what check finds in order can be opened: {error}");
            return;
        }
    };
    let size = image.virtual_size();
    let map = image.map(0, size);
    if let Err(error) = &map {
        assert!(!sound, "what check finds in order has a map: {error}");
    }
    let pieces = map.unwrap_or_default();
    let step = pieces.len().div_ceil(PLACES).max(1);
    for piece in pieces.iter().step_by(step) {
        assert!(piece.len > 0 && piece.offset + piece.len <= size, "pieces lie within the disk");
        let mut buffer = vec![0xa5; piece.len.min(STEP) as usize];
        let result = image.read(piece.offset, &mut buffer);
        assert!(result.is_ok() || !sound, "what check finds in order can be read: {result:?}");
        if result.is_ok() && piece.state != State::Written {
            assert!(buffer.iter().all(|byte| *byte == 0), "only what was written is seen");
        }
    }
    let mut end = [0; 512];
    let _ = image.read(size.saturating_sub(512), &mut end);
    assert!(!image.storage().written(), "an image opened for reading is not written to");
}

/// Writes here and there, closes, and looks at what became of it.
fn write(memory: Memory, steps: u8, sound: bool) {
    let mut image = match Image::open(memory, options(false, steps & 8 != 0)) {
        Ok(image) => image,
        Err(error) => {
            let allowed = matches!(error.kind, ErrorKind::Storage(_) | ErrorKind::ReadOnly);
            assert!(!sound || allowed, "what check finds in order can be opened: {error}");
            return;
        }
    };
    let size = image.virtual_size();
    let mut failures = Vec::new();
    for (i, place) in [0, size / 3, size / 2, size.saturating_sub(STEP)].into_iter().enumerate() {
        let offset = place / 512 * 512;
        let len = STEP.min(size - offset) / 512 * 512;
        if len == 0 {
            continue;
        }
        let data: Vec<u8> = (0..len).map(|byte| byte as u8 | 1).collect();
        match image.write(offset, &data) {
            Err(error) => failures.push(error),
            Ok(()) => {
                let mut back = vec![0; len as usize];
                let read = image.read(offset, &mut back);
                // Where an image is damaged, two blocks may have one place.
                let same = read.is_err() || back == data;
                assert!(!sound || same, "a completed write is read back");
            }
        }
        let result = match (i + usize::from(steps >> 4)) % 5 {
            0 => image.discard(offset, len),
            1 => image.write_zeroes(offset, len, true),
            2 => image.flush(),
            3 => image.checkpoint(),
            _ => Ok(()),
        };
        failures.extend(result.err());
    }
    if steps & 0x20 != 0 {
        failures.extend(image.resize(size / 2 / 512 * 512 + 1024).err());
    }
    let full = image.storage().is_full();
    let usable = failures.is_empty() || full;
    assert!(!sound || usable, "what check finds in order can be written to: {failures:?}");
    if let Ok(mut memory) = image.close()
        && sound
        && !full
    {
        let report = check(&mut memory).expect("the image is readable after closing");
        assert_eq!(report.corruption_count, 0, "closed in order: {:?}", report.corruptions);
    }
}

/// Repairs, and looks whether that was one.
fn mend(mut memory: Memory, all: bool) {
    let Ok(_) = repair(&mut memory, all) else { return };
    let _ = check(&mut memory as &mut dyn Storage);
}

/// A random input: seldom long, and with values that tend to be at the edges.
pub fn random_input(seed: u64) -> Vec<u8> {
    let mut state = seed;
    // SplitMix64: every seed is as good as any other.
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let mut input = next().to_le_bytes()[..2].to_vec();
    for _ in 0..1 + next() % 4 {
        let [choice, low, high, shape, ..] = next().to_le_bytes();
        let offset = match next() % 3 {
            0 => u16::from(low),
            1 => u16::from_le_bytes([low, high]) % 512 / 8 * 8,
            _ => u16::from_le_bytes([low, high]),
        };
        let value = match next() % 6 {
            0 => u64::MAX,
            1 => next(),
            2 => 1 << (next() % 64),
            3 => (1u64 << (next() % 64)).wrapping_sub(1),
            4 => 0,
            _ => next() % 256,
        };
        // Most changes are choices among the first structures, and are sealed.
        let choice = if next() % 2 == 0 { choice % 8 } else { choice };
        let shape = if next() % 8 == 0 { shape } else { shape & 0x87 };
        input.push(choice);
        input.extend(offset.to_le_bytes());
        input.push(shape);
        input.extend(&value.to_le_bytes()[..usize::from(shape % 8) + 1]);
    }
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    /// P6, P8 on a stable compiler and in little time.
    #[test]
    fn random_inputs_do_no_harm() {
        for (name, body) in TARGETS {
            for seed in 0..300 {
                let input = random_input(seed);
                println!("{name} {seed}");
                body(&input);
            }
        }
    }

    /// The bases are in order, so what is found is due to the input.
    #[test]
    fn unchanged_images_are_in_order() {
        for choice in 0..5 {
            let mut memory = Base::any(choice).memory.clone();
            let report = check(&mut memory).expect("examined");
            assert_eq!(report.corruption_count, 0, "base {choice}: {:?}", report.corruptions);
        }
        let mut plain = Base::with_log().memory.clone();
        plain.remove_log();
        let with = check(&mut Base::with_log().memory.clone()).expect("examined");
        let without = check(&mut plain).expect("examined");
        assert_ne!(with.extents, without.extents, "the log counts");
        for steps in 0..=255 {
            image(&[0, steps]);
        }
    }
}
