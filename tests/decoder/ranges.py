"""Sets of numbers as disjoint half-open ranges, and maps from block ranges to extents."""

import bisect


class RangeSet:
    """A set of integers, kept as sorted disjoint ranges."""

    def __init__(self, ranges=()):
        self._starts = []
        self._ends = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self):
        return iter(zip(self._starts, self._ends))

    def _touching(self, start, end):
        """Indices of the ranges that overlap or touch start .. end."""
        return bisect.bisect_left(self._ends, start), bisect.bisect_right(self._starts, end)

    def add(self, start, end):
        """Adds start .. end."""
        low, high = self._touching(start, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def remove(self, start, end):
        """Removes start .. end."""
        low, high = self._touching(start, end)
        kept = [piece for piece in zip(self._starts[low:high], self._ends[low:high])]
        kept = [cut for s, e in kept for cut in ((s, min(e, start)), (max(s, end), e)) if cut[0] < cut[1]]
        self._starts[low:high] = [s for s, _ in kept]
        self._ends[low:high] = [e for _, e in kept]

    def within(self, start, end):
        """The parts of start .. end that are in the set."""
        low, high = self._touching(start, end)
        for s, e in zip(self._starts[low:high], self._ends[low:high]):
            if max(s, start) < min(e, end):
                yield max(s, start), min(e, end)

    def missing(self, start, end):
        """The parts of start .. end that are not in the set."""
        for s, e in self.within(start, end):
            if start < s:
                yield start, s
            start = e
        if start < end:
            yield start, end


class ExtentMap:
    """Extents by block; a later one replaces what it covers of earlier ones (section 14, 3)."""

    def __init__(self, sectors_per_block):
        self._sectors_per_block = sectors_per_block
        self._starts = []
        self._extents = []

    def __iter__(self):
        return iter(self._extents)

    def set(self, extent):
        """Lets `extent` say what its blocks are."""
        low = bisect.bisect_left(self._starts, extent.logical)
        if low > 0 and self._extents[low - 1].end > extent.logical:
            low -= 1
        high = bisect.bisect_left(self._starts, extent.end)
        pieces = [extent]
        for old in self._extents[low:high]:
            if old.logical < extent.logical:
                pieces.append(old.part(old.logical, extent.logical, self._sectors_per_block))
            if old.end > extent.end:
                pieces.append(old.part(extent.end, old.end, self._sectors_per_block))
        pieces.sort(key=lambda piece: piece.logical)
        self._extents[low:high] = pieces
        self._starts[low:high] = [piece.logical for piece in pieces]

    def over(self, extents):
        """`extents` (sorted) with this map laid over them, sorted."""
        below = ExtentMap(self._sectors_per_block)
        below._extents = list(extents)
        below._starts = [extent.logical for extent in below._extents]
        for extent in self._extents:
            below.set(extent)
        return list(below)
