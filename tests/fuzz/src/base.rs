//! The images that inputs change: golden ones without their guest data, from fixtures/fuzz-seeds/base.

use crate::memory::{IDENTITY, Memory};
use crate::patch::seal_log;
use exd_format::layout::completion_log_layout;
use std::sync::OnceLock;

/// An image to begin from.
pub struct Base {
    /// The image.
    pub memory: Memory,
}

const FILES: [&[u8]; 5] = [
    include_bytes!("../../../fixtures/fuzz-seeds/base/extents.sparse"),
    include_bytes!("../../../fixtures/fuzz-seeds/base/blocks-512.sparse"),
    include_bytes!("../../../fixtures/fuzz-seeds/base/live-journal.sparse"),
    include_bytes!("../../../fixtures/fuzz-seeds/base/journal-grown.sparse"),
    include_bytes!("../../../fixtures/fuzz-seeds/base/live-log.sparse"),
];
const LOG: &[u8] = include_bytes!("../../../fixtures/fuzz-seeds/base/live-log.exdlog.sparse");
const WITH_JOURNAL: [usize; 3] = [2, 3, 4];
const WITH_LOG: usize = 4;

/// Pieces of a file: its length, then offset, length and bytes of each.
fn unpack(mut bytes: &[u8]) -> (u64, Vec<(u64, &[u8])>) {
    let mut number = || {
        let (head, rest) = bytes.split_first_chunk::<8>().expect("a number");
        bytes = rest;
        u64::from_le_bytes(*head)
    };
    let len = number();
    let count = number();
    let places: Vec<(u64, u64)> = (0..count).map(|_| (number(), number())).collect();
    let mut pieces = Vec::new();
    for (offset, len) in places {
        let (piece, rest) = bytes.split_at(len as usize);
        bytes = rest;
        pieces.push((offset, piece));
    }
    (len, pieces)
}

fn load(index: usize) -> Base {
    let (len, pieces) = unpack(FILES[index]);
    let log = (index == WITH_LOG).then(|| {
        let (len, pieces) = unpack(LOG);
        let mut log = Memory::new(len, &pieces, None).bytes(0, len);
        log[completion_log_layout::boot_id..][..16].copy_from_slice(&IDENTITY);
        log[completion_log_layout::storage..][..16].copy_from_slice(&IDENTITY);
        seal_log(&mut log);
        log
    });
    Base { memory: Memory::new(len, &pieces, log) }
}

impl Base {
    fn get(index: usize) -> &'static Base {
        static BASES: [OnceLock<Base>; FILES.len()] = [const { OnceLock::new() }; FILES.len()];
        BASES[index].get_or_init(|| load(index))
    }

    /// One of all.
    pub fn any(choice: u8) -> &'static Base {
        Base::get(usize::from(choice) % FILES.len())
    }

    /// One that was not closed.
    pub fn with_journal(choice: u8) -> &'static Base {
        Base::get(WITH_JOURNAL[usize::from(choice) % WITH_JOURNAL.len()])
    }

    /// The one with a completion log.
    pub fn with_log() -> &'static Base {
        Base::get(WITH_LOG)
    }
}
