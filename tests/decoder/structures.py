"""The structures of an EXD image, as format-spec/SPEC.md describes them: bytes to values, with every rule.

Written from the specification alone. Rule names (S4, N5, R2 ...) are those of the specification.
"""

import struct
import zlib
from dataclasses import dataclass, field

SECTOR = 512
HEADER_LENGTH = 40
SUPERBLOCK_LENGTH = 4096
HOLDER_ADDRESS = 8192
FIRST_BYTE = 65536
"""Where the area begins that the ownership rules cover."""
PLACE_LIMIT = 1 << 57
COUNTER_LIMIT = 1 << 62
MAGIC = bytes.fromhex("894558440D0A1A0A")

HOLE, UNWRITTEN, WRITTEN, ZERO = 0, 1, 2, 3
OPEN_RANGE, ZERO_RANGE, BITMAP_RANGE = 1, 2, 3
MAP, CONVERT, RESERVE, ZEROED, UNMAP, WINDOW, RELEASE = 1, 2, 3, 4, 5, 6, 7
MORE, KEEP = 1, 2

FEATURES = {
    ("incompatible", 0): "compressed extents (zstd)",
    ("incompatible", 1): "external data file",
    ("incompatible", 2): "encryption (LUKS)",
    ("incompatible", 3): "backing file",
    ("read_only_compatible", 0): "internal snapshots",
    ("autoclear", 0): "dirty bitmaps",
}
BIT_DATA_FILE, BIT_ENCRYPTION, BIT_BACKING = 1 << 1, 1 << 2, 1 << 3
BIT_SNAPSHOTS = 1 << 0
BIT_BITMAPS = 1 << 0


class Problem(Exception):
    """Something about an image that keeps it, or a part of it, from being used."""

    def __init__(self, what, offset=None):
        super().__init__(what if offset is None else f"byte {offset}: {what}")
        self.what = what
        self.offset = offset


class Corrupt(Problem):
    """A rule of the specification is broken."""


class Unsupported(Problem):
    """The image has features that this decoder lacks."""


class NotExd(Problem):
    """There is no superblock."""


def require(condition, rule, offset):
    """Raises Corrupt, naming the rule, unless the condition holds."""
    if not condition:
        raise Corrupt(f"breaks {rule}", offset)


def checksum(data, *holes):
    """CRC32 of the data, with the given (offset, length) ranges counted as zero (section 1.1)."""
    data = bytearray(data)
    for offset, length in ((4, 4), *holes):
        data[offset:offset + length] = bytes(length)
    return zlib.crc32(data)


def all_zero(data):
    """Whether every byte is zero."""
    return not any(data)


def text(data, rule, offset):
    """A text (section 1, 5)."""
    (length,) = struct.unpack_from("<H", data)
    require(length <= len(data) - 2, f"{rule}: a text is too long", offset)
    body = data[2:2 + length]
    require(0 not in body and all_zero(data[2 + length:]), f"{rule}: a text is not as it must be", offset)
    try:
        return body.decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise Corrupt(f"breaks {rule}: a text is not UTF-8", offset) from None


@dataclass(frozen=True)
class Header:
    """The common header (section 1.2)."""

    kind: bytes
    crc: int
    generation: int
    address: int
    uuid: bytes

    @staticmethod
    def parse(data):
        return Header(*struct.unpack_from("<4sIQQ16s", data))


def check_header(data, kind, address, uuid, *, crc=None):
    """Rules H1 to H4; gives the header. `crc` is the checksum of the data, if it is not the plain one."""
    header = Header.parse(data)
    require(header.kind == kind, "H1: the kind is another", address)
    require(header.crc == (checksum(data) if crc is None else crc), "H2: the checksum is wrong", address)
    require(header.address == address, "H3: the address is another", address)
    require(uuid is None or header.uuid == uuid, "H4: the uuid is another", address)
    return header


@dataclass(frozen=True)
class AreaPointer:
    """Where a run of metadata is (section 3)."""

    address: int
    length: int
    crc: int
    reserved: int

    @staticmethod
    def parse(data):
        return AreaPointer(*struct.unpack("<QQII", data))

    @property
    def present(self):
        return self.address != 0


