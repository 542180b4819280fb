//! The superblock, its geometry, and the choice between its two copies.

use crate::error::{DecodeError, ensure};
use crate::features::{self, FeatureSet};
use crate::fields::{Field, FieldError, Id16, Text, U8, U16, U32, U64, get_at, located, put_at};
use crate::header::{self, StructureType};
use crate::node::{NodePointer, TREE_END};
use crate::space::SPACE_LIST_MAX;
use crate::{
    BLOCK_BITS_MAX, BLOCK_BITS_MIN, METADATA_ALIGN, NODE_BITS_MAX, NODE_BITS_MIN, PHYSICAL_END,
    RECORD_BITS_MAX, RECORD_BITS_MIN, VIRTUAL_SIZE_MAX,
};

/// Bytes of a superblock.
pub const SUPERBLOCK_SIZE: usize = 4096;
/// Bytes at the start of the file that hold the superblocks, the holder record and nothing else.
pub const FIXED_AREA: u64 = 65536;
/// Alignment of offset and length of a journal segment.
pub const SEGMENT_ALIGN: u64 = 65536;
/// Most segments a journal ring can have.
pub const SEGMENTS_MAX: usize = 16;
/// Longest ring in bytes, all segments together.
pub const RING_MAX: u64 = 256 << 20;
/// Highest value of generation, epoch, cseq and sequence in a superblock: counting on from there
/// cannot overflow.
pub const COUNTER_MAX: u64 = 1 << 62;
/// Identifies an EXD image.
pub const MAGIC: [u8; 8] = *b"\x89EXD\r\n\x1a\n";
/// The major version this code reads.
pub const VERSION_MAJOR: u16 = 1;
/// The newest minor version this code writes.
pub const VERSION_MINOR: u16 = 0;

const NAME: &str = "superblock";

enumeration! {
    /// Whether a session has the image open for writing.
    pub enum State: U8, "state" {
        /// Closed cleanly: the journal holds nothing that the tree does not.
        Clean = 0,
        /// Open for writing, or left so by a crash.
        InUse = 1,
    }
}

enumeration! {
    /// What creation promised about space; kept so that discards honour it.
    pub enum Preallocation: U32, "preallocation" {
        /// Nothing is allocated in advance.
        Off = 0,
        /// The tree maps the whole disk; the host file stays sparse.
        Metadata = 1,
        /// The host has allocated the space.
        Falloc = 2,
        /// The space was written with zeroes.
        Full = 3,
    }
}

structure! {
    /// Where a run of metadata lies. All zero: there is none.
    #[derive(Copy, Default)]
    pub struct AreaPointer, area_pointer_layout, 24; {
        /// Byte offset in the image file.
        address: u64 as U64 = 0,
        /// Length in bytes.
        length: u64 as U64 = 8,
        /// Checksum of the structure there.
        crc: u32 as U32 = 16,
        [4] = 20,
    }
}
nested!(AreaPointer, area_pointer_layout);

impl AreaPointer {
    /// Whether it points at nothing.
    pub fn is_none(&self) -> bool {
        self.address == 0
    }
}

structure! {
    /// A run of the journal ring.
    #[derive(Copy, Default)]
    pub struct JournalSegment, segment_layout, 16; {
        /// Byte offset in the image file.
        offset: u64 as U64 = 0,
        /// Length in bytes.
        length: u64 as U64 = 8,
    }
}
nested!(JournalSegment, segment_layout);

/// The array of segments: used ones first, then zeroes.
enum Segments {}

impl Field for Segments {
    type Host = Vec<JournalSegment>;
    const SIZE: usize = SEGMENTS_MAX * segment_layout::SIZE;
    fn get(bytes: &[u8]) -> Result<Vec<JournalSegment>, FieldError> {
        let mut segments = Vec::new();
        let mut ended = false;
        for index in 0..SEGMENTS_MAX {
            let at = index * segment_layout::SIZE;
            let segment = get_at::<JournalSegment>(bytes, at)?;
            if segment == JournalSegment::default() {
                ended = true;
            } else if ended {
                return Err((at, "journal segment after an empty one"));
            } else {
                segments.push(segment);
            }
        }
        Ok(segments)
    }
    fn put(value: &Vec<JournalSegment>, bytes: &mut [u8]) {
        bytes.fill(0);
        for (index, segment) in value.iter().enumerate() {
            put_at::<JournalSegment>(segment, bytes, index * segment_layout::SIZE);
        }
    }
}

type PathText = Text<1024>;
type FormatText = Text<32>;
type LogPathText = Text<704>;

