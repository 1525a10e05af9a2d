"""Samples -> packs of at most `max_length` tokens: which samples share a row. Nothing is cut, nothing is left over.

lengths   7 3 5 2 8 4      max_length 10
best fit  [8 2] [7 3] [5 4]                  3 packs, 97 % full
stream    [7 3] [5 2] [8] [4]                in the order of the data
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtuner.errors import DataError, nearest

PACKINGS = ('best_fit', 'first_fit', 'stream', 'none')
_BLOCK = 2**16  # samples
_OPEN_FIRST_FIT = 256  # packs that first fit keeps open; more would make it slow and hardly fuller


@dataclass(frozen=True)
class Packs:
    """Which samples stand in which pack.

    Attributes:
        samples: int64 `(N,)`: sample numbers, pack after pack.
        starts: int64 `(P + 1,)`: where in `samples` each pack begins; the last entry is N.
    """

    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the sample numbers of pack `index`."""
        return self.samples[self.starts[index] : self.starts[index + 1]]

    def lengths(self, sample_lengths: np.ndarray) -> np.ndarray:
        """Returns the tokens of each pack, int64 `(P,)`."""
        ends = np.concatenate([[0], np.cumsum(sample_lengths[self.samples])])
        return np.diff(ends[self.starts])


def pack_samples(lengths: Sequence[int] | np.ndarray, max_length: int, *, packing: str = 'best_fit') -> Packs:
    """Chooses which samples share a pack; the same input gives the same packs.

    Args:
        lengths: Tokens of each sample, each from 1 to `max_length`.
        max_length: Tokens a pack may have.
        packing: 'best_fit' puts the longest first, each where the least room is left; 'first_fit' goes in the order of
            the data, each into the first of the open packs with room; 'stream' fills one pack after the other in the
            order of the data; 'none' gives each sample its own.

    Raises:
        DataError: For a sample longer than `max_length`, an empty one, or an unknown packing.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.max() > max_length or sizes.min() < 1):
        wrong = int(np.flatnonzero((sizes > max_length) | (sizes < 1))[0])
        raise DataError(f'sample {wrong} has {sizes[wrong]} tokens; a pack takes 1 to {max_length}')
    if packing == 'none':
        return Packs(np.arange(len(sizes)), np.arange(len(sizes) + 1))
    if packing not in PACKINGS:
        raise DataError(f'`dataset.packing` is {packing!r}{nearest(packing, PACKINGS)}; known: {", ".join(PACKINGS)}')
    max_length = min(max_length, int(sizes.sum()))  # what no pack could use takes no room in the packers' arrays
    fit = {'best_fit': _best_fit, 'first_fit': _first_fit, 'stream': _stream}[packing]
    pack_of = fit(sizes, max_length)
    samples = np.argsort(pack_of, kind='stable')
    counts = np.bincount(pack_of, minlength=int(pack_of.max()) + 1 if len(sizes) else 0)
    return Packs(samples, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _best_fit(sizes: np.ndarray, max_length: int) -> np.ndarray:
    """Returns each sample's pack. The room left in open packs is kept sorted, so bisection finds the best."""
    # Among samples of one length, chance decides which share a pack: neighbours in a file are often alike.
    shuffled = np.random.default_rng(0).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind='stable')]
    pack_of = np.empty(len(sizes), dtype=np.int64)
    rooms: list[int] = []  # in tokens, each once
    open_: dict[int, list[int]] = {}
    num_packs = 0
    for sample, size in _pairs(order, sizes[order]):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            packs = open_[room]
            pack = packs.pop()
            if not packs:
                del rooms[place], open_[room]
        else:
            room, pack = max_length, num_packs
            num_packs += 1
        pack_of[sample] = pack
        left = room - size
        if left:
            if left not in open_:
                insort(rooms, left)
                open_[left] = []
            open_[left].append(pack)
    return pack_of


def _pairs(*arrays: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yields the elements as Python numbers, a block at a time: numbers as objects take ten times an array's memory."""
    for start in range(0, len(arrays[0]), _BLOCK):
        yield from zip(*(array[start : start + _BLOCK].tolist() for array in arrays), strict=True)


def _first_fit(sizes: np.ndarray, max_length: int) -> np.ndarray:
    pack_of = np.empty(len(sizes), dtype=np.int64)
    rooms = np.zeros(_OPEN_FIRST_FIT, dtype=np.int64)  # room left in each open pack; 0 where none is open
    packs = np.zeros(_OPEN_FIRST_FIT, dtype=np.int64)
    num_packs = 0
    for sample, (size,) in enumerate(_pairs(sizes)):
        slot = int(np.argmax(rooms >= size))
        if rooms[slot] < size:  # none has room: the fullest is closed for a new one
            slot = int(np.argmin(rooms))
            rooms[slot], packs[slot] = max_length, num_packs
            num_packs += 1
        pack_of[sample] = packs[slot]
        rooms[slot] -= size
    return pack_of


def _stream(sizes: np.ndarray, max_length: int) -> np.ndarray:
    pack_of = np.empty(len(sizes), dtype=np.int64)
    pack, room = 0, max_length
    for sample, (size,) in enumerate(_pairs(sizes)):
        if size > room:
            pack, room = pack + 1, max_length
        pack_of[sample] = pack
        room -= size
    return pack_of