@dataclass(frozen=True)
class NodePointer:
    """Where a node is (section 4.1)."""

    address: int
    generation: int
    crc: int
    level: int
    reserved: bytes

    @staticmethod
    def parse(data):
        return NodePointer(*struct.unpack("<QQIB3s", data))

    @property
    def present(self):
        return self.address != 0

    def check(self, superblock, where):
        """Rules N1 to N3."""
        require(self.reserved == bytes(3), "section 1 rule 4: reserved bytes of a node pointer", where)
        end = self.address + superblock.node_size
        require(self.address % 4096 == 0 and FIRST_BYTE <= self.address and end <= superblock.data_end,
                "N1: the node's address", where)
        require(1 <= self.generation <= superblock.generation, "N2: the node's generation", where)
        require(self.level <= 15, "N3: the node's level", where)


@dataclass
class Superblock:
    """A superblock that obeys every rule (section 3)."""

    address: int
    generation: int
    uuid: bytes
    version_minor: int
    block_bits: int
    record_bits: int
    node_bits: int
    state: int
    incompatible: int
    read_only_compatible: int
    compatible: int
    autoclear: int
    virtual_size: int
    epoch: int
    applied: int
    root: NodePointer
    extent_count: int
    node_count: int
    journal_tail: int
    tail_sequence: int
    tail_chain: int
    segments: list
    space_list: AreaPointer
    data_end: int
    birth: int
    preallocation: int
    snapshots: AreaPointer
    bitmaps: AreaPointer
    encryption: AreaPointer
    created: int
    backing_path: str
    backing_format: str
    data_file_path: str
    completion_log_path: str
    content: bytes = field(repr=False)

    @property
    def block_size(self):
        return 1 << self.block_bits

    @property
    def sectors_per_block(self):
        return self.block_size // SECTOR

    @property
    def node_size(self):
        return 1 << self.node_bits

    @property
    def record_alignment(self):
        return 1 << self.record_bits

    @property
    def ring_length(self):
        return sum(length for _, length in self.segments)

    @property
    def blocks(self):
        """Number of blocks of the virtual disk."""
        return -(-self.virtual_size // self.block_size)

    @property
    def in_use(self):
        return self.state == 1

    @property
    def areas(self):
        return (self.space_list, self.snapshots, self.bitmaps, self.encryption)

    def segment_at(self, position):
        """(byte in the file, bytes left in the segment) of a linear position of the ring."""
        for offset, length in self.segments:
            if position < length:
                return offset + position, length - position
            position -= length
        raise Corrupt("breaks S9: a position outside the ring", self.address)


def missing_features(data):
    """The features an image needs to be read and that this decoder lacks: none are implemented."""
    (bits,) = struct.unpack_from("<Q", data, 56)
    return [FEATURES.get(("incompatible", bit), f"incompatible feature bit {bit}")
            for bit in range(64) if bits >> bit & 1]


def parse_superblock(data, address):
    """The superblock in a slot. None: there is none. Raises Corrupt (damaged) or Unsupported."""
    if data[:4] != b"EXDS" and data[40:48] != MAGIC:
        return None
    header = check_header(data, b"EXDS", address, None)
    require(data[40:48] == MAGIC, "S1: the magic", address)
    major, minor, block_bits, record_bits, node_bits, state = struct.unpack_from("<HHBBBB", data, 48)
    require(major != 0, "S1: the version", address)
    lacking = [] if major == 1 else [f"format version {major}"]
    lacking += missing_features(data) if major == 1 else []
    if lacking:
        problem = Unsupported("the image needs " + ", ".join(lacking), address)
        problem.generation = header.generation
        raise problem
    superblock = _fields(data, address, header, minor, block_bits, record_bits, node_bits, state)
    _check_reserved(superblock, data)
    _check_superblock(superblock, data)
    return superblock


def _fields(data, address, header, minor, block_bits, record_bits, node_bits, state):
    (incompatible, read_only, compatible, autoclear, virtual_size, epoch, applied) = struct.unpack_from(
        "<7Q", data, 56)
    extent_count, node_count, tail, tail_sequence, tail_chain, segment_count = struct.unpack_from(
        "<QQQQII", data, 136)
    data_end, birth, preallocation = struct.unpack_from("<QII", data, 200)
    (created,) = struct.unpack_from("<Q", data, 288)
    require(1 <= segment_count <= 16, "S8: the number of segments", address)
    segments = [struct.unpack_from("<QQ", data, 512 + 16 * i) for i in range(segment_count)]
    return Superblock(
        address=address, generation=header.generation, uuid=header.uuid, version_minor=minor,
        block_bits=block_bits, record_bits=record_bits, node_bits=node_bits, state=state,
        incompatible=incompatible, read_only_compatible=read_only, compatible=compatible,
        autoclear=autoclear, virtual_size=virtual_size, epoch=epoch, applied=applied,
        root=NodePointer.parse(data[112:136]), extent_count=extent_count, node_count=node_count,
        journal_tail=tail, tail_sequence=tail_sequence, tail_chain=tail_chain, segments=segments,
        space_list=AreaPointer.parse(data[176:200]), data_end=data_end, birth=birth,
        preallocation=preallocation, snapshots=AreaPointer.parse(data[216:240]),
        bitmaps=AreaPointer.parse(data[240:264]), encryption=AreaPointer.parse(data[264:288]),
        created=created, backing_path=text(data[1024:2048], "S12", address),
        backing_format=text(data[2048:2080], "S12", address),
        data_file_path=text(data[2112:3136], "S12", address),
        completion_log_path=text(data[3136:3840], "S12", address), content=bytes(data))


def _check_reserved(superblock, data):
    """Rule S3."""
    if superblock.version_minor > 0 or superblock.read_only_compatible != 0:
        return
    for start, end in ((304, 512), (768, 1024), (2080, 2112), (3840, 4096)):
        require(all_zero(data[start:end]), "S3: reserved bytes", superblock.address)
    require(superblock.root.reserved == bytes(3), "S3: reserved bytes", superblock.address)
    require(all(area.reserved == 0 for area in superblock.areas), "S3: reserved bytes", superblock.address)


def _check_superblock(s, data):
    """Rules S4 to S13."""
    at = s.address
    require(9 <= s.block_bits <= 16 and 9 <= s.record_bits <= 16 and 12 <= s.node_bits <= 16, "S4: sizes", at)
    flags = struct.unpack_from("<Q", data, 296)[0]
    require(s.state <= 1 and s.preallocation <= 3 and flags == 0, "S4: state, preallocation, flags", at)
    require(s.virtual_size % SECTOR == 0 and s.virtual_size <= 1 << 56, "S5: virtual size", at)
    require(s.data_end % 4096 == 0 and FIRST_BYTE <= s.data_end <= PLACE_LIMIT, "S6: data_end", at)
    require(s.generation >= 1 and s.birth >= 1 and s.tail_sequence >= 1, "S7: a counter is 0", at)
    require(s.epoch >= 1 or s.state == 0, "S7: in use without an epoch", at)
    counters = (s.generation, s.epoch, s.applied, s.tail_sequence)
    require(max(counters) <= COUNTER_LIMIT, "S7: a counter is too high", at)
    for offset, length in s.segments:
        require(offset % 65536 == 0 and length % 65536 == 0 and length > 0, "S8: a segment", at)
        require(FIRST_BYTE <= offset and offset + length <= s.data_end, "S8: a segment's place", at)
    require(s.ring_length <= 1 << 28, "S8: the ring's length", at)
    require(all_zero(data[512 + 16 * len(s.segments):768]), "S8: unused segments", at)
    require(s.journal_tail < s.ring_length and s.journal_tail % s.record_alignment == 0, "S9: journal tail", at)
    if s.root.present:
        s.root.check(s, at)
        require(s.extent_count >= 1 and s.node_count > s.root.level, "S10: counts", at)
        require(s.root.level > 0 or s.node_count == 1, "S10: counts", at)
    else:
        require(all_zero(data[112:136]) and s.extent_count == 0 and s.node_count == 0, "S10: no root", at)
    _check_areas(s, data)
    _check_features(s)
    used = [(o, o + n) for o, n in s.segments] + [(a.address, a.address + a.length) for a in s.areas if a.present]
    used += [(s.root.address, s.root.address + s.node_size)] if s.root.present else []
    used.sort()
    require(all(a[1] <= b[0] for a, b in zip(used, used[1:])), "S13: overlaps", at)


def _check_areas(s, data):
    """Rule S11."""
    for area, at in zip(s.areas, (176, 216, 240, 264)):
        if not area.present:
            require(all_zero(data[at:at + 24]), "S11: an absent area", s.address)
            continue
        require(area.address % 4096 == 0 and area.length % 4096 == 0 and area.length > 0, "S11: an area", s.address)
        require(FIRST_BYTE <= area.address and area.address + area.length <= s.data_end, "S11: an area's place",
                s.address)
    require(s.space_list.length <= 1 << 26, "S11: the space list's length", s.address)


def _check_features(s):
    """Rule S12."""
    require(s.snapshots.present == bool(s.read_only_compatible & BIT_SNAPSHOTS), "S12: snapshots", s.address)
    require(s.bitmaps.present == bool(s.autoclear & BIT_BITMAPS), "S12: bitmaps", s.address)
    require(s.encryption.present == bool(s.incompatible & BIT_ENCRYPTION), "S12: encryption", s.address)
    backing = bool(s.incompatible & BIT_BACKING)
    require(bool(s.backing_path) == backing and bool(s.backing_format) == backing, "S12: backing file", s.address)
    require(bool(s.data_file_path) == bool(s.incompatible & BIT_DATA_FILE), "S12: data file", s.address)


def choose(slots):
    """Section 3.2 for the bytes of both slots: (superblock, remarks on the other slot)."""
    judged = []
    for number, data in enumerate(slots):
        address = number * SUPERBLOCK_LENGTH
        try:
            superblock = parse_superblock(data, address)
            judged.append(("none" if superblock is None else "valid", superblock))
        except Unsupported as problem:
            judged.append(("unsupported", problem))
        except Corrupt as problem:
            judged.append(("damaged", problem))
    return _choose(judged)


def _choose(judged):
    kinds = [kind for kind, _ in judged]
    valid = [value for kind, value in judged if kind == "valid"]
    unsupported = [value for kind, value in judged if kind == "unsupported"]
    damaged = [value for kind, value in judged if kind == "damaged"]
    if len(valid) == 2:
        return _choose_valid(*valid), []
    if valid:
        best = max((problem.generation for problem in unsupported), default=0)
        if unsupported and best >= valid[0].generation:
            raise unsupported[0]
        remarks = [str(problem) for problem in damaged + unsupported]
        if "none" in kinds:
            remarks.append("one slot holds no superblock")
        return valid[0], remarks
    if unsupported:
        raise max(unsupported, key=lambda problem: problem.generation)
    if damaged:
        raise damaged[0]
    raise NotExd("not an EXD image")


def _choose_valid(one, other):
    require(one.uuid == other.uuid, "section 3.2: the superblocks have different uuids", 0)
    if one.generation == other.generation:
        def content(s):
            return s.content[:4] + s.content[8:16] + s.content[24:]
        require(content(one) == content(other), "section 3.2: two superblocks of one generation differ", 0)
        return one
    return max(one, other, key=lambda s: s.generation)


@dataclass(frozen=True)
class Extent:
    """An extent (section 4.3), also one whose mapping comes from the journal."""

    logical: int
    physical: int
    state: int
    length: int
    birth: int

    @property
    def end(self):
        return self.logical + self.length

    def part(self, start, end, sectors_per_block):
        """The part for the blocks start .. end, at the place it has."""
        physical = self.physical + (start - self.logical) * sectors_per_block if self.physical else 0
        return Extent(start, physical, self.state, end - start, self.birth)


def parse_extent(data, superblock, where):
    """Rules E1 to E5."""
    logical, low, state, length, birth = struct.unpack("<Q6sxBII", data)
    physical = int.from_bytes(low, "little")
    require(data[14] == 0, "section 1 rule 4: reserved byte of an extent", where)
    require(length >= 1 and logical + length <= superblock.blocks, "E1: the extent's blocks", where)
    require(state in (UNWRITTEN, WRITTEN, ZERO), "E2: the extent's state", where)
    require(physical != 0 or state == ZERO, "E3: an extent without a place", where)
    end = (physical + length * superblock.sectors_per_block) * SECTOR
    require(physical == 0 or (physical * SECTOR >= FIRST_BYTE and end <= superblock.data_end),
            "E4: the extent's place", where)
    require(1 <= birth <= superblock.birth, "E5: the extent's birth", where)
    return Extent(logical, physical, state, length, birth)


@dataclass(frozen=True)
class Node:
    """A node of the tree (section 4.2). `entries`: extents in a leaf, else (key, pointer)."""

    address: int
    generation: int
    first: int
    end: int
    level: int
    entries: list


def parse_node(data, pointer, superblock, key=0, limit=1 << 63, root=True):
    """Rules N4 to N9 for the node that `pointer` leads to; `key` and `limit` are what N5 wants."""
    at = pointer.address
    header = check_header(data, b"EXDN", at, superblock.uuid)
    first, end, count, level = struct.unpack_from("<QQHB", data, 40)
    require(all_zero(data[59:64]), "section 1 rule 4: reserved bytes of a node", at)
    same = (header.crc, header.generation, level) == (pointer.crc, pointer.generation, pointer.level)
    require(same, "N4: the node is not the one its pointer means", at)
    require(first < end <= 1 << 63 and first == key and (root or end <= limit), "N5: what the node covers", at)
    size = 24 if level == 0 else 32
    require(count >= 1 and 64 + count * size <= len(data), "N6: number of entries", at)
    require(all_zero(data[64 + count * size:]), "N6: bytes behind the entries", at)
    raw = [data[64 + i * size:64 + (i + 1) * size] for i in range(count)]
    if level == 0:
        entries = [parse_extent(entry, superblock, at + 64 + i * size) for i, entry in enumerate(raw)]
        require(all(a.end <= b.logical for a, b in zip(entries, entries[1:])), "N9: order of the extents", at)
        require(first <= entries[0].logical and entries[-1].end <= end, "N9: extents outside the node", at)
    else:
        entries = [(int.from_bytes(entry[:8], "little"), NodePointer.parse(entry[8:])) for entry in raw]
        keys = [key for key, _ in entries]
        require(all(a < b for a, b in zip(keys, keys[1:])), "N7: order of the keys", at)
        require(keys[0] >= first and keys[-1] < end, "N7: keys outside the node", at)
        for i, (_, child) in enumerate(entries):
            child.check(superblock, at + 64 + i * size)
            require(child.level == level - 1 and child.generation <= header.generation, "N8: a child",
                    at + 64 + i * size)
    return Node(at, header.generation, first, end, level, entries)


def parse_space_list(data, pointer, superblock):
    """Rules F1 to F4: a list of (first sector, end sector, kind)."""
    at = pointer.address
    header = check_header(data, b"EXDF", at, superblock.uuid)
    count, length, reserved = struct.unpack_from("<QQQ", data, 40)
    require(length == pointer.length and header.crc == pointer.crc, "F1: the list is not the one meant", at)
    require(1 <= header.generation <= superblock.generation, "F1: the list's generation", at)
    require(reserved == 0, "section 1 rule 4: reserved bytes of the list", at)
    require(64 + count * 16 <= length, "F2: number of ranges", at)
    require(all_zero(data[64 + count * 16:]), "F2: bytes behind the ranges", at)
    ranges = []
    last = FIRST_BYTE // SECTOR
    for i in range(count):
        where = at + 64 + i * 16
        low, kind, unused, sectors = struct.unpack_from("<6sBBQ", data, 64 + i * 16)
        start = int.from_bytes(low, "little")
        require(unused == 0, "section 1 rule 4: reserved byte of a range", where)
        require(kind in (OPEN_RANGE, ZERO_RANGE, BITMAP_RANGE), "F3: kind of a range", where)
        require(sectors >= 1 and last <= start, "F4: a range", where)
        last = start + sectors
        require(last * SECTOR <= superblock.data_end, "F4: a range's end", where)
        if kind == BITMAP_RANGE and not superblock.autoclear & BIT_BITMAPS:
            kind = OPEN_RANGE
        ranges.append((start, last, kind))
    return ranges


@dataclass(frozen=True)
class Entry:
    """A journal entry (section 6.2)."""

    logical: int
    physical: int
    kind: int
    flags: int
    length: int
    birth: int

    @staticmethod
    def parse(data):
        logical, low, kind, flags, length, birth = struct.unpack("<Q6sBBII", data)
        return Entry(logical, int.from_bytes(low, "little"), kind, flags, length, birth)

    @property
    def more(self):
        return bool(self.flags & MORE)

    @property
    def keep(self):
        return bool(self.flags & KEEP)

    def sectors(self, superblock):
        """Length of the place."""
        return self.logical if self.kind in (WINDOW, RELEASE) else self.length * superblock.sectors_per_block

    def check(self, superblock, where):
        """Rules J1 to J4."""
        require(1 <= self.kind <= 7, "J1: kind of an entry", where)
        allowed = MORE | KEEP if self.kind in (ZEROED, RESERVE) else MORE
        require(self.flags & ~allowed == 0, "J1: flags of an entry", where)
        if self.kind in (WINDOW, RELEASE):
            require(self.length == 0 and self.logical >= 1, "J2: length of an entry", where)
        else:
            end = self.logical + self.length
            require(self.length >= 1 and end <= superblock.blocks, "J2: blocks of an entry", where)
        without_place = self.kind == UNMAP or (self.kind == ZEROED and not self.keep)
        require(self.physical != 0 or without_place, "J3: an entry without a place", where)
        if self.physical:
            end = (self.physical + self.sectors(superblock)) * SECTOR
            require(self.physical * SECTOR >= FIRST_BYTE and end <= PLACE_LIMIT, "J3: place of an entry", where)
        if self.kind in (UNMAP, WINDOW, RELEASE):
            require(self.birth == 0, "J4: birth of an entry", where)
        else:
            require(1 <= self.birth <= superblock.birth, "J4: birth of an entry", where)


@dataclass(frozen=True)
class Record:
    """A journal record (section 6.1) whose checksum, uuid and address are right; it may be unsound."""

    address: int
    crc: int
    epoch: int
    sequence: int
    durable: int
    through: int
    length: int
    chain: int
    count: int
    data: bytes = field(repr=False)

    def entries(self, superblock, last_through):
        """Rules R6 to R9; gives the entries with their cseq."""
        at = self.address
        require(self.epoch >= 1 and self.sequence >= 1 and self.durable < self.sequence, "R6: a counter", at)
        require(self.count <= self.through, "R6: number of entries", at)
        end = 80 + 24 * self.count
        require(end <= self.length and all_zero(self.data[end:]) and all_zero(self.data[76:80]), "R7: layout", at)
        entries = [Entry.parse(self.data[80 + 24 * i:104 + 24 * i]) for i in range(self.count)]
        for i, entry in enumerate(entries):
            entry.check(superblock, at + 80 + 24 * i)
        require(not entries or not entries[-1].more, "R8: the last entry says MORE", at)
        before = self.through - self.count
        require(last_through <= before <= max(last_through, superblock.applied), "R9: completion sequences", at)
        return [(before + 1 + i, entry) for i, entry in enumerate(entries)]


def parse_record(data, address, left, superblock):
    """Rules R1 to R5 at a place with `left` bytes in its segment; None: there is no record."""
    if data[:4] != b"EXDJ" or len(data) < 80:
        return None
    header = Header.parse(data)
    sequence, durable, through, length, chain, count = struct.unpack_from("<QQQIII", data, 40)
    if length % superblock.record_alignment or not 80 <= length <= min(65536, left, len(data)):
        return None
    data = bytes(data[:length])
    if checksum(data) != header.crc or header.uuid != superblock.uuid or header.address != address:
        return None
    return Record(address, header.crc, header.generation, sequence, durable, through, length, chain, count, data)


@dataclass(frozen=True)
class CompletionLog:
    """The header of a completion log (section 7)."""

    epoch: int
    boot_id: bytes
    storage: tuple
    slot_count: int
    sync_failed: bool

    @staticmethod
    def parse(data, superblock):
        """The header; raises Corrupt if it breaks a rule, which means that the log is ignored."""
        require(len(data) == 4096, "section 7: the log is too short", 0)
        header = check_header(data, b"EXDL", 0, superblock.uuid, crc=checksum(data, (80, 4)))
        device, inode, slot_count, slot_size, flags = struct.unpack_from("<QQIII", data, 56)
        require(slot_size == 40 and 1 <= slot_count <= 1 << 24 and flags <= 1, "section 7: slots or flags", 0)
        require(all_zero(data[84:]), "section 1 rule 4: reserved bytes of the log", 0)
        return CompletionLog(header.generation, data[40:56], (device, inode), slot_count, bool(flags & 1))


def parse_slot(data, superblock):
    """A slot of the completion log: (cseq, entry), or None if checksum or epoch are not ours."""
    if len(data) < 40:
        return None
    cseq, epoch, crc = struct.unpack_from("<QII", data, 24)
    if crc != zlib.crc32(superblock.uuid + data[:36]) or epoch != superblock.epoch & 0xFFFFFFFF:
        return None
    return cseq, Entry.parse(data[:24])
