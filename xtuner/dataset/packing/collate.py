"""Items -> batches: rows of one length, whose positions start again at 0 with every sample.

row          sample A        sample B     padding        A, B and the padding are three samples
input_ids    a0 a1 a2 a3     b0 b1 b2     p  p           to the model: equal positions or a step back
labels       -  -  a2 a3     -  -  b2     -  -           begin a new one, and none sees another
positions    0  1  2  3      0  1  2      0  1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX


def collate(items: Sequence[Mapping[str, Any]], *, pad_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Joins items of a prepared data set into a batch.

    Args:
        items: Dicts of `input_ids`, `labels` and `position_ids`, each int64 `(S_i,)`, as numpy arrays or tensors.
        pad_id: What `input_ids` are filled up with; any id will do, since nothing looks at padding.
        multiple_of: Rows are filled up to a multiple of this many tokens.

    Returns:
        `input_ids`, `labels` and `position_ids`, each int64 `(B, S)`. Padding is a sample of its own without targets.
    """
    longest = max(len(item['input_ids']) for item in items)
    size = -(-longest // multiple_of) * multiple_of
    batch = {
        'input_ids': torch.full((len(items), size), pad_id, dtype=torch.int64),
        'labels': torch.full((len(items), size), IGNORE_INDEX, dtype=torch.int64),
        'position_ids': torch.arange(size, dtype=torch.int64).repeat(len(items), 1),
    }
    for row, item in enumerate(items):
        length = len(item['input_ids'])
        for name, tensor in batch.items():
            tensor[row, :length] = torch.as_tensor(item[name])
        batch['position_ids'][row, length:] -= length
    return batch


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """How many labels the loss counts, int64 scalar.

    Args:
        labels: int64 `(B, S)`; the first of a row has nothing before it and never counts.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()
