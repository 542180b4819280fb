"""Malformed images, made from golden ones: each is wrong in one way, with every checksum right.

`CASES` maps a name to (golden image, what it does to it, verdict). The verdict is what `check` must end with: DAMAGED
(corrupt, exit code 2), REFUSED (cannot be opened, 1), UNREADABLE (either), or FINE (0, what looks wrong is allowed).
"""

import struct

import structures as st
from seal import Editor, get, put, seal

FINE, REFUSED, DAMAGED, LEAKY = {0}, {1}, {2}, {3}
UNREADABLE = {1, 2}
MAX16, MAX32, MAX48, MAX64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 48) - 1, (1 << 64) - 1

CASES = {}


def case(source, verdict, name=None):
    """Registers a function that edits a golden image."""
    def register(function):
        CASES[name or function.__name__.replace("_", "-")] = (source, function, verdict)
        return function
    return register


def make(name, data):
    """The malformed image, from the bytes of its golden one."""
    _, function, _ = CASES[name]
    editor = Editor(data)
    result = function(editor)
    return editor.finish() if result is None else bytes(result)


# Superblock: (offset, layout, value) each, in both slots.
SUPERBLOCK = {
    "no-block-bits": (52, "B", 0), "block-bits-17": (52, "B", 17), "block-bits-255": (52, "B", 255),
    "record-bits-255": (53, "B", 255), "node-bits-11": (54, "B", 11), "node-bits-17": (54, "B", 17),
    "state-2": (55, "B", 2), "virtual-size-max": (88, "Q", MAX64 - 511), "virtual-size-odd": (88, "Q", 513),
    "virtual-size-too-small": (88, "Q", 512), "generation-0": (8, "Q", 0), "generation-max": (8, "Q", MAX64),
    "epoch-max": (96, "Q", MAX64), "applied-max": (104, "Q", MAX64), "root-at-0x1000": (112, "Q", 4096),
    "root-unaligned": (112, "Q", 65537), "root-past-the-end": (112, "Q", 1 << 56),
    "root-wraps": (112, "Q", MAX64 - 4095), "root-level-255": (132, "B", 255), "root-level-15": (132, "B", 15),
    "root-generation-later": (120, "Q", 1 << 40), "root-in-the-ring": (112, "Q", 65536),
    "extent-count-max": (136, "Q", MAX64), "extent-count-wrong": (136, "Q", 3), "node-count-max": (144, "Q", MAX64),
    "node-count-wrong": (144, "Q", 2), "journal-tail-outside": (152, "Q", 1 << 40),
    "journal-tail-unaligned": (152, "Q", 1), "tail-sequence-0": (160, "Q", 0), "tail-sequence-max": (160, "Q", MAX64),
    "no-segments": (172, "I", 0), "segments-17": (172, "I", 17), "segments-max": (172, "I", MAX32),
    "segment-at-0": (512, "Q", 0), "segment-giant": (520, "Q", 1 << 40), "segment-wraps": (512, "Q", MAX64 - 65535),
    "segment-length-0": (520, "Q", 0), "list-giant": (184, "Q", 1 << 40), "list-wraps": (176, "Q", MAX64 - 4095),
    "list-over-the-ring": (176, "Q", 65536), "list-at-the-superblock": (176, "Q", 4096),
    "data-end-0": (200, "Q", 0), "data-end-max": (200, "Q", MAX64 - 4095), "data-end-too-low": (200, "Q", 131072),
    "birth-0": (208, "I", 0), "preallocation-9": (212, "I", 9), "flags-1": (296, "Q", 1), "reserved-byte": (400, "B", 1),
    "snapshots-without-feature": (216, "QQ", 1 << 20, 4096), "text-too-long": (3136, "H", MAX16),
    "text-not-utf-8": (3136, "HB", 1, 0xFF), "backing-path-without-feature": (1024, "H1s", 1, b"x"),
    "version-0": (48, "H", 0),
}
"""All of these are damaged superblocks."""


