"""Drawing the next token of many answers at once, each in its own way.

Every answer draws its numbers from a generator of its own, so what it says does not depend on who is served beside it.

Letters of shapes: B answers, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from xtuner.inference.generate import Sampling

_NUM_CANDIDATES = 256  # words looked at first


@torch.inference_mode()
def sample_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], randoms: Sequence[Random]) -> list[int | None]:
    """The next token of each answer; None where its logits hold NaN or infinity.

    At temperature 0 the likeliest. Otherwise words are ordered by probability and cut where the share `top_p` is
    reached, the word that reaches it included; a number drawn evenly from [0, their sum) falls on one of them.

    Args:
        logits_BV: float32.
        samplings: One an answer.
        randoms: Likewise; one number is taken from each whose temperature is not 0.
    """
    largest, tokens = logits_BV.max(-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if rows:
        device = logits_BV.device
        drawn = logits_BV[rows] if len(rows) < len(samplings) else logits_BV
        settings = [(samplings[r].temperature, samplings[r].top_p, randoms[r].random()) for r in rows]
        temperature, top_p, number = torch.tensor(settings, dtype=torch.float64, device=device).T[..., None]
        # Less the greatest first: a tiny temperature must not reach infinity.
        scaled = (drawn - drawn.amax(-1, keepdim=True)) / temperature.float().clamp(min=1e-6)
        probabilities, order = _most_probable(scaled.softmax(-1), top_p)
        cumulative = probabilities.double().cumsum(-1)
        kept = (cumulative - probabilities < top_p) | (top_p >= 1)
        kept[:, 0] = True
        total = (probabilities * kept).double().sum(-1, keepdim=True)
        index = torch.searchsorted(cumulative, number * total, right=True)
        index = index.clamp(max=kept.sum(-1, keepdim=True) - 1)  # rounding must not leave the words that are kept
        tokens[rows] = order.gather(-1, index)[:, 0]
    found = torch.where(largest.isfinite(), tokens, -1).tolist()  # NaN is the largest of all
    return [None if token < 0 else token for token in found]


def _most_probable(probabilities_BV: Tensor, top_p_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The words by probability, as many as are needed: a few hundred nearly always, and they are found much sooner."""
    if probabilities_BV.shape[1] > 2 * _NUM_CANDIDATES:
        probabilities, order = probabilities_BV.topk(_NUM_CANDIDATES, sorted=True)
        if bool((probabilities.double().sum(-1, keepdim=True) >= top_p_B1).all()):
            return probabilities, order
    return probabilities_BV.sort(-1, descending=True)
