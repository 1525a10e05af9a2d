"""What an output head makes of last hidden states: the loss of supervised fine-tuning, and values of each target.

A plain linear head goes through the fused functions, which never hold all logits. A head that is quantised, carries an
adapter or is put together by DeepSpeed is called as it is, and all logits of the targets are held at once.

N positions, T targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.errors import ConfigError
from xtuner.fused.loss import fused_linear_cross_entropy, target_rows
from xtuner.fused.target_values import fused_target_values
from xtuner.model.logits import LogitRule

_PLAIN = LogitRule()


def next_token_loss(
    hidden_NH: Tensor, head: Any, targets_N: Tensor, *, rows: Tensor | None = None, rule: LogitRule = _PLAIN
) -> Tensor:
    """Sum over targets of `-log softmax(rule(head(hidden)))[target]`, computed for the target positions only.

    Args:
        hidden_NH: Last hidden states, any float dtype.
        head: The output projection, H to V.
        targets_N: int64; -100 is left out.
        rows: Positions of the targets, where they are known already.
        rule: What comes behind the head.

    Returns:
        float32 scalar.
    """
    if is_plain(head):
        hidden_NH, weight, bias = _factors(hidden_NH, head, rule)
        return fused_linear_cross_entropy(hidden_NH, weight, bias, targets_N, rows=rows, cap=rule.cap)
    kept = target_rows(targets_N) if rows is None else rows
    logits = rule.apply(head(hidden_NH[kept]).float())
    return functional.cross_entropy(logits, targets_N[kept], reduction='sum')


def target_values(
    hidden_NH: Tensor,
    head: Any,
    targets_N: Tensor,
    values: Sequence[str],
    *,
    rows: Tensor,
    rule: LogitRule = _PLAIN,
    no_grad: Sequence[str] = (),
    base_hidden_TH: Tensor | None = None,
    base_logits_TV: Tensor | None = None,
) -> dict[str, Tensor]:
    """Values of each target: see `fused.target_values`.

    Args:
        hidden_NH: Last hidden states, any float dtype.
        head: The output projection, H to V.
        targets_N: int64; -100 is left out.
        values: Names from `fused.target_values.VALUES`.
        rows: Positions of the targets.
        rule: What comes behind the head.
        no_grad: Those of `values` that carry no gradient.
        base_hidden_TH: Hidden states of the base model at the targets, for a plain head.
        base_logits_TV: The base model's logits at the targets, for any other head.

    Raises:
        ConfigError: values of the base are asked for, and the head, which both would share, is trained.
    """
    if not is_plain(head):
        logits = rule.apply(head(hidden_NH[rows]).float())
        return values_of_logits(logits, targets_N[rows], values, no_grad=no_grad, base_TV=base_logits_TV)
    if base_hidden_TH is not None and head.weight.requires_grad:
        raise ConfigError('the objective compares with the base model, whose output head is trained in place; train it '
                          'through `adapter.modules_to_save`')  # fmt: skip
    if base_hidden_TH is not None:
        base_hidden_TH = _scaled(base_hidden_TH, rule)
    hidden_NH, weight, bias = _factors(hidden_NH, head, rule)
    return fused_target_values(hidden_NH, weight, bias, targets_N, values, no_grad=no_grad, rows=rows,
                               base_hidden_TH=base_hidden_TH, cap=rule.cap)  # fmt: skip


def values_of_logits(
    logits_TV: Tensor,
    targets_T: Tensor,
    values: Sequence[str],
    *,
    no_grad: Sequence[str] = (),
    base_TV: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same values from logits that are there, by their definitions and autograd."""
    column = targets_T[:, None]
    log_p = logits_TV.log_softmax(-1)
    found: dict[str, Tensor] = {}
    log_q = None if base_TV is None else base_TV.detach().log_softmax(-1)
    for name in values:
        with torch.set_grad_enabled(torch.is_grad_enabled() and name not in no_grad):
            if name == 'log_prob':
                found[name] = log_p.gather(1, column)[:, 0]
            elif name == 'log_sum_exp':
                found[name] = logits_TV.logsumexp(-1)
            elif name == 'entropy':
                found[name] = -(log_p.exp() * log_p).sum(-1)
            elif name == 'sum_log_probs':
                found[name] = log_p.sum(-1)
            elif name == 'kl_to_base' and log_q is not None:
                found[name] = (log_p.exp() * (log_p - log_q)).sum(-1)
            elif name == 'base_log_prob' and log_q is not None:
                found[name] = log_q.gather(1, column)[:, 0]
    return found


def is_plain(head: Any) -> bool:
    """Whether a head's output is `x W' + b` and its weight is here, or can be put together (see `_whole`)."""
    return getattr(type(head), 'forward', None) is nn.Linear.forward and not hasattr(head.weight, 'ds_id')


def _factors(hidden: Tensor, head: Any, rule: LogitRule) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the fused functions multiply: hidden states in the dtype to multiply in, the head's weight and bias."""
    # Put together for this call alone: gradients by the hidden states are computed here and now, too.
    weight, bias = _whole(head.weight), _whole(head.bias)
    if rule.scale != 1 and bias is not None:
        bias = bias * rule.scale
    return _scaled(hidden, rule), weight, bias


def _scaled(hidden: Tensor, rule: LogitRule) -> Tensor:
    """Hidden states times the rule's scale, in the dtype to multiply in."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return (hidden if rule.scale == 1 else hidden * rule.scale).to(dtype)


def _whole(parameter: Any) -> Any:
    """A parameter that `fully_shard` has spread, put together.

    Not by its module's `unshard`, which holds it twice for a moment: as it arrives and as it will lie. With 100,000
    words that was the peak of a whole step.
    """
    return parameter.full_tensor() if hasattr(parameter, 'full_tensor') else parameter
