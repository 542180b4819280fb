"""An opened EXD image: choice of superblock, replay of journal and completion log, the tree, reading."""

import hashlib
import os
import struct
from dataclasses import dataclass

import structures as st
from ranges import ExtentMap, RangeSet
from structures import Corrupt, Extent, Problem, require

CHUNK = 4096
"""Unit of the content hash."""


class File:
    """A file in which everything past the end reads as zero (section 2)."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)
        self.length = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset, length):
        """`length` bytes at `offset`."""
        pieces = []
        while length > 0 and offset < self.length:
            piece = os.pread(self.fd, min(length, 1 << 20), offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces) + bytes(length)

    def data_ranges(self, start, end):
        """The parts of start .. end that the host file system says hold data."""
        end = min(end, self.length)
        while start < end:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError:
                return
            if start >= end:
                return
            stop = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            yield start, stop
            start = stop

    def first_nonzero(self, start, end):
        """Offset of the first byte of start .. end that is not zero, or None."""
        for low, high in self.data_ranges(start, end):
            for offset in range(low, high, 1 << 20):
                piece = self.read(offset, min(1 << 20, high - offset))
                if any(piece):
                    return offset + next(i for i, byte in enumerate(piece) if byte)
        return None


@dataclass(frozen=True)
class Host:
    """What a completion log must agree with, besides the superblock."""

    boot_id: bytes
    storage: tuple

    @staticmethod
    def running(image_path):
        """The running host, for the image at a path."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot_id = bytes.fromhex(file.read().strip().replace("-", ""))
        status = os.stat(image_path)
        return Host(boot_id, (status.st_dev, status.st_ino))