def _superblock_case(name, offset, layout, *values):
    def edit(editor):
        editor.set(offset, layout, *values)
        if name == "root-at-0x1000" or name.startswith(("root-", "list-")):
            # The superblock alone: what it points to is not there to be sealed.
            return superblock_only(editor)
        return None
    # A disk that is too small is a valid superblock over a tree that is too large.
    CASES[name] = ("extents", edit, UNREADABLE)


def superblock_only(editor):
    """Seals both superblocks and nothing else."""
    for slot in (editor.slot, 4096 - editor.slot):
        if slot != editor.slot:
            editor.data[slot:slot + 4096] = editor.data[editor.slot:editor.slot + 4096]
        put(editor.data, slot + 16, "Q", slot)
        editor.seal_slot(slot)
    return editor.data


for _name, _what in SUPERBLOCK.items():
    _superblock_case(_name, *_what)


def _feature_case(name, offset, bit, verdict):
    def edit(editor):
        editor.set(offset, "Q", 1 << bit)
    CASES[name] = ("extents", edit, verdict)


for _bit in (0, 1, 2, 3, 4, 63):
    _feature_case(f"incompatible-bit-{_bit}", 56, _bit, REFUSED)
_feature_case("read-only-bit-63", 64, 63, UNREADABLE | FINE)
_feature_case("read-only-snapshots-without-table", 64, 0, UNREADABLE)
_feature_case("compatible-bit-63", 72, 63, FINE)
_feature_case("autoclear-bit-63", 80, 63, FINE)
_feature_case("autoclear-bitmaps-without-directory", 80, 0, UNREADABLE)


@case("extents", REFUSED)
def version_2(editor):
    editor.set(48, "H", 2)


@case("extents", FINE)
def version_1_9_with_reserved_bytes(editor):
    editor.set(50, "H", 9)
    editor.set(400, "B", 1)


@case("extents", UNREADABLE)
def slots_of_one_generation_differ(editor):
    data = bytearray(editor.finish())
    put(data, 4096 + 288, "Q", 12345)
    seal(data, 4096, 4096)
    return data


@case("extents", UNREADABLE)
def slots_with_different_uuids(editor):
    data = bytearray(editor.finish())
    data[4096 + 24] ^= 1
    seal(data, 4096, 4096)
    return data


@case("extents", REFUSED)
def later_slot_needs_a_feature(editor):
    data = bytearray(editor.finish())
    put(data, 4096 + 56, "Q", 1 << 40)
    put(data, 4096 + 8, "Q", editor.superblock.generation + 1)
    seal(data, 4096, 4096)
    return data


@case("extents", FINE)
def earlier_slot_needs_a_feature(editor):
    data = bytearray(editor.finish())
    put(data, 4096 + 56, "Q", 1 << 40)
    put(data, 4096 + 8, "Q", editor.superblock.generation - 1)
    seal(data, 4096, 4096)
    return data


@case("extents", UNREADABLE)
def both_slots_damaged(editor):
    data = bytearray(editor.finish())
    data[100] ^= 1
    data[4196] ^= 1
    return data


@case("extents", UNREADABLE)
def slots_exchanged(editor):
    data = bytearray(editor.finish())
    data[:4096], data[4096:8192] = data[4096:8192], data[:4096]
    return data


@case("extents", UNREADABLE | {63})
def empty_file(editor):
    return b""


@case("extents", UNREADABLE)
def file_of_100_bytes(editor):
    return editor.finish()[:100]


@case("extents", DAMAGED)
def file_cut_behind_the_superblocks(editor):
    return editor.finish()[:8192]


# Nodes.

def _node_case(name, verdict, source="tree"):
    def register(function):
        def edit(editor):
            return function(editor, editor.root, editor.node_entries(editor.root))
        CASES[name] = (source, edit, verdict)
        return function
    return register


