"""Conversations longer than `max_length`: raise, drop or truncate."""

from __future__ import annotations

import numpy as np

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX, Sample
from xtuner.errors import DataError

ON_LONG = ('error', 'drop', 'truncate', 'truncate_left')


def fit_length(
    sample: Sample, max_length: int, *, on_long: str, origin: str = '', begin_id: int | None = None
) -> Sample | None:
    """Returns the sample, truncated if it is longer than `max_length`, or None if it is to be dropped.

    Args:
        sample: The conversation as tokens.
        max_length: Maximum number of tokens.
        on_long: 'error', 'drop', 'truncate' (cuts the end, including the end token of the answer that is cut) or
            'truncate_left' (cuts the beginning).
        origin: Where the conversation came from, for the error.
        begin_id: The id that begins every conversation; `truncate_left` keeps it at the front.

    Raises:
        DataError: For a long sample under 'error'.
    """
    length = len(sample.input_ids)
    if length <= max_length:
        return sample
    if on_long == 'error':
        raise DataError(f'{origin}: the conversation has {length} tokens, `dataset.max_length` is {max_length}; raise '
                        "it, or set `dataset.on_long` to 'drop', 'truncate' or 'truncate_left'")  # fmt: skip
    if on_long == 'drop':
        return None
    if on_long == 'truncate':
        return Sample(sample.input_ids[:max_length].copy(), sample.labels[:max_length].copy())
    ids, labels = sample.input_ids[-max_length:].copy(), sample.labels[-max_length:].copy()
    if begin_id is not None and sample.input_ids[0] == begin_id:
        ids[0] = begin_id
    labels[0] = IGNORE_INDEX
    return Sample(ids, labels)


def num_targets(sample: Sample) -> int:
    """Returns the number of trained tokens in the sample."""
    return int(np.count_nonzero(sample.labels != IGNORE_INDEX))