structure! {
    /// The superblock: the root of everything. Its address is a matter of the slot it is encoded for.
    pub struct Superblock, superblock_layout, 4096; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// Checkpoint generation, from 1, one more for each superblock commit.
        generation: u64 as U64 = 8,
        (address: U64) = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        (magic: U64) = 40,
        (version_major: U16) = 48,
        /// Minor version; a higher one than ours makes the image read-only to us.
        version_minor: u16 as U16 = 50,
        /// Block size is `1 << block_bits` bytes.
        block_bits: u8 as U8 = 52,
        /// Journal records are aligned to `1 << record_bits` bytes.
        record_bits: u8 as U8 = 53,
        /// A tree node has `1 << node_bits` bytes.
        node_bits: u8 as U8 = 54,
        /// Clean or in use.
        state: State as State = 55,
        /// Features that must be understood to read.
        incompatible: u64 as U64 = 56,
        /// Features that must be understood to write.
        read_only_compatible: u64 as U64 = 64,
        /// Features that may be ignored.
        compatible: u64 as U64 = 72,
        /// Features that a writer who does not keep them up to date clears.
        autoclear: u64 as U64 = 80,
        /// Bytes of the virtual disk.
        virtual_size: u64 as U64 = 88,
        /// Number of the writing session, one more for each; 0 before the first.
        epoch: u64 as U64 = 96,
        /// Highest completion sequence (cseq) contained in the tree.
        applied: u64 as U64 = 104,
        /// Root of the extent tree.
        root: NodePointer as NodePointer = 112,
        /// Extents in the tree.
        extent_count: u64 as U64 = 136,
        /// Nodes in the tree.
        node_count: u64 as U64 = 144,
        /// Position in the ring (linear bytes) of the first record to replay.
        journal_tail: u64 as U64 = 152,
        /// Sequence of the record expected there.
        tail_sequence: u64 as U64 = 160,
        /// Checksum of that record's predecessor; 0 at the start of an epoch.
        tail_chain: u32 as U32 = 168,
        (segment_count: U32) = 172,
        /// The space list.
        space_list: AreaPointer as AreaPointer = 176,
        /// Nothing at or past this byte has ever been written, or is pointed at.
        data_end: u64 as U64 = 200,
        /// Current birth number, from 1, one more for each snapshot.
        birth: u32 as U32 = 208,
        /// What creation promised.
        preallocation: Preallocation as Preallocation = 212,
        /// Snapshot table (needs its feature bit).
        snapshots: AreaPointer as AreaPointer = 216,
        /// Bitmap directory (needs its feature bit).
        bitmaps: AreaPointer as AreaPointer = 240,
        /// Encryption area (needs its feature bit).
        encryption: AreaPointer as AreaPointer = 264,
        /// When the image was made, seconds since 1970. Informational.
        created: u64 as U64 = 288,
        /// No flag is defined yet.
        flags: u64 as U64 = 296,
        [208] = 304,
        /// The runs of the journal ring, in ring order, at most 16.
        segments: Vec<JournalSegment> as Segments = 512,
        [256] = 768,
        /// Backing file (needs its feature bit); empty for none.
        backing_path: String as PathText = 1024,
        /// Format of the backing file.
        backing_format: String as FormatText = 2048,
        [32] = 2080,
        /// External data file (needs its feature bit); empty for none.
        data_file_path: String as PathText = 2112,
        /// The session's completion log; empty for none. Meaningful only while in use.
        completion_log_path: String as LogPathText = 3136,
        [256] = 3840,
    }
}

/// What the rest of the metadata is checked against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// No structure of the checkpoint has a higher generation.
    pub generation: u64,
    /// Block size is `1 << block_bits`.
    pub block_bits: u8,
    /// Node size is `1 << node_bits`.
    pub node_bits: u8,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Everything pointed at ends at or before this byte of the file.
    pub data_end: u64,
    /// No extent has a higher birth number.
    pub birth: u32,
}

impl Geometry {
    /// Blocks of the virtual disk; the last one may be cut off by its end.
    pub fn virtual_blocks(&self) -> u64 {
        self.virtual_size.div_ceil(1 << self.block_bits.min(BLOCK_BITS_MAX))
    }

    /// Bytes of a tree node.
    pub fn node_size(&self) -> u64 {
        1 << self.node_bits.min(NODE_BITS_MAX)
    }
}

impl Superblock {
    /// Byte offset of a slot, 0 or 1.
    pub fn slot_address(slot: usize) -> u64 {
        assert!(slot < 2, "there are two superblock slots");
        (slot * SUPERBLOCK_SIZE) as u64
    }

    /// The slot that is written first when this generation is committed.
    pub fn first_slot(&self) -> usize {
        usize::from(self.generation % 2 == 1)
    }