@_node_case("root-with-a-wrong-checksum", DAMAGED)
def _root_crc(editor, root, entries):
    editor.frozen.add(root)
    editor.data[root + 62] ^= 1


@_node_case("child-with-a-wrong-checksum", DAMAGED)
def _child_crc(editor, root, entries):
    child = get(editor.data, entries[0] + 8, "Q")
    data = bytearray(editor.finish())
    data[child + 100] ^= 1
    return data


@_node_case("cycle", DAMAGED)
def _cycle(editor, root, entries):
    # Checksums cannot close a circle: the innermost pointer has a wrong one.
    child = get(editor.data, entries[0] + 8, "Q")
    grandchild = editor.node_entries(child)[0]
    put(editor.data, grandchild + 8, "Q", root)


@_node_case("child-is-its-own-parent", DAMAGED)
def _self(editor, root, entries):
    put(editor.data, entries[1] + 8, "Q", root)


@_node_case("node-with-two-parents", DAMAGED)
def _two_parents(editor, root, entries):
    editor.data[entries[1] + 8:entries[1] + 32] = editor.data[entries[0] + 8:entries[0] + 32]


@_node_case("node-twice-in-one-parent", DAMAGED)
def _twice(editor, root, entries):
    child = get(editor.data, entries[0] + 8, "Q")
    inner = editor.node_entries(child)
    editor.data[inner[1] + 8:inner[1] + 32] = editor.data[inner[0] + 8:inner[0] + 32]


@_node_case("level-lies-in-the-node", DAMAGED)
def _level_node(editor, root, entries):
    child = get(editor.data, entries[0] + 8, "Q")
    editor.data[child + 58] = 0
    put(editor.data, entries[0] + 24, "I", seal(editor.data, child, 4096))
    editor.frozen.add(child)


@_node_case("level-lies-in-the-pointer", DAMAGED)
def _level_pointer(editor, root, entries):
    editor.data[entries[0] + 28] = 0


@_node_case("child-of-a-later-generation", DAMAGED)
def _later_child(editor, root, entries):
    child = get(editor.data, entries[0] + 8, "Q")
    generation = editor.superblock.generation + 5
    put(editor.data, child + 8, "Q", generation)
    put(editor.data, entries[0] + 16, "Q", generation)


@_node_case("stale-generation-in-the-pointer", DAMAGED)
def _stale(editor, root, entries):
    put(editor.data, entries[0] + 16, "Q", 1)


@_node_case("node-of-another-image", DAMAGED)
def _uuid(editor, root, entries):
    editor.data[get(editor.data, entries[0] + 8, "Q") + 24] ^= 1


@_node_case("node-with-a-wrong-address", DAMAGED)
def _address(editor, root, entries):
    put(editor.data, get(editor.data, entries[0] + 8, "Q") + 16, "Q", root)


@_node_case("node-of-another-kind", DAMAGED)
def _kind(editor, root, entries):
    child = get(editor.data, entries[0] + 8, "Q")
    editor.data[child:child + 4] = b"EXDF"
    put(editor.data, entries[0] + 24, "I", seal(editor.data, child, 4096))


@_node_case("node-past-data-end", DAMAGED)
def _past(editor, root, entries):
    put(editor.data, entries[0] + 8, "Q", editor.superblock.data_end)


@_node_case("node-address-wraps", DAMAGED)
def _wraps(editor, root, entries):
    put(editor.data, entries[0] + 8, "Q", MAX64 - 4095)


@_node_case("keys-unsorted", DAMAGED)
def _keys(editor, root, entries):
    a, b = entries[0], entries[1]
    editor.data[a:a + 32], editor.data[b:b + 32] = editor.data[b:b + 32], editor.data[a:a + 32]


@_node_case("key-past-the-end", DAMAGED)
def _key_end(editor, root, entries):
    put(editor.data, entries[-1], "Q", MAX64)


@_node_case("node-covers-nothing", DAMAGED)
def _nothing(editor, root, entries):
    put(editor.data, root + 48, "Q", 0)