class Replay:
    """What journal and completion log say beyond the tree and the list of the superblock."""

    def __init__(self, superblock, ranges):
        self.superblock = superblock
        self.overlay = ExtentMap(superblock.sectors_per_block)
        self.open = RangeSet((s, e) for s, e, kind in ranges if kind == st.OPEN_RANGE)
        self.zero = RangeSet((s, e) for s, e, kind in ranges if kind == st.ZERO_RANGE)
        self.data_end = superblock.data_end
        self.records = 0
        self.log_entries = 0
        self.through = 0

    def apply(self, entry):
        """The effect of an entry (section 6.2)."""
        start = entry.physical
        end = start + entry.sectors(self.superblock)
        if entry.kind == st.WINDOW:
            self.open.add(start, end)
            self.zero.remove(start, end)
            self.data_end = max(self.data_end, -(-end * st.SECTOR // 4096) * 4096)
        elif entry.kind == st.RELEASE:
            self.open.remove(start, end)
            self.zero.add(start, end)
        else:
            self._map(entry, start, end)

    def _map(self, entry, start, end):
        state = {st.MAP: st.WRITTEN, st.CONVERT: st.WRITTEN, st.RESERVE: st.UNWRITTEN,
                 st.ZEROED: st.ZERO, st.UNMAP: st.HOLE}[entry.kind]
        frees = entry.kind == st.UNMAP or (entry.kind == st.ZEROED and not entry.keep)
        if frees and start:
            self.open.add(start, end)
        if entry.kind == st.MAP or (entry.kind == st.RESERVE and not entry.keep):
            self.open.remove(start, end)
        place = 0 if frees else start
        self.overlay.set(Extent(entry.logical, place, state, entry.length, entry.birth))


def replay_journal(file, superblock, replay):
    """Section 6.3."""
    position, due, chain = superblock.journal_tail, superblock.tail_sequence, superblock.tail_chain
    while True:
        offset, left = superblock.segment_at(position)
        record = st.parse_record(file.read(offset, min(left, 65536)), offset, left, superblock)
        if record is None or record.epoch < superblock.epoch:
            break
        require(record.epoch == superblock.epoch, "section 6.3: a record of a later epoch", offset)
        if record.sequence < due:
            break
        require(record.sequence == due, "section 6.3: a later record than the one due", offset)
        require(record.chain == chain, "section 6.3: a record with another predecessor", offset)
        for cseq, entry in record.entries(superblock, replay.through):
            if cseq > superblock.applied:
                replay.apply(entry)
        replay.through = record.through
        replay.records += 1
        chain, due = record.crc, due + 1
        position = (position + record.length) % superblock.ring_length
    scan_ring(file, superblock, due)


def scan_ring(file, superblock, due):
    """What follows the end of the log: is a record gone that was durable?"""
    step = superblock.record_alignment
    for start, length in superblock.segments:
        data = file.read(start, length)
        at = data.find(b"EXDJ")
        while at >= 0:
            if at % step == 0:
                record = st.parse_record(data[at:at + 65536], start + at, length - at, superblock)
                if record is not None:
                    judge_leftover(record, superblock, due)
            at = data.find(b"EXDJ", at + 1)


def judge_leftover(record, superblock, due):
    """The second table of section 6.3."""
    require(record.epoch <= superblock.epoch, "section 6.3: a record of a later epoch", record.address)
    lost = record.epoch == superblock.epoch and record.durable >= due
    require(not lost, f"section 6.3: record {due} was durable and is gone", record.address)


def replay_log(path, superblock, replay, host):
    """Section 7. Gives the reason if the log is not honoured."""
    log = File(path)
    try:
        header = st.CompletionLog.parse(log.read(0, min(log.length, 4096)), superblock)
    except Corrupt as problem:
        return str(problem)
    if header.epoch != superblock.epoch:
        return "the log is of another epoch"
    if host is not None and (header.boot_id, header.storage) != (host.boot_id, host.storage):
        return "the log is of another boot or another file"
    if header.sync_failed:
        return "a sync of the image failed"
    due = 1 + max(superblock.applied, replay.through)
    group = []
    while True:
        offset = 4096 + 40 * (due % header.slot_count)
        slot = st.parse_slot(log.read(offset, 40), superblock)
        if slot is None or slot[0] < due:
            break
        require(slot[0] == due, "section 7: a later completion than the one due", offset)
        slot[1].check(superblock, offset)
        group.append(slot[1])
        if not slot[1].more:
            for entry in group:
                replay.apply(entry)
            replay.log_entries += len(group)
            group = []
        due += 1
    return None


class Tree:
    """Walks the tree; problems go to a function, which may raise them."""

    def __init__(self, file, superblock, problem):
        self.file = file
        self.superblock = superblock
        self.problem = problem
        self.nodes = []
        self.extents = []
        self._seen = set()
        if superblock.root.present:
            self._walk(superblock.root, 0, 1 << 63, True)
        counts = (len(self.extents), len(self.nodes))
        if counts != (superblock.extent_count, superblock.node_count):
            problem(Corrupt(f"breaks N10: extents and nodes are {counts}", superblock.address))

    def _walk(self, pointer, key, limit, root):
        if pointer.address in self._seen:
            self.problem(Corrupt("breaks N10: a node is reached twice", pointer.address))
            return
        self._seen.add(pointer.address)
        data = self.file.read(pointer.address, self.superblock.node_size)
        try:
            node = st.parse_node(data, pointer, self.superblock, key, limit, root)
        except Corrupt as problem:
            self.problem(problem)
            return
        self.nodes.append(node.address)
        if node.level == 0:
            self.extents += node.entries
            return
        ends = [child_key for child_key, _ in node.entries[1:]] + [node.end]
        for (child_key, child), end in zip(node.entries, ends):
            self._walk(child, child_key, end, False)


def stop(problem):
    """For Tree: the first problem ends the walk."""
    raise problem


class Image:
    """An image as a reader sees it."""

    def __init__(self, path, log=None, any_host=False):
        self.path = path
        self.file = File(path)
        head = self.file.read(0, 8192)
        self.superblock, self.remarks = st.choose([head[:4096], head[4096:]])
        self.log = log
        self.host = None if any_host else Host.running(path)

    def space_list(self):
        """The ranges of the space list."""
        area = self.superblock.space_list
        if not area.present:
            return []
        return st.parse_space_list(self.file.read(area.address, area.length), area, self.superblock)

    def replay(self, ranges=()):
        """Journal and completion log, if the image was not closed."""
        replay = Replay(self.superblock, ranges)
        if self.superblock.in_use:
            replay_journal(self.file, self.superblock, replay)
            if self.log is not None:
                reason = replay_log(self.log, self.superblock, replay, self.host)
                if reason is not None:
                    self.remarks.append(f"completion log ignored: {reason}")
        return replay

    def extents(self):
        """All extents after replay, holes left out."""
        replay = self.replay()
        tree = Tree(self.file, self.superblock, stop)
        extents = replay.overlay.over(tree.extents)
        for extent in extents:
            end = (extent.physical + extent.length * self.superblock.sectors_per_block) * st.SECTOR
            require(end <= replay.data_end or not extent.physical, "C4: an extent behind data_end", extent.physical)
        return [extent for extent in extents if extent.state != st.HOLE]

    def map(self):
        """What `imgtool map --output json` shows."""
        size, block = self.superblock.virtual_size, self.superblock.block_size
        pieces = []
        position = 0
        for extent in self.extents():
            start, end = extent.logical * block, min(extent.end * block, size)
            if position < start:
                add_piece(pieces, position, start, st.HOLE, 0)
            add_piece(pieces, start, end, extent.state, extent.physical * st.SECTOR)
            position = end
        if position < size:
            add_piece(pieces, position, size, st.HOLE, 0)
        return pieces

    def data(self):
        """The guest's bytes that are not zeroes for lack of data, as (offset, bytes) in order."""
        size, block = self.superblock.virtual_size, self.superblock.block_size
        for extent in self.extents():
            if extent.state != st.WRITTEN:
                continue
            start, length = extent.logical * block, extent.length * block
            length = min(length, size - start)
            for done in range(0, length, 1 << 20):
                count = min(1 << 20, length - done)
                yield start + done, self.file.read(extent.physical * st.SECTOR + done, count)

    def content_hash(self):
        """See `content_hash`."""
        return content_hash(self.superblock.virtual_size, self.data())


def add_piece(pieces, start, end, state, offset):
    """Adds a piece of the map, to the last one if it goes on from there."""
    piece = {"start": start, "length": end - start, "depth": 0, "present": state != st.HOLE,
             "zero": state != st.WRITTEN, "data": state == st.WRITTEN, "compressed": False}
    if offset:
        piece["offset"] = offset
    last = pieces[-1] if pieces else None
    if last is not None:
        flags = ("present", "zero", "data")
        same = all(last[key] == piece[key] for key in flags) and ("offset" in last) == ("offset" in piece)
        if same and last.get("offset", 0) + (last["length"] if "offset" in last else 0) == piece.get("offset", 0):
            last["length"] += piece["length"]
            return
    pieces.append(piece)


def content_hash(size, pieces):
    """SHA-256 over the size (u64) and each aligned 4096 bytes that are not all zero, each behind its offset (u64).

    `pieces` are (offset, bytes) in order. Cheap for a large disk that holds little, and the same however it is
    stored.
    """
    digest = hashlib.sha256(struct.pack("<Q", size))
    chunk, start = bytearray(CHUNK), 0

    def finish():
        if any(chunk):
            digest.update(struct.pack("<Q", start) + chunk)

    for offset, data in pieces:
        done = 0
        while done < len(data):
            at = offset + done
            base = at // CHUNK * CHUNK
            if base != start:
                finish()
                chunk, start = bytearray(CHUNK), base
            count = min(len(data) - done, base + CHUNK - at)
            chunk[at - base:at - base + count] = data[done:done + count]
            done += count
    finish()
    return digest.hexdigest()


def raw_content_hash(path):
    """The content hash of a raw image."""
    file = File(path)

    def pieces():
        for low, high in file.data_ranges(0, file.length):
            for offset in range(low, high, 1 << 20):
                yield offset, file.read(offset, min(1 << 20, high - offset))

    return content_hash(file.length, pieces())


__all__ = ["Image", "Problem", "content_hash", "raw_content_hash"]
