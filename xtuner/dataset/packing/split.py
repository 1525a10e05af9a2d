"""Which conversations are trained, how often, and which are kept for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.errors import DataError

_MOST_SAMPLES = 2**30  # 8 GiB of numbers


def content_hash(sample: Sample) -> int:
    """Returns a hash of 64 bits of the sample's ids."""
    return int.from_bytes(hashlib.blake2b(sample.input_ids.tobytes(), digest_size=8).digest(), 'little')


def split_samples(
    bounds: Sequence[int], *, weights: Sequence[float], hashes: Sequence[int] | np.ndarray, val_ratio: float
) -> dict[str, np.ndarray]:
    """Chooses the samples of both parts; the same input gives the same choice.

    The validation part is chosen by content: of two equal conversations, both are in it or none is, so that nothing
    that is validated was trained.

    Args:
        bounds: Where each source's samples begin, and at last how many there are.
        weights: How often each source counts in training: 0.5 takes half of its samples, 2 takes each twice.
        hashes: The samples' content hashes; not looked at where `val_ratio` is 0.
        val_ratio: The share of different conversations to keep for validation; at least one where it is above 0.

    Returns:
        `train` and `val`: sample numbers, int64; those of weighted sources may occur several times.

    Raises:
        DataError: Where one of the parts would be empty, or weights ask for more than `2**30` conversations.
    """
    kept_out = np.zeros(bounds[-1], dtype=bool)
    if val_ratio:
        values = np.array(hashes, dtype=np.uint64)
        unique = np.unique(values)
        count = max(1, round(val_ratio * len(unique)))
        if count >= len(unique):
            raise DataError(f'`dataset.val_ratio` {val_ratio:g} of {len(unique)} different conversations leaves none '
                            'to train; lower it, or use `val_file`')  # fmt: skip
        kept_out = np.isin(values, unique[:count])
    wanted = sum((end - start) * weight for (start, end), weight in zip(pairwise(bounds), weights, strict=True))
    if wanted > _MOST_SAMPLES:
        raise DataError(f'the weights of `dataset.source` ask for {wanted:,.0f} conversations, and a data set may have '
                        f'{_MOST_SAMPLES:,}; lower them')  # fmt: skip
    train = []
    for index, ((start, end), weight) in enumerate(zip(pairwise(bounds), weights, strict=True)):
        train.append(_weighted(np.flatnonzero(~kept_out[start:end]) + start, weight, index))
    return {'train': np.concatenate(train), 'val': np.flatnonzero(kept_out)}


def _weighted(numbers: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Repeats the samples as often as the weight's whole part says, and draws its fraction without replacement."""
    whole = int(weight)
    rest = round((weight - whole) * len(numbers))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(numbers))[:rest])
    return np.concatenate([np.tile(numbers, whole), numbers[drawn]])