@_node_case("node-covers-everything", DAMAGED)
def _everything(editor, root, entries):
    put(editor.data, root + 48, "Q", MAX64)


@_node_case("child-covers-its-neighbour", DAMAGED)
def _neighbour(editor, root, entries):
    put(editor.data, get(editor.data, entries[0] + 8, "Q") + 48, "Q", 1 << 62)


for _count in (0, 127, MAX16):
    @_node_case(f"root-count-{_count}", DAMAGED)
    def _root_count(editor, root, entries, count=_count):
        put(editor.data, root + 56, "H", count)

    @_node_case(f"leaf-count-{_count * 2}", DAMAGED)
    def _leaf_count(editor, root, entries, count=_count):
        put(editor.data, editor.first_leaf() + 56, "H", min(count * 2, MAX16))


@_node_case("bytes-behind-the-entries", DAMAGED)
def _behind(editor, root, entries):
    editor.data[root + 4095] = 1


# Extents of the first leaf: (offset in the extent, layout, value).
EXTENT = {
    "extent-length-0": (16, "I", 0), "extent-length-max": (16, "I", MAX32), "extent-logical-wraps": (0, "Q", MAX64),
    "extent-logical-far": (0, "Q", 1 << 54), "extent-state-0": (15, "B", 0), "extent-state-4": (15, "B", 4),
    "extent-state-255": (15, "B", 255), "extent-birth-0": (20, "I", 0), "extent-birth-max": (20, "I", MAX32),
    "extent-place-0": (8, "IH", 0, 0), "extent-place-1": (8, "IH", 1, 0), "extent-place-max": (8, "IH", MAX32, MAX16),
    "extent-in-the-ring": (8, "IH", 128, 0), "extent-in-the-superblock": (8, "IH", 8, 0),
    "extent-reserved-byte": (14, "B", 1),
}


def _extent_case(name, offset, layout, *values):
    def edit(editor):
        put(editor.data, editor.node_entries(editor.first_leaf())[0] + offset, layout, *values)
    CASES[name] = ("extents", edit, DAMAGED)


for _name, _what in EXTENT.items():
    _extent_case(_name, *_what)


