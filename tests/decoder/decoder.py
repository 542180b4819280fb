#!/usr/bin/env python3
"""Reads EXD images: an implementation independent of the programs, made from format-spec/SPEC.md alone.

    decoder.py info FILE
    decoder.py map FILE
    decoder.py check FILE
    decoder.py read FILE [--offset N] [--length N]     bytes on standard output
    decoder.py hash FILE [--raw]                       the content hash (of a raw file)

--log FILE gives the completion log; --any-host takes it from another host or boot.
Exit codes: 0; 1 cannot be read; for check also 2 corrupt, 3 leaks.
"""

import argparse
import json
import sys
from dataclasses import asdict

from check import check
from image import Image, raw_content_hash
from structures import Problem


def info(image):
    """What the superblock in use says."""
    s = image.superblock
    return {"virtual-size": s.virtual_size, "block-size": s.block_size, "uuid": s.uuid.hex(),
            "generation": s.generation, "epoch": s.epoch, "clean": not s.in_use, "extents": s.extent_count,
            "nodes": s.node_count, "data-end": s.data_end, "applied": s.applied, "birth": s.birth,
            "preallocation": s.preallocation, "journal-tail": s.journal_tail, "tail-sequence": s.tail_sequence,
            "segments": s.segments, "completion-log": s.completion_log_path, "remarks": image.remarks}


def read(image, offset, length):
    """Writes a range of the virtual disk to standard output."""
    end = min(offset + length, image.superblock.virtual_size)
    position = offset
    for start, data in image.data():
        low, high = max(start, position), min(start + len(data), end)
        if low < high:
            sys.stdout.buffer.write(bytes(low - position) + data[low - start:high - start])
            position = high
    sys.stdout.buffer.write(bytes(max(end - position, 0)))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["info", "map", "check", "read", "hash"])
    parser.add_argument("file")
    parser.add_argument("--log")
    parser.add_argument("--any-host", action="store_true")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--length", type=int, default=1 << 57)
    return parser.parse_args()


def run(options):
    """Runs the command; gives the exit code."""
    if options.command == "check":
        report = check(options.file, options.log, options.any_host)
        print(json.dumps(asdict(report), indent=1))
        return report.exit_code
    if options.command == "hash" and options.raw:
        print(raw_content_hash(options.file))
        return 0
    image = Image(options.file, options.log, options.any_host)
    if options.command == "info":
        print(json.dumps(info(image), indent=1))
    elif options.command == "map":
        print(json.dumps(image.map(), indent=1))
    elif options.command == "hash":
        print(image.content_hash())
    else:
        read(image, options.offset, options.length)
    return 0


def main():
    """Entry point."""
    try:
        return run(arguments())
    except (Problem, OSError) as problem:
        print(f"decoder: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
