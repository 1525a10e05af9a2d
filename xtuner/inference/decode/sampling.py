"""The next token: the likeliest, or one drawn; the same draws as transformers' `generate` for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor


def next_token(logits_1V: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Chooses a token.

    Args:
        logits_1V: (1, V), any float dtype.
        temperature: 0 takes the likeliest token.
        top_p: Draws from the smallest set of likeliest tokens that has this share of the probability.

    Returns:
        int64 (1,). Nothing here waits for a GPU.
    """
    logits = logits_1V if logits_1V.dtype == torch.float64 else logits_1V.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        logits = _nucleus(logits, top_p)
    shares = torch.softmax(logits, -1)
    # torch.multinomial draws one sample in this way too, but waits for a GPU to check its input.
    return shares.div_(torch.empty_like(shares).exponential_()).argmax(-1)


def _nucleus(logits_1V: Tensor, top_p: float) -> Tensor:
    """Takes away the least likely tokens whose shares together are at most `1 - top_p`; the likeliest stays."""
    ascending, order = logits_1V.sort(descending=False)
    away = ascending.softmax(-1).cumsum(-1) <= (1 - top_p)
    away[..., -1:] = False
    return logits_1V.masked_fill(away.scatter(1, order, away), -torch.inf)
