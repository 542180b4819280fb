//! Making an image.

use crate::blocking_io as io;
use crate::disk::commit_superblock;
use crate::error::Error;
use crate::map::{Mapping, Merge, MergeStep, NodeCache, Overlay, State};
use crate::ranges::RangeSet;
use crate::space::Space;
use crate::storage::{SECTOR, Storage};
use exd_format::{
    FIXED_AREA, JournalSegment, NodePointer, Preallocation, RING_MAX, SEGMENT_ALIGN, SpaceList,
    Superblock, VIRTUAL_SIZE_MAX,
};

/// Room for metadata in a fresh image, in bytes.
const META_BYTES: u64 = 256 << 10;

/// What image to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateOptions {
    /// Bytes of the virtual disk; rounded up to a multiple of 512.
    pub virtual_size: u64,
    /// Bytes of a block: a power of two from 512 to 65536.
    pub block_size: u32,
    /// What to allocate in advance.
    pub preallocation: Preallocation,
    /// Identity; must be unique.
    pub uuid: [u8; 16],
    /// Seconds since 1970.
    pub created: u64,
    /// Bytes of the journal ring to begin with, rounded up to a multiple of 65536.
    pub journal_bytes: u64,
    /// Alignment of journal records in bytes: a power of two from 512 to 65536.
    pub record_align: u32,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            virtual_size: 0,
            block_size: 4096,
            preallocation: Preallocation::Off,
            uuid: [0; 16],
            created: 0,
            journal_bytes: 256 << 10,
            record_align: 4096,
        }
    }
}

/// Makes an image in an empty file or on a block device, whose content is lost.
pub fn create(st: &mut dyn Storage, options: &CreateOptions) -> Result<(), Error> {
    let bits = |value: u32, what: &str| {
        let bits = value.trailing_zeros() as u8;
        if value.is_power_of_two() && (9..=16).contains(&bits) {
            Ok(bits)
        } else {
            Err(Error::invalid(format!("{what} must be a power of two between 512 and 65536")))
        }
    };
    let block_bits = bits(options.block_size, "block size")?;
    let record_bits = bits(options.record_align, "record alignment")?;
    let virtual_size = options
        .virtual_size
        .checked_next_multiple_of(SECTOR)
        .filter(|size| *size <= VIRTUAL_SIZE_MAX)
        .ok_or_else(|| Error::invalid(format!("the largest virtual size is {VIRTUAL_SIZE_MAX}")))?;
    let ring = options.journal_bytes.max(1).next_multiple_of(SEGMENT_ALIGN);
    if ring > RING_MAX {
        return Err(Error::invalid(format!("the largest journal is {RING_MAX} bytes")));
    }
    let block_size = u64::from(options.block_size);
    let per_block = block_size / SECTOR;
    let meta = FIXED_AREA + ring..FIXED_AREA + ring + META_BYTES;
    let blocks = virtual_size.div_ceil(block_size);
    let data = meta.end.next_multiple_of(1 << 16);
    let (data_end, preallocated) = match options.preallocation {
        Preallocation::Off => (meta.end, 0),
        _ => {
            let end = data.checked_add(blocks * block_size).filter(|end| *end <= VIRTUAL_SIZE_MAX);
            let end = end.ok_or_else(|| Error::invalid("too large to be preallocated"))?;
            (end.next_multiple_of(4096), blocks)
        }
    };

    if st.geometry().fixed_length {
        let len = st
            .file_len()
            .map_err(|error| Error::storage(error, "cannot tell the size of the device", 0))?;
        if len < data_end {
            return Err(Error::invalid(format!(
                "the device has {len} bytes, the image needs at least {data_end}"
            )));
        }
        io::write_zeroes(st, 0..meta.end, "the metadata area")?;
    } else {
        io::set_len(st, data_end)?;
        io::write_zeroes(st, FIXED_AREA..FIXED_AREA + ring, "the journal")?;
        // A reserve: a full host must not keep a checkpoint from making room.
        match io::allocate(st, meta.clone()) {
            Err(error) if !unsupported(&error) => return Err(error),
            _ => {}
        }
    }

    let mut superblock = Superblock {
        generation: 1,
        uuid: options.uuid,
        version_minor: exd_format::VERSION_MINOR,
        block_bits,
        record_bits,
        node_bits: exd_format::NODE_BITS_DEFAULT,
        virtual_size,
        tail_sequence: 1,
        data_end,
        birth: 1,
        preallocation: options.preallocation,
        created: options.created,
        segments: vec![JournalSegment { offset: FIXED_AREA, length: ring }],
        ..empty_superblock()
    };
    let mut open = RangeSet::new();
    open.insert(meta.start / SECTOR..meta.end / SECTOR);
    if preallocated > 0 {
        let mapping = Mapping {
            state: if options.preallocation == Preallocation::Full {
                State::Written
            } else {
                State::Unwritten
            },
            place: data / SECTOR,
            birth: 1,
        };
        preallocate(st, options.preallocation, data..data + blocks * block_size)?;
        let mut overlay = Overlay::new(per_block);
        overlay.set(0, blocks, mapping);
        build_tree(st, &mut superblock, &overlay, &mut open, per_block)?;
    }
    write_list(st, &mut superblock, open)?;
    io::sync(st)?;
    commit_superblock(st, &superblock)
}