    /// What the rest of the metadata is checked against.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            uuid: self.uuid,
            generation: self.generation,
            block_bits: self.block_bits,
            node_bits: self.node_bits,
            virtual_size: self.virtual_size,
            data_end: self.data_end,
            birth: self.birth,
        }
    }

    /// Bytes of the ring, all segments together.
    pub fn ring_length(&self) -> u64 {
        self.segments.iter().fold(0, |sum, segment| sum.saturating_add(segment.length))
    }

    /// Why this code may not write the image; empty if it may.
    pub fn read_only_reasons(&self) -> Vec<String> {
        let unknown = self.read_only_compatible & !features::READ_ONLY_IMPLEMENTED;
        let mut reasons = features::names(FeatureSet::ReadOnlyCompatible, unknown);
        if self.version_minor > VERSION_MINOR {
            reasons.push(format!("format version {VERSION_MAJOR}.{}", self.version_minor));
        }
        reasons
    }

    /// What a writer does that does not keep every autoclear feature up to date: clears the bits and
    /// the area pointers of those this code does not implement. The ranges of
    /// [`SpaceKind::Bitmaps`](crate::SpaceKind) become open ones with it.
    pub fn drop_autoclear(&mut self) {
        self.autoclear &= features::AUTOCLEAR_IMPLEMENTED;
        if self.autoclear & features::AUTOCLEAR_BITMAPS == 0 {
            self.bitmaps = AreaPointer::default();
        }
    }

    /// The 4096 bytes for slot 0 or 1, sealed.
    pub fn encode(&self, slot: usize) -> Vec<u8> {
        if let Err(error) = self.validate() {
            panic!("encoding an invalid superblock: {error}");
        }
        assert!(self.version_minor == VERSION_MINOR, "we write version 1.0 only");
        let mut bytes = vec![0; SUPERBLOCK_SIZE];
        self.put_fields(&mut bytes);
        use superblock_layout as at;
        put_at::<U64>(&Superblock::slot_address(slot), &mut bytes, at::address);
        bytes[at::magic..at::magic + 8].copy_from_slice(&MAGIC);
        put_at::<U16>(&VERSION_MAJOR, &mut bytes, at::version_major);
        put_at::<U32>(&(self.segments.len() as u32), &mut bytes, at::segment_count);
        header::finish(StructureType::Superblock, &mut bytes);
        bytes
    }

    /// Decodes the bytes of slot 0 or 1. Features are judged before the fields they might change.
    pub fn decode(
        bytes: &[u8],
        slot: usize,
        uuid: Option<&[u8; 16]>,
    ) -> Result<Superblock, DecodeError> {
        use superblock_layout as at;
        let magic = bytes.get(at::magic..at::magic + 8) == Some(&MAGIC);
        if !magic && !StructureType::Superblock.begins(bytes) {
            return Err(DecodeError::Foreign);
        }
        ensure(bytes.len() == SUPERBLOCK_SIZE, NAME, 0, "not 4096 bytes")?;
        header::check(StructureType::Superblock, bytes, Superblock::slot_address(slot), uuid)?;
        ensure(magic, NAME, at::magic, "wrong magic")?;
        check_support(bytes).map_err(located(NAME))??;
        let superblock = Superblock::get_fields(bytes).map_err(located(NAME))?;
        if superblock.read_only_reasons().is_empty() {
            Superblock::check_reserved(bytes).map_err(located(NAME))?;
        }
        let count = get_at::<U32>(bytes, at::segment_count).map_err(located(NAME))?;
        ensure(
            usize::try_from(count) == Ok(superblock.segments.len()),
            NAME,
            at::segment_count,
            "not the number of journal segments",
        )?;
        superblock.validate()?;
        Ok(superblock)
    }

    /// Checks every rule that needs nothing but the superblock.
    pub fn validate(&self) -> Result<(), DecodeError> {
        self.validate_sizes()?;
        self.validate_counters()?;
        self.validate_journal()?;
        self.validate_root()?;
        self.validate_areas()?;
        self.validate_texts()?;
        self.validate_overlaps()
    }

    fn validate_sizes(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        let bits = |value: u8, min, max, offset, what| {
            ensure((min..=max).contains(&value), NAME, offset, what)
        };
        bits(
            self.block_bits,
            BLOCK_BITS_MIN,
            BLOCK_BITS_MAX,
            at::block_bits,
            "block_bits not in 9..=16",
        )?;
        bits(
            self.record_bits,
            RECORD_BITS_MIN,
            RECORD_BITS_MAX,
            at::record_bits,
            "record_bits not in 9..=16",
        )?;
        bits(
            self.node_bits,
            NODE_BITS_MIN,
            NODE_BITS_MAX,
            at::node_bits,
            "node_bits not in 12..=16",
        )?;
        ensure(
            self.virtual_size.is_multiple_of(512) && self.virtual_size <= VIRTUAL_SIZE_MAX,
            NAME,
            at::virtual_size,
            "not a multiple of 512 up to 2^56",
        )?;
        ensure(
            self.data_end.is_multiple_of(METADATA_ALIGN)
                && (FIXED_AREA..=PHYSICAL_END).contains(&self.data_end),
            NAME,
            at::data_end,
            "not a multiple of 4096 from 65536 to 2^57",
        )
    }

    fn validate_counters(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        for (counter, offset) in [
            (self.generation, at::generation),
            (self.epoch, at::epoch),
            (self.applied, at::applied),
            (self.tail_sequence, at::tail_sequence),
        ] {
            ensure(counter <= COUNTER_MAX, NAME, offset, "counter above 2^62")?;
        }
        ensure(self.generation >= 1, NAME, at::generation, "generation 0")?;
        ensure(
            self.epoch >= 1 || self.state == State::Clean,
            NAME,
            at::epoch,
            "in use, but never opened for writing",
        )?;
        ensure(self.birth >= 1, NAME, at::birth, "birth number 0")?;
        ensure(self.flags == 0, NAME, at::flags, "unknown flag")?;
        ensure(self.tail_sequence >= 1, NAME, at::tail_sequence, "sequence 0")
    }

    fn validate_journal(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        ensure(
            (1..=SEGMENTS_MAX).contains(&self.segments.len()),
            NAME,
            at::segment_count,
            "not 1 to 16 journal segments",
        )?;
        for (index, segment) in self.segments.iter().enumerate() {
            let offset = at::segments + index * segment_layout::SIZE;
            ensure(
                segment.offset % SEGMENT_ALIGN == 0
                    && segment.length % SEGMENT_ALIGN == 0
                    && segment.length > 0,
                NAME,
                offset,
                "journal segment not aligned to 65536",
            )?;
            ensure(
                self.inside(segment.offset, segment.length),
                NAME,
                offset,
                "journal segment outside the image's data",
            )?;
        }
        let ring = self.ring_length();
        ensure(ring <= RING_MAX, NAME, at::segments, "journal ring longer than 256 MiB")?;
        ensure(
            self.journal_tail < ring && self.journal_tail.is_multiple_of(1 << self.record_bits),
            NAME,
            at::journal_tail,
            "tail not an aligned place in the ring",
        )
    }

    fn validate_root(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        if self.root.is_none() {
            ensure(
                self.root == NodePointer::default(),
                NAME,
                at::root,
                "pointer without an address is not zero",
            )?;
            return ensure(
                self.extent_count == 0 && self.node_count == 0,
                NAME,
                at::extent_count,
                "counts of an empty tree",
            );
        }
        self.root.validate(&self.geometry(), NAME, at::root)?;
        ensure(self.extent_count >= 1, NAME, at::extent_count, "a tree without extents")?;
        ensure(
            self.node_count > u64::from(self.root.level)
                && (self.root.level > 0 || self.node_count == 1),
            NAME,
            at::node_count,
            "not possible at this height",
        )
    }

    fn validate_areas(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        let incompatible = |bit: u64| self.incompatible & bit != 0;
        self.validate_area(&self.space_list, at::space_list, SPACE_LIST_MAX)?;
        for (area, offset, feature) in [
            (
                &self.snapshots,
                at::snapshots,
                self.read_only_compatible & features::READ_ONLY_SNAPSHOTS != 0,
            ),
            (&self.bitmaps, at::bitmaps, self.autoclear & features::AUTOCLEAR_BITMAPS != 0),
            (&self.encryption, at::encryption, incompatible(features::INCOMPATIBLE_ENCRYPTION)),
        ] {
            ensure(
                feature != area.is_none(),
                NAME,
                offset,
                "the pointer and its feature bit do not agree",
            )?;
            self.validate_area(area, offset, u64::MAX)?;
        }
        Ok(())
    }

    fn validate_area(
        &self,
        area: &AreaPointer,
        offset: usize,
        max: u64,
    ) -> Result<(), DecodeError> {
        if area.is_none() {
            return ensure(
                *area == AreaPointer::default(),
                NAME,
                offset,
                "pointer without an address is not zero",
            );
        }
        ensure(
            area.address.is_multiple_of(METADATA_ALIGN)
                && area.length.is_multiple_of(METADATA_ALIGN)
                && (1..=max).contains(&area.length),
            NAME,
            offset,
            "area not aligned to 4096, empty or too long",
        )?;
        ensure(
            self.inside(area.address, area.length),
            NAME,
            offset,
            "area outside the image's data",
        )
    }

    fn validate_texts(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        let has = |bit: u64| self.incompatible & bit != 0;
        let backing = has(features::INCOMPATIBLE_BACKING);
        for (text, max, feature, offset) in [
            (&self.backing_path, 1022, backing, at::backing_path),
            (&self.backing_format, 30, backing, at::backing_format),
            (&self.data_file_path, 1022, has(features::INCOMPATIBLE_DATA_FILE), at::data_file_path),
        ] {
            ensure(text.len() <= max, NAME, offset, "text longer than its field")?;
            ensure(
                feature != text.is_empty(),
                NAME,
                offset,
                "the text and its feature bit do not agree",
            )?;
        }
        ensure(
            self.completion_log_path.len() <= 702,
            NAME,
            at::completion_log_path,
            "text longer than its field",
        )
    }

    /// Nothing the superblock points at overlaps anything else it points at.
    fn validate_overlaps(&self) -> Result<(), DecodeError> {
        use superblock_layout as at;
        let mut runs: Vec<(u64, u64, usize)> = self
            .segments
            .iter()
            .map(|segment| (segment.offset, segment.length, at::segments))
            .collect();
        if !self.root.is_none() {
            runs.push((self.root.address, self.geometry().node_size(), at::root));
        }
        for (area, offset) in [
            (&self.space_list, at::space_list),
            (&self.snapshots, at::snapshots),
            (&self.bitmaps, at::bitmaps),
            (&self.encryption, at::encryption),
        ] {
            if !area.is_none() {
                runs.push((area.address, area.length, offset));
            }
        }
        runs.sort_unstable();
        for pair in runs.windows(2) {
            if let [(start, length, _), (next, _, offset)] = *pair {
                ensure(
                    start.saturating_add(length) <= next,
                    NAME,
                    offset,
                    "overlaps something else the superblock points at",
                )?;
            }
        }
        Ok(())
    }

    /// Whether a run lies between the fixed area and `data_end`.
    fn inside(&self, start: u64, length: u64) -> bool {
        start >= FIXED_AREA && start.checked_add(length).is_some_and(|end| end <= self.data_end)
    }
}

