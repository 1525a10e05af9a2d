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
    if not over_vocabulary and base_TV is None:
        sums[0] = logits.gather(1, column)[:, 0] - sums[1]
        return sums
    log_p = logits - sums[1][:, None]
    p = log_p.exp()
    sums[0], sums[2], sums[3] = log_p.gather(1, column)[:, 0], torch.special.entr(p).sum(-1), log_p.sum(-1)
    if base_TV is not None:
        base = wide(base_TV)
        sums[6] = base.logsumexp(-1)
        log_q = base - sums[6][:, None]
        sums[4] = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
        sums[5] = log_q.gather(1, column)[:, 0]
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
    log_p = wide(logits_TV) - sums_7T[1][:, None]
    p = log_p.exp()
    inner = factors_5T[2][:, None] + factors_5T[3][:, None] * log_p
    if base_TV is not None:
        inner += factors_5T[4][:, None] * (wide(base_TV) - sums_7T[6][:, None])
    gradient = torch.where(p > 0, p * inner, 0) + factors_5T[1][:, None]
    gradient[torch.arange(len(targets_T), device=targets_T.device), targets_T] += factors_5T[0]
    logits_TV.copy_(gradient)
