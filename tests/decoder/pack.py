#!/usr/bin/env python3
"""Packs what make_fixtures made into golden images: pack.py DIRECTORY VERSION. See fixtures/README.md.

Never replaces a golden image. Refuses an image that this decoder and imgtool judge differently, or whose
content is not what the generator says.
"""

import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import fixtures
from check import check
from image import Image, raw_content_hash
from seal import Editor

PURPOSE = {
    "fresh": "as created",
    "fresh-15t": "as created, 15 TiB",
    "extents": "extents of each state, closed",
    "preallocated-metadata": "preallocated (metadata), some blocks written",
    "preallocated-falloc": "preallocated (falloc), some blocks written",
    "preallocated-full": "preallocated (full), some blocks written",
    "blocks-512": "512-byte blocks",
    "blocks-64k": "64-KiB blocks, a virtual size that is not a multiple of them",
    "resized": "shrunk and grown",
    "emptied": "written, then discarded whole",
    "tree": "24000 extents, a tree of three levels",
    "live-journal": "not closed: a journal to replay behind a checkpoint",
    "live-log": "not closed: completions that only the completion log has",
    "torn-record": "not closed: the last record is torn, no sync had covered it",
    "slot-0-damaged": "not closed: superblock slot 0 is damaged",
    "slot-1-damaged": "not closed: superblock slot 1 is damaged",
    "journal-wrapped": "not closed: the journal has gone round its ring",
    "journal-grown": "not closed: a journal of several segments",
}


def torn_record(data):
    """The second half of the last record never arrived."""
    editor = Editor(data)
    at, _ = editor.live()[-1]
    editor.data[at + 100:at + 512] = bytes(412)
    return bytes(editor.data)


def damaged_slot(slot):
    """512 bytes of a slot hold something else."""
    def damage(data):
        return data[:slot + 512] + b"\xa5" * 512 + data[slot + 1024:]
    return damage


DAMAGE = {"torn-record": torn_record, "slot-0-damaged": damaged_slot(0), "slot-1-damaged": damaged_slot(4096)}


def described_map(pieces):
    """The map for the manifest."""
    if len(pieces) > fixtures.MAP_LISTED:
        return {"pieces": len(pieces), "sha256": fixtures.map_hash(pieces)}
    return pieces


def confirm(path, report, image):
    """imgtool must see the same."""
    run = subprocess.run([fixtures.imgtool(), "check", "-q", path], check=False)
    assert run.returncode == report.exit_code, f"{path}: check ends with {run.returncode}, {report.exit_code}"
    output = subprocess.check_output([fixtures.imgtool(), "map", "--output", "json", path])
    assert json.loads(output) == image.map(), f"{path}: map"


def pack(source, name, producer):
    """Packs one image."""
    target = fixtures.GOLDEN / f"{name}.exd.xz"
    if target.exists():
        print(f"{name}: exists, left alone")
        return
    data = DAMAGE.get(name, bytes)((source / f"{name}.exd").read_bytes())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.exd"
        fixtures.write_sparse(path, data)
        image, report = Image(path), check(path)
        confirm(path, report, image)
        manifest = {
            "purpose": PURPOSE[name], "producer": producer, "sha256": fixtures.sha256(data),
            "virtual_size": image.superblock.virtual_size, "block_size": image.superblock.block_size,
            "content": image.content_hash(), "map": described_map(image.map()),
            "check": {"exit": report.exit_code, "corruptions": report.corruptions, "leaks": report.leaked_bytes,
                      "allocated_blocks": report.allocated_blocks, "extents": report.extents,
                      "data_end": report.data_end, "records": report.replayed_records},
        }
        log = next((source / "run").glob(f"*{image.superblock.uuid.hex()[-12:]}.exdlog"), None)
        expected = raw_content_hash(source / f"{name}.raw")
        if name == "live-log":
            logged = Image(path, log, any_host=True)
            manifest["with_log"] = {"sha256": fixtures.sha256(log.read_bytes()), "content": logged.content_hash(),
                                    "map": described_map(logged.map())}
            assert logged.content_hash() == expected, f"{name}: content with the log"
            (fixtures.GOLDEN / f"{name}.exdlog.xz").write_bytes(compress(log.read_bytes()))
        else:
            assert image.content_hash() == expected, f"{name}: content"
    target.write_bytes(compress(data))
    (fixtures.GOLDEN / f"{name}.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{name}: {target.stat().st_size} bytes")


def compress(data):
    """As small as the standard library makes it."""
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def main():
    """Packs every image of a directory."""
    source, version = Path(sys.argv[1]), sys.argv[2]
    fixtures.GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.exd")):
        pack(source, path.stem, f"make_fixtures, commit {version}")


if __name__ == "__main__":
    main()
