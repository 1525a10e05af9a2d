"""Chooses the next token, greedily or by sampling; same samples as transformers' `generate` for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(logits_1V: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Chooses a token.

    Args:
        logits_1V: (1, V), any float dtype.
        temperature: 0: greedy.
        top_p: Samples from the smallest set of most probable tokens whose probabilities sum to it.

    Returns:
        int64 (1,). Does not synchronize with the GPU.
    """
    logits = logits_1V if logits_1V.dtype == torch.float64 else logits_1V.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        logits = _filter_top_p(logits, top_p)
    probabilities = torch.softmax(logits, -1)
    # Same as torch.multinomial for one sample, which however synchronizes with the GPU to check its input.
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


def _filter_top_p(logits_1V: Tensor, top_p: float) -> Tensor:
    """Removes the least probable tokens whose probabilities sum to at most `1 - top_p`; keeps the most probable."""
    ascending, order = logits_1V.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= (1 - top_p)
    removed[..., -1:] = False
    return logits_1V.masked_fill(removed.scatter(1, order, removed), -torch.inf)
