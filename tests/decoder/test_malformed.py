"""Malformed images: each program ends with an error or a clean verdict, soon and in bounded memory (P6, P8)."""

import collections
import resource
import subprocess
import tempfile
import unittest
from pathlib import Path

import fixtures
import malformed
from check import check
from structures import Problem

SECONDS = 5
"""Time for one command. Generous: none needs a tenth of it, but the machine may be busy."""
MEMORY = 1 << 30
ERRORS = {0, 1}


def limit():
    """In the child: a bound on memory, and on what it may write."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(*arguments):
    """Runs imgtool within the limits; gives the exit code (a signal is negative) and what it said."""
    command = [fixtures.imgtool(), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            errors="replace", timeout=SECONDS, check=False, preexec_fn=limit)
    return result.returncode, result.stderr


def judge(path):
    """Exit code of this decoder's check."""
    try:
        return check(path).exit_code
    except Problem:
        return 1


class Malformed(unittest.TestCase):
    """Every malformed image, with every command that reads."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.directory = Path(self.temporary.name)
        self.golden = {}

    def each(self, body):
        """Calls `body` with name, path and verdict of every malformed image."""
        for name, (source, _, verdict) in malformed.CASES.items():
            if source not in self.golden:
                self.golden[source] = fixtures.packed(source)
            path = self.directory / f"{name}.exd"
            fixtures.write_sparse(path, malformed.make(name, self.golden[source]))
            with self.subTest(image=name):
                body(name, path, verdict)
            path.unlink()

    def test_there_are_enough(self):
        sources = collections.Counter(source for source, _, _ in malformed.CASES.values())
        self.assertGreaterEqual(sum(sources.values()), 150)

    def test_decoder_finds_them(self):
        self.each(lambda _, path, verdict: self.assertIn(judge(path), verdict))

    def test_imgtool_check_finds_them(self):
        def body(name, path, verdict):
            code, errors = run("check", "-f", "exd", path)
            self.assertIn(code, verdict, errors)
            # Unusable to one is unusable to the other; which of the two codes it gets is not laid down.
            # What a checker makes of features it does not know is not laid down either.
            if not name.startswith("read-only"):
                self.assertEqual(judge(path) in {1, 2}, code in {1, 2, 63}, errors)

        self.each(body)

    def test_imgtool_reads_or_refuses_them(self):
        def body(name, path, _):
            before = fixtures.sha256(path.read_bytes()) if path.stat().st_size < 1 << 26 else None
            for arguments in (("info", "-f", "exd", path), ("map", "-f", "exd", "--output", "json", path),
                              ("check", path), ("info", path)):
                code, errors = run(*arguments)
                allowed = ERRORS | {2, 3, 63} if arguments[0] == "check" else ERRORS
                self.assertIn(code, allowed, f"{arguments[0]}: {errors}")
                self.assertNotIn("panicked", errors)
            output = self.directory / "output"
            code, errors = run("convert", "-f", "exd", "-O", "exd", path, output)
            self.assertIn(code, ERRORS, f"{name}: convert: {errors}")
            output.unlink(missing_ok=True)
            if before is not None:
                self.assertEqual(before, fixtures.sha256(path.read_bytes()), "reading changes nothing")

        self.each(body)

    def test_repair_ends(self):
        def body(name, path, _):
            code, errors = run("check", "-f", "exd", "-r", "all", path)
            self.assertIn(code, {0, 1, 2, 3, 63}, errors)
            if code == 0 and not name.startswith("read-only"):
                self.assertEqual(0, judge(path), "what was repaired is right")

        self.each(body)


if __name__ == "__main__":
    unittest.main()
