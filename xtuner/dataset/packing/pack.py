"""Packing: groups samples into packs of at most `max_length` tokens, without cutting or dropping any.

lengths   7 3 5 2 8 4      max_length 10
best fit  [8 2] [7 3] [5 4]                  3 packs, 97 % full
stream    [7 3] [5 2] [8] [4]                in data order
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtuner.errors import DataError, nearest

PACKINGS = ('best_fit', 'first_fit', 'stream', 'none')
_BLOCK = 2**16  # samples
_OPEN_FIRST_FIT = 256  # packs that first fit keeps open; more would be slower and hardly fuller


@dataclass(frozen=True)
class Packs:
    """Assignment of samples to packs.

    Attributes:
        samples: int64 `(N,)`: sample numbers in pack order.
        starts: int64 `(P + 1,)`: the index in `samples` at which each pack begins; the last entry is N.
    """

    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the sample numbers of pack `index`."""
        return self.samples[self.starts[index] : self.starts[index + 1]]

    def lengths(self, sample_lengths: np.ndarray) -> np.ndarray:
        """Returns the length of each pack in tokens, int64 `(P,)`."""
        ends = np.concatenate([[0], np.cumsum(sample_lengths[self.samples])])
        return np.diff(ends[self.starts])


def pack_samples(lengths: Sequence[int] | np.ndarray, max_length: int, *, packing: str = 'best_fit') -> Packs:
    """Assigns samples to packs; deterministic.

    Args:
        lengths: Tokens of each sample, each from 1 to `max_length`.
        max_length: Maximum tokens per pack.
        packing: 'best_fit' takes the longest samples first and puts each into the fullest pack that fits it;
            'first_fit' goes in data order and puts each into the first open pack that fits it; 'stream' fills one pack
            after another in data order; 'none' gives each sample its own pack.

    Raises:
        DataError: For a sample that is empty or longer than `max_length`, or an unknown packing.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.max() > max_length or sizes.min() < 1):
        wrong = int(np.flatnonzero((sizes > max_length) | (sizes < 1))[0])
        raise DataError(f'sample {wrong} has {sizes[wrong]} tokens; a pack holds 1 to {max_length}')
    if packing == 'none':
        return Packs(np.arange(len(sizes)), np.arange(len(sizes) + 1))
    if packing not in PACKINGS:
        raise DataError(f'`dataset.packing` is {packing!r}{nearest(packing, PACKINGS)}; known: {", ".join(PACKINGS)}')
    max_length = min(max_length, int(sizes.sum()))  # bounds the size of the packers' arrays
    fit = {'best_fit': _best_fit, 'first_fit': _first_fit, 'stream': _stream}[packing]
    pack_of = fit(sizes, max_length)
    samples = np.argsort(pack_of, kind='stable')
    counts = np.bincount(pack_of, minlength=int(pack_of.max()) + 1 if len(sizes) else 0)
    return Packs(samples, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _best_fit(sizes: np.ndarray, max_length: int) -> np.ndarray:
    """Returns each sample's pack; the free space of open packs is kept sorted, so bisection finds the best fit."""
    # Samples of equal length are shuffled first, since neighbours in a file are often alike.
    shuffled = np.random.default_rng(0).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind='stable')]
    pack_of = np.empty(len(sizes), dtype=np.int64)
    free: list[int] = []  # distinct amounts of free space of open packs, in tokens, sorted
    open_: dict[int, list[int]] = {}  # the open packs with each amount
    num_packs = 0
    for sample, size in _pairs(order, sizes[order]):
        index = bisect_left(free, size)
        if index < len(free):
            space = free[index]
            packs = open_[space]
            pack = packs.pop()
            if not packs:
                del free[index], open_[space]
        else:
            space, pack = max_length, num_packs
            num_packs += 1
        pack_of[sample] = pack
        left = space - size
        if left:
            if left not in open_:
                insort(free, left)
                open_[left] = []
            open_[left].append(pack)
    return pack_of


def _pairs(*arrays: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yields the elements as Python ints, block by block: a list of ints takes ten times the memory of an array."""
    for start in range(0, len(arrays[0]), _BLOCK):
        yield from zip(*(array[start : start + _BLOCK].tolist() for array in arrays), strict=True)


def _first_fit(sizes: np.ndarray, max_length: int) -> np.ndarray:
    pack_of = np.empty(len(sizes), dtype=np.int64)
    free = np.zeros(_OPEN_FIRST_FIT, dtype=np.int64)  # free space of each open pack in tokens; 0 if none is open
    packs = np.zeros(_OPEN_FIRST_FIT, dtype=np.int64)
    num_packs = 0
    for sample, (size,) in enumerate(_pairs(sizes)):
        slot = int(np.argmax(free >= size))
        if free[slot] < size:  # fits nowhere: close the fullest pack and open a new one
            slot = int(np.argmin(free))
            free[slot], packs[slot] = max_length, num_packs
            num_packs += 1
        pack_of[sample] = packs[slot]
        free[slot] -= size
    return pack_of


def _stream(sizes: np.ndarray, max_length: int) -> np.ndarray:
    pack_of = np.empty(len(sizes), dtype=np.int64)
    pack, free = 0, max_length
    for sample, (size,) in enumerate(_pairs(sizes)):
        if size > free:
            pack, free = pack + 1, max_length
        pack_of[sample] = pack
        free -= size
    return pack_of