fn unsupported(error: &Error) -> bool {
    matches!(
        error.kind,
        crate::error::ErrorKind::Storage(crate::storage::StorageError::Unsupported)
    )
}

fn preallocate(
    st: &mut dyn Storage,
    policy: Preallocation,
    range: std::ops::Range<u64>,
) -> Result<(), Error> {
    match policy {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => io::allocate(st, range),
        Preallocation::Full => {
            match io::allocate(st, range.clone()) {
                Err(error) if !unsupported(&error) => return Err(error),
                _ => {}
            }
            io::write_zeroes(st, range, "the preallocated space")
        }
    }
}

fn build_tree(
    st: &mut dyn Storage,
    superblock: &mut Superblock,
    overlay: &Overlay,
    open: &mut RangeSet,
    per_block: u64,
) -> Result<(), Error> {
    let node_size = superblock.geometry().node_size();
    let mut cache = NodeCache::new(0, node_size);
    let mut merge = Merge::new(superblock.uuid, node_size, 1, per_block, NodePointer::default());
    let mut allocate = || open.take(node_size / SECTOR, 8).map(|sector| sector * SECTOR);
    loop {
        let step = merge.advance(&mut cache, overlay, &mut allocate, usize::MAX);
        let (root, writes) = match step {
            Ok(MergeStep::Done(root, writes)) => (Some(root), writes),
            Ok(MergeStep::Write(writes)) => (None, writes),
            Ok(MergeStep::NoSpace | MergeStep::TooDeep) | Err(_) => {
                return Err(Error::invalid("the metadata area is too small for the tree"));
            }
        };
        for (offset, bytes) in writes {
            io::write(st, offset, &bytes, "the tree")?;
        }
        if let Some(root) = root {
            superblock.root = root;
            superblock.node_count = merge.written.len() as u64;
            superblock.extent_count = merge.extents_delta.unsigned_abs();
            return Ok(());
        }
    }
}

fn write_list(
    st: &mut dyn Storage,
    superblock: &mut Superblock,
    mut open: RangeSet,
) -> Result<(), Error> {
    let length = SpaceList::length_for(open.count() + 1);
    let sector = open
        .take(length / SECTOR, 8)
        .ok_or_else(|| Error::invalid("the metadata area is too small for the space list"))?;
    let list = SpaceList {
        generation: 1,
        address: sector * SECTOR,
        uuid: superblock.uuid,
        ranges: Space::listing(&open, &RangeSet::new()),
    };
    let bytes = list.encode(Some(length));
    superblock.space_list = list.pointer(&bytes);
    io::write(st, list.address, &bytes, "the space list")
}

/// A superblock with nothing in it.
fn empty_superblock() -> Superblock {
    Superblock {
        generation: 0,
        uuid: [0; 16],
        version_minor: 0,
        block_bits: 0,
        record_bits: 0,
        node_bits: 0,
        state: exd_format::State::Clean,
        incompatible: 0,
        read_only_compatible: 0,
        compatible: 0,
        autoclear: 0,
        virtual_size: 0,
        epoch: 0,
        applied: 0,
        root: NodePointer::default(),
        extent_count: 0,
        node_count: 0,
        journal_tail: 0,
        tail_sequence: 0,
        tail_chain: 0,
        space_list: Default::default(),
        data_end: 0,
        birth: 0,
        preallocation: Preallocation::Off,
        snapshots: Default::default(),
        bitmaps: Default::default(),
        encryption: Default::default(),
        created: 0,
        flags: 0,
        segments: Vec::new(),
        backing_path: String::new(),
        backing_format: String::new(),
        data_file_path: String::new(),
        completion_log_path: String::new(),
    }
}
