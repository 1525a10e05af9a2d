"""What objectives ask of logits, in plain PyTorch: sums over a row, and the gradient of a weighted sum of them.

T tokens, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.kernels.reference import wide

SOFTMAX_SUMS = ('log_prob', 'log_sum_exp', 'entropy', 'sum_log_probs', 'kl_to_base', 'base_log_prob',
                'base_log_sum_exp')  # fmt: skip
"""The rows of what `softmax_sums` returns."""
_LEAST = -1e4  # of log p in a product with p, which is 0 there: -inf times 0 would be NaN


def softmax_sums(
    logits_TV: Tensor, targets_T: Tensor, base_TV: Tensor | None = None, *, over_vocabulary: bool = True
) -> Tensor:
    """What objectives ask of a row of logits z: p = softmax(z), y its target, q = softmax(base).

    Args:
        logits_TV: Any float dtype; not changed.
        targets_T: int64, all valid.
        base_TV: Logits of the base model for the same rows, or None.
        over_vocabulary: Whether entropy and sum are asked for, which take another pass over the logits.

    Returns:
        (7, T), float32 or wider, in the order of `SOFTMAX_SUMS`: log p_y; log sum_j exp z_j; -sum_j p_j log p_j;
        sum_j log p_j; sum_j p_j log(p_j / q_j); log q_y; log sum_j exp base_j. 0 where not asked for.
    """
    logits = wide(logits_TV)
    sums = logits.new_zeros(len(SOFTMAX_SUMS), len(targets_T))
    column = targets_T[:, None]
    sums[1] = logits.logsumexp(-1)
    sums[0] = logits.gather(1, column)[:, 0] - sums[1]
    if not over_vocabulary and base_TV is None:
        return sums
    log_p = logits - sums[1][:, None]
    sums[3] = log_p.sum(-1)
    p = log_p.clamp_(min=_LEAST).exp()
    if base_TV is not None:
        base = wide(base_TV)
        sums[6] = base.logsumexp(-1)
        log_q = (base - sums[6][:, None]).clamp_(min=_LEAST)
        sums[5] = base.gather(1, column)[:, 0] - sums[6]
        sums[4] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1)
    sums[2] = -p.mul_(log_p).sum(-1)
    return sums


def softmax_gradient_(
    logits_TV: Tensor, targets_T: Tensor, sums_7T: Tensor, factors_5T: Tensor, base_TV: Tensor | None = None
) -> None:
    """Turns logits into the gradient of a weighted sum of what `softmax_sums` returns, in place.

    Entry j becomes `f0 [j = y] + f1 + p_j (f2 + f3 log p_j + f4 log q_j)`: every gradient by the logits has this form.

    Args:
        logits_TV: Any float dtype; afterwards the gradient.
        targets_T: int64, all valid.
        sums_7T: What `softmax_sums` returned.
        factors_5T: f0 to f4 of each row, float32 or wider.
        base_TV: Logits of the base model, where f4 counts.
    """
    logits = wide(logits_TV)  # the logits themselves where they are wide: what can be is done in place
    log_p = logits.sub_(sums_7T[1][:, None])
    if factors_5T[3:].any():
        inner = factors_5T[3][:, None] * log_p.clamp_(min=_LEAST) + factors_5T[2][:, None]
        if base_TV is not None:
            inner += factors_5T[4][:, None] * (wide(base_TV) - sums_7T[6][:, None]).clamp_(min=_LEAST)
    else:
        inner = factors_5T[2][:, None]
    gradient = log_p.exp_().mul_(inner)
    if factors_5T[1].any():
        gradient += factors_5T[1][:, None]
    gradient[torch.arange(len(targets_T), device=targets_T.device), targets_T] += factors_5T[0]
    if gradient is not logits_TV:
        logits_TV.copy_(gradient)
