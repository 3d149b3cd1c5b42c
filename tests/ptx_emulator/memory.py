"""Global memory as the storages of tensors, and the shared memory of several blocks, both watched.

Global memory knows the storages that a launch was given; all else is out of bounds. Shared memory keeps, for each
granule (the smallest access of the program, at most 4 bytes), which warps have written and read it since the block's
last barrier, what the async proxy would not see without a fence, what a copy under way will still write, and what a
product under way still reads. What cannot be executed raises PtxError; what a GPU would execute with a result that
depends on time becomes a finding. Lanes of one warp are not held against each other.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from .types import UNSIGNED, Array, PtxError

SHARED_BASE = 1024  # no shared variable has address 0
PARAMETERS = 1 << 44  # where parameters have their generic addresses, 256 bytes apart
LOCAL_BASE = np.uint64(1 << 45)  # and where the local memories of all threads have theirs, one after the other
Findings = Counter[str]


class Segment:
    """A span of addresses that one tensor's storage owns."""

    def __init__(self, start: int, data: Array, what: str) -> None:
        self.start, self.end, self.what = start, start + data.size, what
        self._views = {
            size: data[: data.size // size * size].view(kind) for size, kind in UNSIGNED.items() if start % size == 0
        }

    def view(self, size: int) -> Array:
        return self._views[size]


class GlobalMemory:
    """Segments by address."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._starts: Array = np.empty(0, np.uint64)
        self._ends: Array = np.empty(0, np.uint64)
        self._list: list[Segment] = []

    def add(self, start: int, data: Array, what: str) -> None:
        """`data`: bytes, of which the largest of those that begin at one address counts."""
        if start not in self._segments or self._segments[start].end < start + data.size:
            self._segments[start] = Segment(start, data, what)
            self._list = [self._segments[key] for key in sorted(self._segments)]
            self._starts = np.array([segment.start for segment in self._list], np.uint64)
            self._ends = np.array([segment.end for segment in self._list], np.uint64)

    def parts(
        self, at: Array, size: int, elements: int, text: object, align: int | None = None
    ) -> list[tuple[Array | None, Array, Array]]:
        """For each segment that holds some of the addresses `at` (uint64): which (None: all), its view as elements of
        `size` bytes, and the index of each address's first element there. An access is `elements` of them, and aligned
        to as many bytes, or to `align`.
        """
        if at.size == 0:
            return []
        width = size * elements
        if (off := at & np.uint64((align or width) - 1)).any():
            raise PtxError(f"misaligned: {text}: address {int(at[off != 0][0]):#x} for {align or width} bytes")
        which = np.searchsorted(self._starts, at, side="right") - 1
        if which.min() < 0 or (at + np.uint64(width) > self._ends[which]).any():
            raise PtxError(self._out_of_bounds(at, which, width, text))
        found = []
        for k in (which[0],) if (which == which[0]).all() else np.unique(which):
            segment = self._list[k]
            here = None if (which == k).all() else which == k
            index = ((at if here is None else at[here]) - np.uint64(segment.start)) // np.uint64(size)
            found.append((here, segment.view(size), index.astype(np.int64)))
        return found

    def _out_of_bounds(self, at: Array, which: Array, width: int, text: object) -> str:
        outside = (which < 0) | (at + np.uint64(width) > self._ends[which])
        address, k = int(at[outside][0]), int(which[outside][0])
        if k < 0:
            return f"out of bounds: {text}: address {address:#x} is of no tensor"
        segment = self._list[k]
        return (
            f"out of bounds: {text}: bytes {address - segment.start} to {address - segment.start + width} of "
            f"{segment.what}, which has {segment.end - segment.start}; {int(outside.sum())} threads"
        )


class SharedMemory:
    """The shared memory of `blocks` blocks, one after the other. Offsets here are into all of it.

    Each thing that is kept is an array with one element a granule, as many bits as a block has warps. An access covers
    neighbours, so that it is looked up as one number of up to 64 bits.
    """

    def __init__(
        self, name: str, blocks: int, size: int, granule: int, warps: int, proxies: bool, findings: Findings
    ) -> None:
        """`proxies`: the program has instructions of the async proxy."""
        self.name, self.size, self.granule, self.proxies, self.findings = name, size, granule, proxies, findings
        self.stride = -(-size // 1024) * 1024
        self.data: Array = np.full(blocks * self.stride, 0xFF, np.uint8)  # NaN as a float
        self._views = {width: self.data.view(kind) for width, kind in UNSIGNED.items()}
        self.bits = next(kind for kind in UNSIGNED.values() if np.dtype(kind).itemsize * 8 >= warps)
        self.per_granule = np.dtype(self.bits).itemsize
        self.written_by, self.read_by = self._kept(), self._kept()  # since the block's last barrier
        self.unfenced = self._kept()  # written, and no proxy fence by that warp since
        self.closed = self._kept()  # 1: nothing has written it; 2: a copy under way will
        self.closed.fill(1)
        self.being_read = self._kept()  # by so many products under way

    def _kept(self) -> Array:
        return np.zeros(self.data.size // self.granule, self.bits)

    def view(self, size: int) -> Array:
        return self._views[size]

    def find(self, what: str, text: object) -> None:
        self.findings[f"{self.name}: {what}: {text}"] += 1

    def _span(self, block: int) -> slice:
        step = self.stride // self.granule
        return slice(block * step, (block + 1) * step)

    def barrier(self, block: int) -> None:
        """All warps of the block have met."""
        span = self._span(block)
        self.written_by[span] = 0
        self.read_by[span] = 0

    def fence(self, block: int, warps: int) -> None:
        """Warps, one bit each, have made what they wrote visible to the async proxy."""
        self.unfenced[self._span(block)] &= self.bits(~warps & np.iinfo(self.bits).max)

    # --------------------------------------------------------------------------------------------- where accesses fall

    def offsets(self, address: Array, origin: Array, width: int, text: object) -> Array:
        """Offsets of shared addresses (uint32) of blocks that begin at `origin`; an access has `width` bytes."""
        at = address.astype(np.int64) - SHARED_BASE
        if at.size and (at.min() < 0 or at.max() + width > self.size):
            bad = at[(at < 0) | (at + width > self.size)]
            raise PtxError(
                f"out of bounds: {text}: bytes {int(bad[0])} to {int(bad[0]) + width} of {self.size} bytes of shared "
                f"memory; {bad.size} threads"
            )
        if (at & (width - 1)).any():
            raise PtxError(f"misaligned: {text}: shared memory, {width} bytes")
        return at + origin

    def _words(self, at: Array, width: int) -> tuple[int, Array, int]:
        """The bytes of the numbers that hold an access's granules, which numbers, and what has a 1 in each granule."""
        kept = max(1, width // self.granule) * self.per_granule
        word = min(8, kept)
        index = at // self.granule * self.per_granule // word
        if kept > word:
            index = index[..., None] + np.arange(kept // word)
        ones = sum(1 << 8 * k for k in range(0, word, self.per_granule))
        return word, index, ones

    def _spread(self, warp_bits: Array, word: int, index: Array, ones: int) -> Array:
        bits = warp_bits.astype(UNSIGNED[word]) * UNSIGNED[word](ones)
        return bits if index.ndim == 1 else bits[:, None]

    # ------------------------------------------------------------------------------------- accesses of ordinary threads

    def load(self, at: Array, size: int, count: int, warp_bits: Array, text: object) -> Array:
        """(accesses, count) elements of `size` bytes."""
        word, index, ones = self._words(at, size * count)
        kind = UNSIGNED[word]
        bits = self._spread(warp_bits, word, index, ones)
        np.bitwise_or.at(self.read_by.view(kind), index, bits)
        if (self.written_by.view(kind)[index] & ~bits).any():
            self.find("read of what another warp wrote, and no barrier between", text)
        self._find_closed("read of", kind, index, ones, text)
        view = self._views[size]
        return view[at // size][:, None] if count == 1 else view[(at // size)[:, None] + np.arange(count)]

    def _find_closed(self, reads: str, kind: Any, index: Array, ones: int, text: object) -> None:
        """A finding where a read meets what nothing has written yet, or what a copy is about to write."""
        closed = self.closed.view(kind)[index]
        if (closed & kind(2 * ones)).any():
            self.find(f"{reads} what a copy under way will write: a wait is missing", text)
        elif closed.any():
            self.find(f"{reads} shared memory that nothing has written", text)

    def store(self, at: Array, size: int, values: Array, warp_bits: Array, text: object) -> None:
        """`values` (accesses, count) of `size` bytes. That several threads write one value to one place is no race."""
        count = values.shape[1]
        word, index, ones = self._words(at, size * count)
        kind = UNSIGNED[word]
        bits = self._spread(warp_bits, word, index, ones)
        view, elements = self._views[size], (at // size)[:, None] + np.arange(count)
        others = self.written_by.view(kind)[index] & ~bits
        if others.any():
            accesses = others.reshape(len(at), -1).any(1)
            if (view[elements[accesses]] != values[accesses]).any():
                self.find("two warps write one place, and no barrier between", text)
        if (self.read_by.view(kind)[index] & ~bits).any():
            self.find("write over what another warp reads, and no barrier between", text)
        self._overwrite(kind, index, ones, text)
        np.bitwise_or.at(self.written_by.view(kind), index, bits)
        if self.proxies:
            np.bitwise_or.at(self.unfenced.view(kind), index, bits)
        self.closed.view(kind)[index] = 0
        view[elements] = values
        if (view[elements] != values).any():
            self.find("two threads write one place at once, and not the same", text)

    def _overwrite(self, kind: Any, index: Array | slice, ones: int, text: object) -> None:
        if self.proxies and self.being_read.view(kind)[index].any():
            self.find("write over what a product under way still reads", text)
        if (self.closed.view(kind)[index] & kind(2 * ones)).any():
            self.find("write where a copy under way will write", text)

    # ---------------------------------------------------------------------------------------------- copies of threads

    def copy_begins(self, at: Array, width: int, warp_bits: Array, text: object) -> None:
        """Threads begin copies of `width` bytes. Whoever reads or writes there has to be done."""
        word, index, ones = self._words(at, width)
        kind = UNSIGNED[word]
        bits = self._spread(warp_bits, word, index, ones)
        if ((self.read_by.view(kind)[index] | self.written_by.view(kind)[index]) & ~bits).any():
            self.find("a copy begins over what another warp reads or writes, and no barrier between", text)
        self._overwrite(kind, index, ones, text)
        self.closed.view(kind)[index] = kind(2 * ones)

    def copy_ends(self, at: Array, width: int, warp_bits: Array) -> None:
        """It has been waited for by the warps that asked for it: to others it is a write of theirs."""
        word, index, ones = self._words(at, width)
        kind = UNSIGNED[word]
        bits = self._spread(warp_bits, word, index, ones)
        self.closed.view(kind)[index] = 0
        np.bitwise_or.at(self.written_by.view(kind), index, bits)
        if self.proxies:
            np.bitwise_or.at(self.unfenced.view(kind), index, bits)

    # -------------------------------------------------------------------------------------------------- the async proxy

    def tensor_copy_begins(self, at: int, width: int, warp_bits: Any, text: object) -> None:
        span = slice(at // self.granule, (at + width) // self.granule)
        if ((self.read_by[span] | self.written_by[span]) & ~warp_bits).any():
            self.find("a copy begins over what another warp reads or writes, and no barrier between", text)
        if self.unfenced[span].any():
            self.find("a copy begins over what threads wrote, and no proxy fence between", text)
        self._overwrite(self.bits, span, 1, text)
        self.closed[span] = 2

    def tensor_copy_ends(self, at: int, width: int) -> None:
        self.closed[at // self.granule : (at + width) // self.granule] = 0

    def product_begins(self, at: Array, warp_bits: Any, text: object) -> None:
        """The async proxy reads chunks of 16 bytes, each once, for warps `warp_bits` until they wait for it."""
        word, index, ones = self._words(at, 16)
        kind = UNSIGNED[word]
        self._find_closed("a product reads", kind, index, ones, text)
        if self.unfenced.view(kind)[index].any():
            self.find("a product reads what threads wrote, and no proxy fence between", text)
        if (self.written_by.view(kind)[index] & ~(kind(warp_bits) * kind(ones))).any():
            self.find("a product reads what another warp wrote, and no barrier between", text)
        self.being_read.view(kind)[index] += kind(ones)

    def product_ends(self, at: Array, warp_bits: Any) -> None:
        """Those warps have waited for it: to others it was a read of theirs."""
        word, index, ones = self._words(at, 16)
        kind = UNSIGNED[word]
        self.being_read.view(kind)[index] -= kind(ones)
        self.read_by.view(kind)[index] |= kind(warp_bits) * kind(ones)
