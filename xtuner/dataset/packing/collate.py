"""Collates items into batches of equal row length; positions restart at 0 with every sample.

row          sample A        sample B     padding        A, B and the padding are three samples:
input_ids    a0 a1 a2 a3     b0 b1 b2     p  p           a position that does not increase begins
labels       -  -  a2 a3     -  -  b2     -  -           a new sample for the model, and samples
positions    0  1  2  3      0  1  2      0  1           never attend to each other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX


def collate(items: Sequence[Mapping[str, Any]], *, pad_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Collates items of a prepared data set into a batch.

    Args:
        items: Dicts of `input_ids`, `labels` and `position_ids`, each int64 `(S_i,)`, as numpy arrays or tensors.
        pad_id: The id that pads `input_ids`; its value does not matter, since nothing attends to padding.
        multiple_of: Rows are padded to a multiple of this many tokens.

    Returns:
        `input_ids`, `labels` and `position_ids`, each int64 `(B, S)`. Padding is a separate sample without targets.
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
    """Number of labels that count in the loss, int64 scalar.

    Args:
        labels: int64 `(B, S)`; the first label of a row has no preceding token and never counts.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()