/// Version and incompatible features, judged before any field they might give another meaning.
fn check_support(bytes: &[u8]) -> Result<Result<(), DecodeError>, FieldError> {
    use superblock_layout as at;
    let generation = get_at::<U64>(bytes, at::generation)?;
    let major = get_at::<U16>(bytes, at::version_major)?;
    let minor = get_at::<U16>(bytes, at::version_minor)?;
    let incompatible = get_at::<U64>(bytes, at::incompatible)?;
    let mut features = Vec::new();
    if major == 0 {
        return Err((at::version_major, "version 0"));
    }
    if major != VERSION_MAJOR {
        features.push(format!("format version {major}.{minor}"));
    }
    let missing = incompatible & !features::INCOMPATIBLE_IMPLEMENTED;
    features.extend(features::names(FeatureSet::Incompatible, missing));
    Ok(if features.is_empty() {
        Ok(())
    } else {
        Err(DecodeError::Unsupported { features, generation })
    })
}

/// Which superblock to go by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// This one.
    Use {
        /// The slot it came from.
        slot: usize,
        /// The superblock.
        superblock: Box<Superblock>,
        /// Whether the other slot holds the same; if not, a commit was interrupted or the other
        /// slot is damaged.
        both: bool,
    },
    /// The newest valid superblock asks for what this code does not have.
    Unsupported {
        /// What is missing, by name.
        features: Vec<String>,
    },
    /// Neither slot can be trusted.
    Corrupt(DecodeError),
    /// Neither slot was ever a superblock.
    NotExd,
}

