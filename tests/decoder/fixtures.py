"""The golden images: where they are, unpacking them."""

import hashlib
import json
import lzma
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "fixtures" / "v1"
MAP_LISTED = 200
"""Longer maps are in a manifest as their hash."""


def names():
    """The names of all golden images."""
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def manifest(name):
    """What is known of a golden image."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def packed(name, suffix=".exd"):
    """The bytes of an image or of its completion log."""
    return lzma.decompress((GOLDEN / f"{name}{suffix}.xz").read_bytes())


def write_sparse(path, data):
    """Writes a file with holes where 4096 bytes are zero."""
    with open(path, "wb") as file:
        for offset in range(0, len(data), 4096):
            piece = data[offset:offset + 4096]
            if any(piece):
                os.pwrite(file.fileno(), piece, offset)
        os.ftruncate(file.fileno(), len(data))


def unpack(name, directory):
    """Unpacks an image; gives its path."""
    path = Path(directory) / f"{name}.exd"
    write_sparse(path, packed(name))
    return path


def sha256(data):
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def map_hash(pieces):
    """A hash of a map."""
    return sha256(json.dumps(pieces, sort_keys=True).encode())


def imgtool():
    """The program under test: IMGTOOL, or what `cargo build --release` leaves."""
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    return os.environ.get("IMGTOOL", str(Path(target) / "release" / "imgtool"))
