"""Changing an image and putting its checksums right again.

Only for tests: this is how images come about that are wrong in one way and right in every other.
"""

import struct
import zlib

import structures as st


def put(data, offset, layout, *values):
    """Stores values, whatever they do to the checksums."""
    struct.pack_into("<" + layout, data, offset, *values)


def get(data, offset, layout):
    """One value."""
    return struct.unpack_from("<" + layout, data, offset)[0]


def seal(data, offset, length, *holes):
    """Puts the checksum of a structure right; gives it."""
    crc = st.checksum(data[offset:offset + length], *holes)
    put(data, offset + 4, "I", crc)
    return crc


class Editor:
    """An image in memory whose structures can be changed one by one.

    `both` superblock slots are kept the same unless a test changes one of them only. After all changes,
    `finish` gives the bytes with the pointers and checksums of what was not meant to be wrong put right.
    """

    def __init__(self, data):
        self.data = bytearray(data)
        self.slot = max((0, 4096), key=self._generation_of)
        self.superblock = st.parse_superblock(bytes(self.data[self.slot:self.slot + 4096]), self.slot)
        self.frozen = set()
        """Addresses of structures whose checksum stays as it is."""

    def _generation_of(self, slot):
        try:
            return st.parse_superblock(bytes(self.data[slot:slot + 4096]), slot).generation
        except (st.Problem, AttributeError):
            return -1

    def grow(self, length):
        """Makes the file at least so long."""
        self.data.extend(bytes(max(0, length - len(self.data))))

    def set(self, offset, layout, *values):
        """Stores values in the superblock in use."""
        put(self.data, self.slot + offset, layout, *values)

    def field(self, offset, layout):
        """A value of the superblock in use."""
        return get(self.data, self.slot + offset, layout)

    @property
    def root(self):
        """Address of the root node."""
        return self.field(112, "Q")

    @property
    def list(self):
        """Address of the space list."""
        return self.field(176, "Q")

    def node_entries(self, address):
        """Byte offsets of the entries of a node."""
        size = 24 if self.data[address + 58] == 0 else 32
        return [address + 64 + size * i for i in range(get(self.data, address + 56, "H"))]

    def first_leaf(self, address=None):
        """Address of the leftmost leaf."""
        address = self.root if address is None else address
        while self.data[address + 58]:
            address = get(self.data, self.node_entries(address)[0] + 8, "Q")
        return address

    def records(self):
        """(address, length) of all that looks like a record of the ring, by sequence."""
        found = []
        for offset, length in self.superblock.segments:
            for at in range(offset, offset + length, self.superblock.record_alignment):
                if self.data[at:at + 4] == b"EXDJ":
                    found.append((get(self.data, at + 40, "Q"), at, get(self.data, at + 64, "I")))
        return [(at, length) for _, at, length in sorted(found)]

    def live(self):
        """The records that replay applies, in order."""
        position, due = self.superblock.journal_tail, self.superblock.tail_sequence
        result = []
        while True:
            at, left = self.superblock.segment_at(position)
            record = st.parse_record(bytes(self.data[at:at + min(left, 65536)]), at, left, self.superblock)
            if record is None or record.sequence != due or record.epoch != self.superblock.epoch:
                return result
            result.append((at, record.length))
            position = (position + record.length) % self.superblock.ring_length
            due += 1

    def seal_records(self, records):
        """Seals records and chains them anew."""
        chain = self.field(168, "I")
        for at, length in records:
            put(self.data, at + 68, "I", chain)
            chain = seal(self.data, at, length)

    def seal_tree(self, address, seen=()):
        """Seals the nodes below a pointer, bottom up; gives the checksum."""
        size = self.superblock.node_size
        if address in seen or address + size > len(self.data) or self.data[address:address + 4] != b"EXDN":
            return None
        if self.data[address + 58]:
            for entry in self.node_entries(address):
                if entry + 32 > address + size:
                    break
                crc = self.seal_tree(get(self.data, entry + 8, "Q"), (*seen, address))
                if crc is not None:
                    put(self.data, entry + 8 + 16, "I", crc)
        if address in self.frozen:
            return None
        return seal(self.data, address, size)

    def finish(self, copy=True):
        """Seals list, tree and superblock; gives the image."""
        crc = self.seal_tree(self.root) if self.root else None
        if crc is not None:
            self.set(112 + 16, "I", crc)
        if self.list and self.list not in self.frozen:
            length = self.field(184, "Q")
            if self.list + length <= len(self.data):
                self.set(176 + 16, "I", seal(self.data, self.list, length))
        self.seal_slot(self.slot)
        if copy:
            other = 4096 - self.slot
            self.data[other:other + 4096] = self.data[self.slot:self.slot + 4096]
            put(self.data, other + 16, "Q", other)
            self.seal_slot(other)
        return bytes(self.data)

    def seal_slot(self, slot):
        """Seals a superblock."""
        seal(self.data, slot, 4096)


def move_log(log, uuid, host):
    """The completion log as if it had been written on this host, for the file of `host`."""
    log = bytearray(log)
    log[40:56] = host.boot_id
    put(log, 56, "QQ", *host.storage)
    header = bytearray(log[:4096])
    seal(header, 0, 4096, (80, 4))
    log[:4096] = header
    assert bytes(log[24:40]) == uuid
    return bytes(log)


def slot_checksum(uuid, slot):
    """The checksum of a completion log's slot."""
    return zlib.crc32(uuid + slot[:36])
