"""Splits conversations into training and validation parts and applies source weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.errors import DataError

_MAX_SAMPLES = 2**30  # 8 GiB of numbers


def content_hash(sample: Sample) -> int:
    """Returns a 64-bit hash of the sample's ids."""
    return int.from_bytes(hashlib.blake2b(sample.input_ids.tobytes(), digest_size=8).digest(), 'little')


def split_samples(
    bounds: Sequence[int], *, weights: Sequence[float], hashes: Sequence[int] | np.ndarray, val_ratio: float
) -> dict[str, np.ndarray]:
    """Selects the samples of both parts; deterministic.

    The validation part is selected by content: equal conversations are either all in it or none is, so that no
    validated conversation was trained.

    Args:
        bounds: The first sample of each source, and finally the number of samples.
        weights: Weight of each source in training: 0.5 takes half of its samples, 2 takes each twice.
        hashes: The samples' content hashes; unused if `val_ratio` is 0.
        val_ratio: Share of distinct conversations to hold out for validation; at least one if it is above 0.

    Returns:
        `train` and `val`: int64 sample numbers; those of weighted sources may repeat.

    Raises:
        DataError: One of the parts would be empty, or the weights ask for more than `2**30` conversations.
    """
    held_out = np.zeros(bounds[-1], dtype=bool)
    if val_ratio:
        values = np.array(hashes, dtype=np.uint64)
        unique = np.unique(values)
        count = max(1, round(val_ratio * len(unique)))
        if count >= len(unique):
            raise DataError(f'`dataset.val_ratio` {val_ratio:g} of {len(unique)} distinct conversations leaves none '
                            'to train; lower it, or use `val_file`')  # fmt: skip
        held_out = np.isin(values, unique[:count])
    total = sum((end - start) * weight for (start, end), weight in zip(pairwise(bounds), weights, strict=True))
    if total > _MAX_SAMPLES:
        raise DataError(f'the weights of `dataset.source` ask for {total:,.0f} conversations; the maximum is '
                        f'{_MAX_SAMPLES:,}; lower them')  # fmt: skip
    train = []
    for index, ((start, end), weight) in enumerate(zip(pairwise(bounds), weights, strict=True)):
        train.append(_weighted(np.flatnonzero(~held_out[start:end]) + start, weight, index))
    return {'train': np.concatenate(train), 'val': np.flatnonzero(held_out)}


def _weighted(numbers: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Repeats the samples by the integer part of the weight and draws its fraction without replacement."""
    whole = int(weight)
    rest = round((weight - whole) * len(numbers))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(numbers))[:rest])
    return np.concatenate([np.tile(numbers, whole), numbers[drawn]])