/// Chooses between what the two slots decoded to. The table is in `SPEC.md`, "Choice of superblock".
pub fn choose(
    slot0: Result<Superblock, DecodeError>,
    slot1: Result<Superblock, DecodeError>,
) -> Choice {
    use DecodeError::{Foreign, Unsupported};
    let unsupported = |features| Choice::Unsupported { features };
    let sole =
        |slot, superblock| Choice::Use { slot, superblock: Box::new(superblock), both: false };
    match (slot0, slot1) {
        (Ok(a), Ok(b)) if a.uuid != b.uuid => Choice::Corrupt(DecodeError::corrupt(
            NAME,
            superblock_layout::uuid,
            "the two copies belong to different images",
        )),
        (Ok(a), Ok(b)) if a.generation == b.generation => {
            if a == b {
                Choice::Use { slot: 0, superblock: Box::new(a), both: true }
            } else {
                Choice::Corrupt(DecodeError::corrupt(
                    NAME,
                    superblock_layout::generation,
                    "the two copies have the same generation but differ",
                ))
            }
        }
        (Ok(a), Ok(b)) => {
            if a.generation > b.generation {
                sole(0, a)
            } else {
                sole(1, b)
            }
        }
        (Ok(a), Err(Unsupported { features, generation })) => {
            if generation >= a.generation {
                unsupported(features)
            } else {
                sole(0, a)
            }
        }
        (Err(Unsupported { features, generation }), Ok(b)) => {
            if generation >= b.generation {
                unsupported(features)
            } else {
                sole(1, b)
            }
        }
        (Ok(a), Err(_)) => sole(0, a),
        (Err(_), Ok(b)) => sole(1, b),
        (
            Err(Unsupported { features: a, generation: newer }),
            Err(Unsupported { features: b, generation: older }),
        ) => unsupported(if newer >= older { a } else { b }),
        (Err(Unsupported { features, .. }), Err(_))
        | (Err(_), Err(Unsupported { features, .. })) => unsupported(features),
        (Err(Foreign), Err(Foreign)) => Choice::NotExd,
        (Err(Foreign), Err(error)) | (Err(error), Err(_)) => Choice::Corrupt(error),
    }
}

