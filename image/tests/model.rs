//! Random requests against a byte array, with clean and unclean reopening (P2, P4), on a plain memory
//! storage. The simulator in tests/sim does this with crashes of the host, errors and reordering.

mod common;

use common::Memory;
use exd_image::blocking::Image;
use exd_image::check::check;
use exd_image::{CreateOptions, OpenOptions, Preallocation};

fn options(seed: u64) -> OpenOptions {
    OpenOptions {
        window_bytes: if seed.is_multiple_of(2) { 128 << 10 } else { 1 << 20 },
        overlay_max: 16,
        clear_up_nodes: seed % 2,
        cache_bytes: 64 << 10,
        ..Default::default()
    }
}

fn run(seed: u64) {
    let mut rng = seed.wrapping_mul(0x9e3779b97f4a7c15) | 1;
    let mut random = move |below: u64| {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        (rng >> 11) % below
    };
    let block_size = [512, 4096, 65536][(seed % 3) as usize];
    let mut size = 512 * (1000 + random(4000));
    let preallocation =
        [Preallocation::Off, Preallocation::Off, Preallocation::Metadata][random(3) as usize];
    let alignment = if seed % 5 == 1 && block_size >= 4096 { 4096 } else { 512 };
    let create = CreateOptions {
        virtual_size: size,
        block_size,
        preallocation,
        uuid: [seed as u8; 16],
        journal_bytes: 65536,
        ..Default::default()
    };
    let storage = Image::create(Memory { alignment, ..Default::default() }, &create).unwrap();
    let mut image = Image::open(storage, options(seed)).unwrap();
    let mut model = vec![0u8; size as usize];
    let mut stamp = 0u64;
    for step in 0..400 {
        let offset = random(size / 512) * 512;
        let scale = 1 << random(9);
        let len = (512 * (1 + random(scale))).min(size - offset);
        let (from, to) = (offset as usize, (offset + len) as usize);
        match random(20) {
            0..=9 => {
                let mut data = vec![0; len as usize];
                for (i, sector) in data.chunks_mut(512).enumerate() {
                    stamp += 1;
                    sector[..8].copy_from_slice(&stamp.to_le_bytes());
                    sector[8..16].copy_from_slice(&(offset + i as u64 * 512).to_le_bytes());
                }
                image.write(offset, &data).unwrap();
                model[from..to].copy_from_slice(&data);
            }
            10..=12 => {
                let mut data = vec![0; len as usize];
                image.read(offset, &mut data).unwrap();
                assert!(
                    data == model[from..to],
                    "seed {seed} step {step}: read at {offset} differs"
                );
            }
            13 => {
                image.write_zeroes(offset, len, random(2) == 0).unwrap();
                model[from..to].fill(0);
            }
            14 => {
                image.discard(offset, len).unwrap();
                let block = block_size as usize;
                let end = if to == size as usize { to } else { to / block * block };
                let start = from.next_multiple_of(block);
                if start < end {
                    model[start..end].fill(0);
                }
            }
            15 => image.flush().unwrap(),
            16 if random(2) == 0 => image.checkpoint().unwrap(),
            16 => image.defragment(0, size).unwrap(),
            17 => {
                size = 512 * (500 + random(4500));
                image.resize(size).unwrap();
                model.resize(size as usize, 0);
            }
            18 => {
                let mut storage = image.close().unwrap();
                let report = check(&mut storage).unwrap();
                assert!(report.is_clean(), "seed {seed} step {step}, closed: {report:?}");
                assert!(!report.unclean);
                image = Image::open(storage, options(seed)).unwrap();
            }
            _ => {
                let mut storage = image.abandon();
                storage.kill(|| random(2) == 0);
                let report = check(&mut storage).unwrap();
                assert!(report.is_clean(), "seed {seed} step {step}, killed: {report:?}");
                image = Image::open(storage, options(seed)).unwrap();
            }
        }
    }
    let mut data = vec![0; size as usize];
    image.read(0, &mut data).unwrap();
    if let Some(at) = data.iter().zip(&model).position(|(a, b)| a != b) {
        panic!("seed {seed}: byte {at} differs at the end");
    }
    image.discard(0, size).unwrap();
    let mut storage = image.close().unwrap();
    let report = check(&mut storage).unwrap();
    assert!(report.is_clean(), "seed {seed}: {report:?}");
    if preallocation == Preallocation::Off {
        assert_eq!(report.allocated_blocks, 0);
    }
}

#[test]
fn p2_p4_random_requests_agree_with_a_byte_array() {
    for seed in 0..60 {
        run(seed);
    }
}

#[test]
fn p1_one_sync_per_flush() {
    let create = CreateOptions { virtual_size: 1 << 30, uuid: [7; 16], ..Default::default() };
    let storage = Image::create(Memory::default(), &create).unwrap();
    let mut image = Image::open(storage, OpenOptions::default()).unwrap();
    let before = image.storage().syncs;
    for i in 0..256u64 {
        image.write(i * 65536, &[i as u8 | 1; 4096]).unwrap();
        image.flush().unwrap();
    }
    let syncs = image.storage().syncs - before;
    assert!(syncs <= 260, "{syncs} syncs for 256 flushes");
    image.flush().unwrap();
    assert_eq!(image.storage().syncs - before, syncs, "a flush with nothing new costs no sync");
}