@_node_case("extent-over-a-node", DAMAGED, "extents")
def _over_node(editor, root, entries):
    put(editor.data, entries[0] + 8, "IH", root // 512, 0)


@_node_case("extent-over-the-list", DAMAGED, "extents")
def _over_list(editor, root, entries):
    put(editor.data, entries[0] + 8, "IH", editor.list // 512, 0)


@_node_case("extents-share-a-place", DAMAGED, "extents")
def _share(editor, root, entries):
    editor.data[entries[1] + 8:entries[1] + 14] = editor.data[entries[0] + 8:entries[0] + 14]


@_node_case("extents-unsorted", DAMAGED, "extents")
def _unsorted(editor, root, entries):
    a, b = entries[0], entries[1]
    editor.data[a:a + 24], editor.data[b:b + 24] = editor.data[b:b + 24], editor.data[a:a + 24]


@_node_case("extents-overlap", DAMAGED, "extents")
def _overlap(editor, root, entries):
    put(editor.data, entries[1], "Q", get(editor.data, entries[0], "Q"))


# Space list.

def _list_case(name, verdict=DAMAGED):
    def register(function):
        def edit(editor):
            return function(editor, editor.list, get(editor.data, editor.list + 40, "Q"))
        CASES[name] = ("extents", edit, verdict)
        return function
    return register


@_list_case("list-count-max")
def _list_count(editor, at, count):
    put(editor.data, at + 40, "Q", MAX64)


@_list_case("list-count-too-many")
def _list_many(editor, at, count):
    put(editor.data, at + 40, "Q", 300)


@_list_case("list-count-wraps")
def _list_wraps(editor, at, count):
    put(editor.data, at + 40, "Q", 1 << 60)


@_list_case("list-length-lies")
def _list_length(editor, at, count):
    put(editor.data, at + 48, "Q", 1 << 30)


@_list_case("list-of-a-later-generation")
def _list_generation(editor, at, count):
    put(editor.data, at + 8, "Q", 1 << 40)


@_list_case("list-with-a-wrong-checksum")
def _list_crc(editor, at, count):
    editor.frozen.add(at)
    editor.data[at + 57] ^= 1


@_list_case("list-range-of-unknown-kind")
def _list_kind(editor, at, count):
    editor.data[at + 64 + 6] = 9


@_list_case("list-range-empty")
def _list_empty(editor, at, count):
    put(editor.data, at + 64 + 8, "Q", 0)


@_list_case("list-range-wraps")
def _list_range_wraps(editor, at, count):
    put(editor.data, at + 64 + 8, "Q", MAX64)


@_list_case("list-ranges-overlap")
def _list_ranges(editor, at, count):
    editor.data[at + 64 + 16:at + 64 + 32] = editor.data[at + 64:at + 64 + 16]
    put(editor.data, at + 40, "Q", max(count, 2))


@_list_case("list-range-over-an-extent")
def _list_extent(editor, at, count):
    place = editor.data[editor.node_entries(editor.root)[0] + 8:][:6]
    editor.data[at + 64:at + 4096] = bytes(4032)
    editor.data[at + 64:at + 70] = place
    editor.data[at + 70] = st.OPEN_RANGE
    put(editor.data, at + 72, "Q", 1)
    put(editor.data, at + 40, "Q", 1)


@_list_case("list-zero-range-holds-data")
def _list_zero(editor, at, count):
    for i in range(count):
        entry = at + 64 + 16 * i
        if editor.data[entry + 6] == st.ZERO_RANGE:
            start = int.from_bytes(editor.data[entry:entry + 6], "little") * 512
            editor.grow(start + 512)
            editor.data[start] = 1
            return
    raise AssertionError("the golden image has a zero range")


@_list_case("data-past-data-end")
def _past_data_end(editor, at, count):
    editor.grow(editor.superblock.data_end + 4096)
    editor.data[editor.superblock.data_end + 7] = 1


# Journal.

def _record_case(name, verdict=DAMAGED, index=0, source="live-journal", sealed=True):
    def register(function):
        def edit(editor):
            live = editor.live()
            function(editor, live[index][0], live)
            if sealed:
                editor.seal_records(live)
        CASES[name] = (source, edit, verdict)
        return function
    return register


@_record_case("record-of-a-later-epoch")
def _later_epoch(editor, at, live):
    put(editor.data, at + 8, "Q", editor.superblock.epoch + 1)


@_record_case("record-of-epoch-max")
def _max_epoch(editor, at, live):
    put(editor.data, at + 8, "Q", MAX64)


@_record_case("sequence-gap")
def _gap(editor, at, live):
    put(editor.data, at + 40, "Q", get(editor.data, at + 40, "Q") + 1)


@_record_case("sequence-max")
def _sequence_max(editor, at, live):
    put(editor.data, at + 40, "Q", MAX64)


@_record_case("chain-mismatch", index=1, sealed=False)
def _chain(editor, at, live):
    editor.data[at + 68] ^= 1
    seal(editor.data, at, live[1][1])


@_record_case("tail-chain-mismatch", sealed=False)
def _tail_chain(editor, at, live):
    editor.set(168, "I", get(editor.data, at + 68, "I") ^ 1)


@_record_case("durable-record-gone", sealed=False)
def _gone(editor, at, live):
    due = get(editor.data, at + 40, "Q")
    last, length = live[-1]
    put(editor.data, last + 48, "Q", due)
    seal(editor.data, last, length)
    editor.data[at:at + 4] = bytes(4)


@_record_case("durable-beyond-itself")
def _durable(editor, at, live):
    put(editor.data, at + 48, "Q", MAX64)


@_record_case("through-max")
def _through(editor, at, live):
    put(editor.data, at + 56, "Q", MAX64)


@_record_case("through-below-count")
def _through_zero(editor, at, live):
    put(editor.data, at + 56, "Q", 0)


@_record_case("record-count-max")
def _record_count(editor, at, live):
    put(editor.data, at + 72, "I", MAX32)


@_record_case("record-count-too-many")
def _record_many(editor, at, live):
    put(editor.data, at + 72, "I", 4000)


@_record_case("record-reserved-bytes")
def _record_reserved(editor, at, live):
    put(editor.data, at + 76, "I", 1)


@_record_case("last-entry-says-more")
def _more(editor, at, live):
    count = get(editor.data, at + 72, "I")
    editor.data[at + 80 + 24 * (count - 1) + 15] |= st.MORE


# A record that is gone or too long is the end of the log, if nothing says that it was durable.
@_record_case("record-length-max", UNREADABLE | FINE | LEAKY, sealed=False)
def _record_length(editor, at, live):
    put(editor.data, at + 64, "I", MAX32)


@_record_case("record-length-0", UNREADABLE | FINE | LEAKY, sealed=False)
def _record_length_zero(editor, at, live):
    put(editor.data, at + 64, "I", 0)


# Entries of the first record: (offset in the entry, layout, value).
ENTRY = {
    "entry-kind-0": (14, "B", 0), "entry-kind-8": (14, "B", 8), "entry-flags": (15, "B", 0x80),
    "entry-length-0": (16, "I", 0), "entry-length-max": (16, "I", MAX32), "entry-logical-wraps": (0, "Q", MAX64),
    "entry-place-0": (8, "IH", 0, 0), "entry-place-max": (8, "IH", MAX32, MAX16), "entry-place-low": (8, "IH", 1, 0),
    "entry-birth-0": (20, "I", 0), "entry-birth-max": (20, "I", MAX32), "entry-in-the-ring": (8, "IH", 128, 0),
}


def _entry_case(name, offset, layout, *values):
    def edit(editor):
        live = editor.live()
        for at, _ in live:
            for i in range(get(editor.data, at + 72, "I")):
                entry = at + 80 + 24 * i
                if editor.data[entry + 14] == st.MAP:
                    put(editor.data, entry + offset, layout, *values)
                    editor.seal_records(live)
                    return
        raise AssertionError("the golden image has a MAP entry")
    CASES[name] = ("live-journal", edit, DAMAGED)


for _name, _what in ENTRY.items():
    _entry_case(_name, *_what)


@_record_case("window-up-to-the-limit", UNREADABLE | FINE | LEAKY)
def _window(editor, at, live):
    _replace(editor, at, struct.pack("<QIHBBII", (1 << 48) - (1 << 20), 1 << 20, 0, st.WINDOW, 0, 0, 0))


@_record_case("window-past-the-limit")
def _window_far(editor, at, live):
    _replace(editor, at, struct.pack("<QIHBBII", 1 << 50, 1 << 20, 0, st.WINDOW, 0, 0, 0))


@_record_case("window-wraps")
def _window_wraps(editor, at, live):
    _replace(editor, at, struct.pack("<QIHBBII", MAX64, 1 << 20, 0, st.WINDOW, 0, 0, 0))


@_record_case("window-over-the-ring")
def _window_ring(editor, at, live):
    _replace(editor, at, struct.pack("<QIHBBII", 128, 128, 0, st.WINDOW, 0, 0, 0))


@_record_case("release-over-the-ring")
def _release_ring(editor, at, live):
    _replace(editor, at, struct.pack("<QIHBBII", 128, 128, 0, st.RELEASE, 0, 0, 0))


def _replace(editor, at, entry):
    """Puts an entry in the place of the record's last."""
    count = get(editor.data, at + 72, "I")
    last = at + 80 + 24 * (count - 1)
    editor.data[last:last + 24] = entry