/// A root never covers more than this.
const _: () = assert!(VIRTUAL_SIZE_MAX >> BLOCK_BITS_MIN <= TREE_END);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{UUID, corruption, each_bit_flip, each_sealed_flip, patched, superblock};
    use superblock_layout as at;

    fn decode(bytes: &[u8]) -> Result<Superblock, DecodeError> {
        Superblock::decode(bytes, 1, Some(&UUID))
    }

    #[test]
    fn round_trip() {
        for slot in 0..2 {
            let bytes = superblock().encode(slot);
            assert_eq!(bytes.len(), SUPERBLOCK_SIZE);
            assert_eq!(Superblock::decode(&bytes, slot, None), Ok(superblock()));
            corruption(Superblock::decode(&bytes, 1 - slot, None));
        }
        corruption(Superblock::decode(&superblock().encode(0), 0, Some(&[0; 16])));
    }

    #[test]
    fn p6_every_bit_flip_is_seen() {
        each_bit_flip(&superblock().encode(1), |bytes| decode(bytes).is_ok());
    }

    #[test]
    fn p8_sealed_flips_are_harmless() {
        each_sealed_flip(&superblock().encode(1), |bytes| {
            decode(bytes)
                .ok()
                .filter(|superblock| superblock.read_only_reasons().is_empty())
                .map(|superblock| superblock.encode(1))
        });
    }

    #[test]
    fn p8_short_and_long_bytes_are_refused() {
        let bytes = superblock().encode(0);
        for len in [0, 1, 40, 47, 48, 4095] {
            assert!(Superblock::decode(&bytes[..len], 0, None).is_err());
        }
        assert!(Superblock::decode(&[bytes, vec![0]].concat(), 0, None).is_err());
        assert_eq!(Superblock::decode(&[0; 4096], 0, None), Err(DecodeError::Foreign));
    }

    #[test]
    fn every_unknown_incompatible_bit_is_refused_by_name() {
        let bytes = superblock().encode(1);
        for bit in 0..64 {
            let bytes = patched(&bytes, at::incompatible, &(1_u64 << bit).to_le_bytes());
            let names = features::names(FeatureSet::Incompatible, 1 << bit);
            let expected = DecodeError::Unsupported { features: names, generation: 7 };
            assert_eq!(decode(&bytes), Err(expected));
        }
        let bytes = patched(&bytes, at::version_major, &[2, 0]);
        assert!(matches!(decode(&bytes), Err(DecodeError::Unsupported { features, .. })
            if features == ["format version 2.0"]));
    }

    #[test]
    fn unknown_read_only_bits_and_minor_versions_allow_reading() {
        let bytes = superblock().encode(1);
        for bit in 1..64 {
            let bytes = patched(&bytes, at::read_only_compatible, &(1_u64 << bit).to_le_bytes());
            let reasons = decode(&bytes).expect("readable").read_only_reasons();
            assert_eq!(reasons, [format!("read-only compatible feature bit {bit}")]);
        }
        let bytes = patched(&bytes, at::version_minor, &[1, 0]);
        let bytes = patched(&bytes, 304, &[1]); // A field that 1.1 may have added.
        assert_eq!(decode(&bytes).expect("readable").read_only_reasons(), ["format version 1.1"]);
        for bit in 1..64 {
            for offset in [at::compatible, at::autoclear] {
                let bytes = patched(&superblock().encode(1), offset, &(1_u64 << bit).to_le_bytes());
                assert!(decode(&bytes).is_ok_and(|found| found.read_only_reasons().is_empty()));
            }
        }
    }

    /// A superblock with one thing wrong, and where the complaint must point.
    fn wrong(change: impl Fn(&mut Superblock)) -> u64 {
        let mut bad = superblock();
        change(&mut bad);
        let mut bytes = superblock().encode(1);
        bad.put_fields(&mut bytes);
        crate::fields::put_at::<U32>(&(bad.segments.len() as u32), &mut bytes, at::segment_count);
        crate::seal(&mut bytes);
        match decode(&bytes) {
            Err(DecodeError::Corrupt { offset, .. }) => offset,
            other => panic!("expected a corruption, got {other:?}"),
        }
    }

    #[test]
    fn rejects_impossible_geometry() {
        let segment = |offset, length| JournalSegment { offset, length };
        type Case<'a> = (usize, &'a dyn Fn(&mut Superblock));
        let cases: &[Case] = &[
            (at::block_bits, &|s| s.block_bits = 8),
            (at::block_bits, &|s| s.block_bits = 17),
            (at::record_bits, &|s| s.record_bits = 8),
            (at::record_bits, &|s| s.record_bits = 255),
            (at::node_bits, &|s| s.node_bits = 11),
            (at::node_bits, &|s| s.node_bits = 17),
            (at::virtual_size, &|s| s.virtual_size = 511),
            (at::virtual_size, &|s| s.virtual_size = (1 << 56) + 512),
            (at::data_end, &|s| s.data_end = 0),
            (at::data_end, &|s| s.data_end += 512),
            (at::data_end, &|s| s.data_end = (1 << 57) + 4096),
            (at::generation, &|s| s.generation = 0),
            (at::generation, &|s| s.generation = COUNTER_MAX + 1),
            (at::epoch, &|s| s.epoch = COUNTER_MAX + 1),
            (at::applied, &|s| s.applied = u64::MAX),
            (at::tail_sequence, &|s| s.tail_sequence = u64::MAX),
            (at::epoch, &|s| s.epoch = 0),
            (at::birth, &|s| s.birth = 0),
            (at::flags, &|s| s.flags = 1),
            (at::tail_sequence, &|s| s.tail_sequence = 0),
            (at::segment_count, &|s| s.segments.clear()),
            (at::segments, &|s| s.segments[0].offset += 4096),
            (at::segments + 16, &|s| s.segments[1].length = 4096),
            (at::segments + 16, &|s| s.segments[1].length = 0),
            (at::segments + 16, &|s| s.segments[1].offset = 0),
            (at::segments + 16, &|s| s.segments[1].offset = s.data_end),
            (at::segments, &|s| s.segments[0].length = 0_u64.wrapping_sub(0x40000)),
            (at::segments, &|s| {
                s.data_end = 1 << 40;
                s.segments.push(segment(1 << 30, RING_MAX));
            }),
            (at::segments, &|s| s.segments.push(segment(0x70000, 0x10000))),
            (at::journal_tail, &|s| s.journal_tail = 0x50000),
            (at::journal_tail, &|s| s.journal_tail += 512),
            (at::root, &|s| s.root.address = 0),
            (at::root, &|s| s.root.address = 4096),
            (at::root, &|s| s.root.address += 512),
            (at::root, &|s| s.root.address = s.data_end),
            (at::root, &|s| s.root.address = 0_u64.wrapping_sub(4096)),
            (at::root, &|s| s.root.address = 0x50000),
            (at::root + 8, &|s| s.root.generation = 8),
            (at::root + 8, &|s| s.root.generation = 0),
            (at::root + 20, &|s| s.root.level = 16),
            (at::extent_count, &|s| s.extent_count = 0),
            (at::extent_count, &|s| s.root = NodePointer::default()),
            (at::node_count, &|s| s.node_count = 1),
            (at::node_count, &|s| s.root.level = 0),
            (at::space_list, &|s| s.space_list.address = 0),
            (at::space_list, &|s| s.space_list.address += 1),
            (at::space_list, &|s| s.space_list.length = 0),
            (at::space_list, &|s| s.space_list.length = SPACE_LIST_MAX + 4096),
            (at::space_list, &|s| s.space_list.address = s.root.address),
            (at::snapshots, &|s| s.snapshots = s.space_list),
            (at::snapshots, &|s| s.read_only_compatible = 1),
            (at::bitmaps, &|s| s.autoclear = 1),
            (at::bitmaps, &|s| s.bitmaps = s.space_list),
            (at::encryption, &|s| s.encryption = s.space_list),
            (at::backing_path, &|s| s.backing_path = "x".to_owned()),
            (at::backing_format, &|s| s.backing_format = "x".to_owned()),
            (at::data_file_path, &|s| s.data_file_path = "x".to_owned()),
        ];
        for (index, (offset, change)) in cases.iter().enumerate() {
            assert_eq!(wrong(change), *offset as u64, "case {index}");
        }
    }

    #[test]
    fn rejects_unknown_numbers_and_bad_texts() {
        let bytes = superblock().encode(1);
        let bad: &[(usize, &[u8])] = &[
            (at::state, &[2]),
            (at::preallocation, &[4]),
            (at::segment_count, &[3]),
            (at::segments + 48, &[1]),
            (at::root + 21, &[1]),
            (304, &[1]),
            (4095, &[1]),
            (at::completion_log_path, &[0xFF, 0xFF]),
            (at::completion_log_path, &[11]),
            (at::completion_log_path + 2, &[0xFF]),
            (at::completion_log_path + 2, &[0]),
            (at::magic, &[0]),
            (at::version_major, &[0]),
        ];
        for (offset, patch) in bad {
            corruption(decode(&patched(&bytes, *offset, patch)));
        }
    }

    #[test]
    fn p8_bitmaps_are_dropped_by_a_writer() {
        let mut bitmapped = superblock();
        bitmapped.autoclear = features::AUTOCLEAR_BITMAPS | 1 << 9;
        bitmapped.bitmaps = AreaPointer { address: 0x90000, length: 4096, crc: 1 };
        let mut found = decode(&bitmapped.encode(1)).expect("readable");
        found.drop_autoclear();
        assert_eq!(decode(&found.encode(1)), Ok(superblock()));
    }

    #[test]
    fn largest_and_smallest_disks() {
        for block_bits in BLOCK_BITS_MIN..=BLOCK_BITS_MAX {
            for virtual_size in [0, 512, VIRTUAL_SIZE_MAX] {
                let mut disk = superblock();
                disk.block_bits = block_bits;
                disk.virtual_size = virtual_size;
                assert_eq!(decode(&disk.encode(1)), Ok(disk));
            }
        }
    }

    /// What a slot can hold, for the table of choices.
    #[derive(Clone, Copy, PartialEq, Debug)]
    pub(super) enum Found {
        Valid(u64),
        Unsupported(u64),
        Damaged,
        Foreign,
    }

    fn result(found: Found) -> Result<Superblock, DecodeError> {
        match found {
            Found::Valid(generation) => Ok(Superblock { generation, ..superblock() }),
            Found::Unsupported(generation) => Err(DecodeError::Unsupported {
                features: vec![format!("{generation}")],
                generation,
            }),
            Found::Damaged => Err(DecodeError::corrupt(NAME, 4, "damaged")),
            Found::Foreign => Err(DecodeError::Foreign),
        }
    }

    /// P4, P6: every combination has one outcome, and it does not depend on the order of the slots
    /// but for the slot's number.
    #[test]
    fn p6_choice_over_every_combination() {
        use Found::*;
        let all = [Valid(6), Valid(7), Unsupported(6), Unsupported(7), Damaged, Foreign];
        for a in all {
            for b in all {
                let outcome = choose(result(a), result(b));
                let expected = match (a, b) {
                    (Valid(x), Valid(y)) => Some((usize::from(y > x), x == y)),
                    (Valid(x), Unsupported(y)) => (x > y).then_some((0, false)),
                    (Unsupported(x), Valid(y)) => (y > x).then_some((1, false)),
                    (Valid(_), _) => Some((0, false)),
                    (_, Valid(_)) => Some((1, false)),
                    _ => None,
                };
                match (expected, outcome) {
                    (Some((slot, both)), Choice::Use { slot: got, superblock, both: same }) => {
                        assert_eq!((got, same), (slot, both), "{a:?} {b:?}");
                        assert_eq!(*superblock, result([a, b][slot]).expect("valid"));
                    }
                    (None, Choice::Unsupported { .. }) => {
                        assert!(
                            matches!(a, Unsupported(_)) || matches!(b, Unsupported(_)),
                            "{a:?} {b:?}"
                        );
                    }
                    (None, Choice::NotExd) => assert_eq!((a, b), (Foreign, Foreign)),
                    (None, Choice::Corrupt(_)) => {
                        let hopeless = |found| matches!(found, Damaged | Foreign);
                        assert!(hopeless(a) && hopeless(b) && (a == Damaged || b == Damaged));
                    }
                    (expected, outcome) => panic!("{a:?} {b:?}: {expected:?} but {outcome:?}"),
                }
            }
        }
    }

    #[test]
    fn p6_copies_that_disagree_are_corrupt() {
        let other = Superblock { applied: 42, ..superblock() };
        assert!(matches!(choose(Ok(superblock()), Ok(other)), Choice::Corrupt(_)));
        let other = Superblock { uuid: [0; 16], generation: 8, ..superblock() };
        assert!(matches!(choose(Ok(superblock()), Ok(other)), Choice::Corrupt(_)));
    }

    #[test]
    fn commits_alternate_between_the_slots() {
        assert_eq!(superblock().first_slot(), 1);
        assert_eq!(Superblock { generation: 8, ..superblock() }.first_slot(), 0);
    }
}
