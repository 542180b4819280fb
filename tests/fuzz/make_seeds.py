#!/usr/bin/env python3
"""Makes fixtures/fuzz-seeds from the golden images: the bases without guest data, and inputs to begin with.

A base: length, number of pieces, (offset, length) of each (u64 each), then their bytes.
"""

import struct
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "decoder"))

import fixtures  # noqa: E402
import structures as st  # noqa: E402
from image import Image  # noqa: E402

SEEDS = ROOT / "fixtures" / "fuzz-seeds"
PIECE = 32


def without_data(name):
    """A golden image whose guest data is zero."""
    data = bytearray(fixtures.packed(name))
    with tempfile.TemporaryDirectory() as directory:
        image = Image(fixtures.unpack(name, directory))
        for extent in image.extents():
            if extent.state == st.WRITTEN:
                start = extent.physical * 512
                length = extent.length * image.superblock.block_size
                data[start:start + length] = bytes(length)
        zeroed = bytes(data)
    return zeroed


def sparse(data):
    """The pieces that are not zero."""
    pieces = []
    for offset in range(0, len(data), PIECE):
        piece = data[offset:offset + PIECE]
        if any(piece):
            if pieces and pieces[-1][0] + len(pieces[-1][1]) == offset:
                pieces[-1][1].extend(piece)
            else:
                pieces.append((offset, bytearray(piece)))
    head = struct.pack("<QQ", len(data), len(pieces))
    return head + b"".join(struct.pack("<QQ", o, len(p)) for o, p in pieces) + b"".join(p for _, p in pieces)


def inputs(target):
    """Inputs to begin with: one change each, of every field that matters."""
    if target == "decode":
        return [bytes([kind, flags]) + body for kind in range(8) for flags in (0, 2, 0x42)
                for body in (b"", bytes(range(64)))]
    changes = [(choice, offset, shape) for choice in (0, 1, 2, 3, 17) for offset in range(8, 208, 8)
               for shape in (0x07, 0x80)]
    return [bytes([i % 5, 0xFF - i % 7]) + struct.pack("<BHB", choice, offset, shape) + b"\x01" + bytes(7)
            for i, (choice, offset, shape) in enumerate(changes)][::4]


def main():
    """Writes what is not there yet."""
    for name in ("extents", "blocks-512", "live-journal", "journal-grown", "live-log"):
        path = SEEDS / "base" / f"{name}.sparse"
        if not path.exists():
            path.write_bytes(sparse(without_data(name)))
    path = SEEDS / "base" / "live-log.exdlog.sparse"
    if not path.exists():
        path.write_bytes(sparse(fixtures.packed("live-log", ".exdlog")))
    for target in ("decode", "image", "journal", "log"):
        directory = SEEDS / target
        directory.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(inputs(target)):
            (directory / f"{i:03}").write_bytes(data)


if __name__ == "__main__":
    main()
