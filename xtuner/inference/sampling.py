"""Samples the next token of many answers at once, each with its own settings.

Every answer has its own random number generator, so that it does not depend on the other answers in the batch.

Shape letters: B answers, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from xtuner.inference.generate import Sampling

_NUM_CANDIDATES = 256  # most probable tokens that are tried first


@torch.inference_mode()
def sample_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], randoms: Sequence[Random]) -> list[int | None]:
    """Samples the next token of each answer; None if its logits contain NaN or infinity.

    At temperature 0, the most probable token. Otherwise tokens are sorted by probability and truncated where the
    cumulative probability reaches `top_p`, including the token that reaches it; a uniform random number from [0, their
    sum) selects one of them.

    Args:
        logits_BV: float32.
        samplings: One per answer.
        randoms: One per answer; one number is drawn from each whose temperature is not 0.
    """
    largest, tokens = logits_BV.max(-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if rows:
        device = logits_BV.device
        drawn = logits_BV[rows] if len(rows) < len(samplings) else logits_BV
        settings = [(samplings[r].temperature, samplings[r].top_p, randoms[r].random()) for r in rows]
        temperature, top_p, number = torch.tensor(settings, dtype=torch.float64, device=device).T[..., None]
        # Subtract the maximum first, so that a tiny temperature does not overflow.
        scaled = (drawn - drawn.amax(-1, keepdim=True)) / temperature.float().clamp(min=1e-6)
        probabilities, order = _most_probable(scaled.softmax(-1), top_p)
        cumulative = probabilities.double().cumsum(-1)
        kept = (cumulative - probabilities < top_p) | (top_p >= 1)
        kept[:, 0] = True
        total = (probabilities * kept).double().sum(-1, keepdim=True)
        index = torch.searchsorted(cumulative, number * total, right=True)
        index = index.clamp(max=kept.sum(-1, keepdim=True) - 1)  # rounding must not select a removed token
        tokens[rows] = order.gather(-1, index)[:, 0]
    found = torch.where(largest.isfinite(), tokens, -1).tolist()  # `max` returns NaN if there is one
    return [None if token < 0 else token for token in found]


def _most_probable(probabilities_BV: Tensor, top_p_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens sorted by probability: only a few hundred if they reach `top_p`, which is much faster than sorting all."""
    if probabilities_BV.shape[1] > 2 * _NUM_CANDIDATES:
        probabilities, order = probabilities_BV.topk(_NUM_CANDIDATES, sorted=True)
        if bool((probabilities.double().sum(-1, keepdim=True) >= top_p_B1).all()):
            return probabilities, order
    return probabilities_BV.sort(-1, descending=True)
