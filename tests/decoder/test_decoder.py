"""Every golden image, read by this decoder and by imgtool: both must see what the manifest says.

IMGTOOL names the program; by default the one of `cargo build --release`. Proves P3, P4 and P6 on images that
were made once and stay as they are, and that the specification says all there is to know.
"""

import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import fixtures
import structures as st
from check import check
from image import Host, Image, raw_content_hash
from seal import move_log

LEAK_UNIT = 4096


def run(*arguments, **options):
    """Runs imgtool."""
    command = [fixtures.imgtool(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


class Golden(unittest.TestCase):
    """One test for each question, over all golden images."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.directory = Path(cls.temporary.name)
        cls.names = fixtures.names()
        cls.paths = {name: fixtures.unpack(name, cls.directory) for name in cls.names}

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def each(self, body):
        """Calls `body` with name, manifest and path of every golden image."""
        self.assertGreaterEqual(len(self.names), 18, "golden images are missing")
        for name in self.names:
            with self.subTest(image=name):
                body(name, fixtures.manifest(name), self.paths[name])

    def expect_map(self, expected, pieces):
        """A map is the one of a manifest."""
        if isinstance(expected, list):
            self.assertEqual(expected, pieces)
        else:
            self.assertEqual(expected["pieces"], len(pieces))
            self.assertEqual(expected["sha256"], fixtures.map_hash(pieces))

    def test_golden_images_are_what_they_were(self):
        def body(name, manifest, _):
            self.assertEqual(manifest["sha256"], fixtures.sha256(fixtures.packed(name)))

        self.each(body)

    def test_decoder_finds_what_the_manifest_says(self):
        def body(_, manifest, path):
            image, report, expected = Image(path), check(path), manifest["check"]
            self.assertEqual([], report.findings)
            self.assertEqual((expected["exit"], expected["corruptions"], expected["leaks"]),
                             (report.exit_code, report.corruptions, report.leaked_bytes))
            self.assertEqual((expected["allocated_blocks"], expected["extents"], expected["records"]),
                             (report.allocated_blocks, report.extents, report.replayed_records))
            self.assertEqual(manifest["content"], image.content_hash())
            self.expect_map(manifest["map"], image.map())

        self.each(body)

    def test_imgtool_check_agrees(self):
        def body(_, manifest, path):
            report = check(path)
            result = run("check", "--output", "json", path)
            self.assertEqual(report.exit_code, result.returncode, result.stderr)
            counts = json.loads(result.stdout)
            self.assertEqual(report.corruptions, counts.get("corruptions", 0))
            self.assertEqual(-(-report.leaked_bytes // LEAK_UNIT), counts.get("leaks", 0))
            self.assertEqual(report.total_blocks, counts.get("total-clusters", 0))
            self.assertEqual(report.allocated_blocks, counts.get("allocated-clusters", 0))
            self.assertEqual(manifest["check"]["data_end"], counts["image-end-offset"])

        self.each(body)

    def test_imgtool_map_agrees(self):
        def body(_, __, path):
            result = run("map", "--output", "json", path)
            self.assertEqual(0, result.returncode, result.stderr)
            self.assertEqual(Image(path).map(), json.loads(result.stdout))

        self.each(body)

    def test_imgtool_info_agrees(self):
        def body(_, manifest, path):
            result = run("info", "--output", "json", path)
            self.assertEqual(0, result.returncode, result.stderr)
            info = json.loads(result.stdout)
            self.assertEqual(manifest["virtual_size"], info["virtual-size"])
            self.assertEqual(manifest["block_size"], info["cluster-size"])
            self.assertEqual(Image(path).superblock.in_use, info.get("dirty-flag", False))

        self.each(body)

    def test_imgtool_reads_the_same_content(self):
        def body(name, manifest, path):
            raw = self.directory / f"{name}.raw"
            result = run("convert", "-O", "raw", path, raw)
            self.assertEqual(0, result.returncode, result.stderr)
            self.assertEqual(manifest["content"], raw_content_hash(raw))
            raw.unlink()

        self.each(body)

    def test_nothing_is_written_to_an_image_that_is_only_read(self):
        def body(_, manifest, path):
            self.assertEqual(manifest["sha256"], fixtures.sha256(path.read_bytes()))

        self.each(body)


class Log(unittest.TestCase):
    """The completion log (P2)."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.directory = Path(self.temporary.name)
        self.path = fixtures.unpack("live-log", self.directory)
        self.manifest = fixtures.manifest("live-log")
        self.log = fixtures.packed("live-log", ".exdlog")
        self.uuid = Image(self.path).superblock.uuid
        self.place = self.directory / "run"
        self.place.mkdir(mode=0o700)
        text = self.uuid.hex()
        name = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) + ".exdlog"
        self.log_path = self.place / name

    def leave(self, log):
        """Leaves a log where a dead daemon would have."""
        self.log_path.write_bytes(log)
        self.log_path.chmod(0o600)

    def content_by_imgtool(self):
        """What imgtool reads, with the log in reach."""
        raw = self.directory / "out.raw"
        environment = {**os.environ, "EXD_RUNTIME_DIR": str(self.place)}
        result = run("convert", "-f", "exd", "-O", "raw", self.path, raw, env=environment)
        self.assertEqual(0, result.returncode, result.stderr)
        return raw_content_hash(raw)

    def test_log_of_this_host_is_replayed(self):
        self.assertEqual(self.manifest["with_log"]["sha256"], fixtures.sha256(self.log))
        self.leave(move_log(self.log, self.uuid, Host.running(self.path)))
        image = Image(self.path, self.log_path)
        self.assertEqual(self.manifest["with_log"]["content"], image.content_hash())
        self.assertEqual([], image.remarks)
        self.assertEqual(0, check(self.path, self.log_path).exit_code)
        self.assertEqual(self.manifest["with_log"]["content"], self.content_by_imgtool())

    def test_log_of_another_boot_is_ignored(self):
        here = Host.running(self.path)
        self.leave(move_log(self.log, self.uuid, Host(bytes(16), here.storage)))
        self.assertEqual(self.manifest["content"], Image(self.path, self.log_path).content_hash())
        self.assertEqual(self.manifest["content"], self.content_by_imgtool())

    def test_log_of_another_file_is_ignored(self):
        here = Host.running(self.path)
        self.leave(move_log(self.log, self.uuid, Host(here.boot_id, (1, 2))))
        self.assertEqual(self.manifest["content"], Image(self.path, self.log_path).content_hash())
        self.assertEqual(self.manifest["content"], self.content_by_imgtool())

    def test_log_behind_a_failed_sync_is_ignored(self):
        log = bytearray(move_log(self.log, self.uuid, Host.running(self.path)))
        log[80] |= 1
        self.leave(log)
        self.assertEqual(self.manifest["content"], Image(self.path, self.log_path).content_hash())
        self.assertEqual(self.manifest["content"], self.content_by_imgtool())

    def test_every_prefix_of_the_log_gives_whole_groups(self):
        log = move_log(self.log, self.uuid, Host.running(self.path))
        used = [at for at in range(4096, len(log) - 39, 40) if any(log[at:at + 40])]
        superblock = Image(self.path).superblock
        slots = sorted((st.parse_slot(log[at:at + 40], superblock)[0], at) for at in used)
        seen = set()
        for count in range(len(slots) + 1):
            short = bytearray(log)
            for _, at in slots[count:]:
                short[at:at + 40] = bytes(40)
            self.leave(short)
            content = Image(self.path, self.log_path).content_hash()
            self.assertEqual(content, self.content_by_imgtool())
            seen.add(content)
        self.assertGreater(len(seen), 3)


if __name__ == "__main__":
    unittest.main()
