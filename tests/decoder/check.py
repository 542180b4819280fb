"""What a checker reports (section 9): corruptions and leaks."""

import os
from dataclasses import dataclass, field

import structures as st
from image import Image, Tree
from ranges import RangeSet
from structures import Corrupt, Problem

LISTED = 100
"""Findings that are kept; the others are counted."""


@dataclass
class Report:
    """The result of a check."""

    corruptions: int = 0
    findings: list = field(default_factory=list)
    leaked_bytes: int = 0
    leaks: list = field(default_factory=list)
    remarks: list = field(default_factory=list)
    extents: int = 0
    nodes: int = 0
    total_blocks: int = 0
    allocated_blocks: int = 0
    data_end: int = 0
    replayed_records: int = 0
    replayed_completions: int = 0

    def corrupt(self, problem):
        """Notes a corruption."""
        self.corruptions += 1
        if len(self.findings) < LISTED:
            self.findings.append(str(problem))

    @property
    def exit_code(self):
        """As `imgtool check` ends: 2 for corruptions, 3 for leaks alone."""
        return 2 if self.corruptions else 3 if self.leaked_bytes else 0


def _damaged_slot(image, report):
    """Section 9: the one slot that no interrupted commit leaves damaged."""
    if image.superblock.in_use:
        return
    slot = image.superblock.generation % 2
    try:
        if st.parse_superblock(image.file.read(slot * 4096, 4096), slot * 4096) is None:
            report.corrupt(Corrupt("section 9: no superblock in the slot written first", slot * 4096))
    except st.Unsupported:
        pass
    except Corrupt as problem:
        report.corrupt(problem)


def check(path, log=None, any_host=False):
    """Checks an image. Raises Unsupported and NotExd; anything else ends up in the report."""
    report = Report()
    try:
        image = Image(path, log, any_host)
    except Corrupt as problem:
        report.corrupt(problem)
        return report
    superblock = image.superblock
    if superblock.read_only_compatible:
        raise st.Unsupported("read_only_compatible features are not checked", superblock.address)
    _damaged_slot(image, report)
    ranges = []
    try:
        ranges = image.space_list()
    except Corrupt as problem:
        report.corrupt(problem)
    tree = Tree(image.file, superblock, report.corrupt)
    try:
        replay = image.replay(ranges)
    except Corrupt as problem:
        report.corrupt(problem)
        return report
    report.remarks = image.remarks
    extents = [e for e in replay.overlay.over(tree.extents) if e.state != st.HOLE]
    owners = list_owners(superblock, replay, tree, extents, ranges)
    check_owners(owners, replay, report)
    check_zeroes(image, replay, report)
    # An owner that is in doubt would turn into leaks that are none.
    if not report.corruptions:
        find_leaks(image, owners, report)
    report.extents, report.nodes = len(extents), len(tree.nodes)
    report.total_blocks = superblock.blocks
    report.allocated_blocks = sum(extent.length for extent in extents if extent.physical)
    report.data_end = replay.data_end
    report.replayed_records, report.replayed_completions = replay.records, replay.log_entries
    return report


def list_owners(superblock, replay, tree, extents, ranges):
    """(first sector, end sector, name) of every owner, and of the zero ranges."""
    owners = []

    def add_bytes(start, length, name):
        owners.append((start // st.SECTOR, (start + length) // st.SECTOR, name))

    for offset, length in superblock.segments:
        add_bytes(offset, length, "journal segment")
    for address in tree.nodes:
        add_bytes(address, superblock.node_size, "node")
    for area in (superblock.space_list, superblock.snapshots, superblock.encryption):
        if area.present:
            add_bytes(area.address, area.length, "area")
    for extent in extents:
        if extent.physical:
            length = extent.length * superblock.sectors_per_block
            owners.append((extent.physical, extent.physical + length, "extent"))
    owners += [(start, end, "open range") for start, end in replay.open]
    owners += [(start, end, "bitmaps") for start, end, kind in ranges if kind == st.BITMAP_RANGE]
    owners += [(start, end, "zero range") for start, end in replay.zero]
    owners.sort()
    return owners


def check_owners(owners, replay, report):
    """Rules C2 and C4."""
    last_end, last_name = 0, ""
    for start, end, name in owners:
        if start < last_end:
            where = start * st.SECTOR
            report.corrupt(Corrupt(f"breaks C2: owned by {last_name} and by {name}", where))
        if start * st.SECTOR < st.FIRST_BYTE or end * st.SECTOR > replay.data_end:
            report.corrupt(Corrupt(f"breaks C4: {name} outside of the image", start * st.SECTOR))
        if end > last_end:
            last_end, last_name = end, name


def check_zeroes(image, replay, report):
    """Rules C3 and C5, and the reserved bytes at the start of the file."""
    for start, end in replay.zero:
        offset = image.file.first_nonzero(start * st.SECTOR, end * st.SECTOR)
        if offset is not None:
            report.corrupt(Corrupt("breaks C3: a zero range holds data", offset))
    offset = image.file.first_nonzero(replay.data_end, image.file.length)
    if offset is not None:
        report.corrupt(Corrupt("breaks C5: data past data_end", offset))
    offset = image.file.first_nonzero(st.HOLDER_ADDRESS + 4096, st.FIRST_BYTE)
    if offset is not None:
        report.corrupt(Corrupt("section 2: reserved bytes are not zero", offset))


def find_leaks(image, owners, report):
    """Bytes of the file that hold data and that nothing owns.

    The host gives space in blocks: what shares one with an owner is not the image's to give back.
    """
    unit = max(os.fstat(image.file.fd).st_blksize, st.SECTOR)
    owned = RangeSet((s * st.SECTOR // unit * unit, -(-e * st.SECTOR // unit) * unit)
                     for s, e, name in owners if name != "zero range")
    for low, high in image.file.data_ranges(st.FIRST_BYTE, image.file.length):
        for start, end in owned.missing(low, high):
            report.leaked_bytes += end - start
            if len(report.leaks) < LISTED:
                report.leaks.append((start, end))


__all__ = ["check", "Problem", "Report"]
