"""Values of each target token that a linear head gives, without ever holding all logits, and their gradients.

T target tokens, V words, H hidden size. Products with the head (T x V x H each) are what costs:

- values alone: 1 product, the logits;
- gradients of log_prob, log_sum_exp and (without a soft cap) sum_log_probs by a frozen head's input: 2, as for the
  fused cross entropy. With p = softmax(z), row t of `p_t @ weight - weight[y_t]` is the gradient of -log_prob t, made
  on the way; the backward pass scales it by what arrives for log_prob t. The other two are linear in the same row:
  log_sum_exp has `p_t @ weight`, sum_log_probs has `sum_j weight[j] - V p_t @ weight`;
- everything else: the backward pass computes the logits again, once the factors of all gradients are known, and turns
  them into the gradient of all values at once: 3 by the hidden states, 4 by hidden states and head (the fused cross
  entropy: 2 and 3).

Beside the products, log_prob and log_sum_exp read and write the logits as the fused cross entropy does; entropy,
sum_log_probs and the values of the base model read them once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.fused.loss import cap_logits_, slice_tokens_for, target_rows
from xtuner.kernels.cpu_gemm import product, sum_of_products
from xtuner.kernels.dispatch import kernels_for
from xtuner.kernels.reference_softmax import SOFTMAX_SUMS

VALUES = ('log_prob', 'log_sum_exp', 'entropy', 'sum_log_probs', 'kl_to_base', 'base_log_prob')
"""What can be asked for of each target; see `reference_softmax.softmax_sums`."""
BASE_VALUES = ('kl_to_base', 'base_log_prob')
"""Those that need the base model's hidden states too."""


@dataclass(frozen=True)
class _Request:
    """What is asked for: names of `VALUES`, those of them that carry no gradient, and how logits are made."""

    values: tuple[str, ...]
    no_grad: tuple[str, ...]
    slice_tokens: int
    cap: float | None

    @property
    def linear(self) -> bool:
        """Whether the gradients by the hidden states follow from that of log_prob."""
        shared = ('log_prob', 'log_sum_exp', *(('sum_log_probs',) if self.cap is None else ()))
        return all(name in shared or name in self.no_grad for name in self.values)

    @property
    def over_vocabulary(self) -> bool:
        """Whether a value is asked for that takes another pass over the logits."""
        return 'entropy' in self.values or 'sum_log_probs' in self.values


def fused_target_values(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    values: Sequence[str],
    *,
    no_grad: Sequence[str] = (),
    rows: Tensor | None = None,
    base_hidden_TH: Tensor | None = None,
    slice_tokens: int | None = None,
    cap: float | None = None,
) -> dict[str, Tensor]:
    """The values asked for of each target, from logits z = cap(hidden @ weight.T + bias).

    Args:
        hidden_NH: Last hidden states, already in the dtype to multiply in.
        weight_VH: The head's weight; multiplied in the dtype of `hidden`.
        bias_V: The head's bias, or None.
        labels_N: int64, already shifted; -100 is left out.
        values: Names from `VALUES`.
        no_grad: Those of them that carry no gradient; they cost no product.
        rows: `target_rows(labels_N)` if already known.
        base_hidden_TH: Last hidden states of the base model at the targets, for `BASE_VALUES`; one more product.
        slice_tokens: Tokens whose logits are held at once; by default as many as fit 256 MiB.
        cap: Logits x become `cap * tanh(x / cap)` first; None: they stay.

    Returns:
        By name, float32 (T,) (float64 for float64 inputs).
    """
    rows = target_rows(labels_N) if rows is None else rows
    if slice_tokens is None:
        slice_tokens = slice_tokens_for(weight_VH.shape[0], hidden_NH.element_size())
    request = _Request(tuple(values), (*no_grad, 'base_log_prob'), slice_tokens, cap)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        found = _TargetValues.apply(hidden_NH, weight_VH, bias_V, labels_N, rows, base_hidden_TH, request)
    return dict(zip(request.values, found, strict=True))


class _TargetValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        base_hidden: Tensor | None,
        request: _Request,
    ) -> tuple[Tensor, ...]:
        """The values; where gradients follow from that of log_prob, that gradient too, slice by slice."""
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        needed = any(name not in request.no_grad for name in request.values)
        made = needed and need_hidden and not need_weight and not need_bias and request.linear
        chosen, targets = hidden.detach()[rows], labels[rows]
        kernels, head = kernels_for(hidden.device), _Head(weight, bias, hidden.dtype, request)
        sums = torch.zeros(len(SOFTMAX_SUMS), len(rows), dtype=_wide(hidden), device=hidden.device)
        gradient = torch.empty_like(chosen) if made else None
        slopes = torch.ones_like(sums[0])
        for part, logits, slope, base in head.slices(chosen, base_hidden):
            chosen_logits = logits.gather(1, targets[part, None])[:, 0]
            if gradient is not None and base is None and not request.over_vocabulary:
                loss = kernels.cross_entropy_(logits, targets[part])
                sums[0, part], sums[1, part] = -loss, loss + chosen_logits
            else:
                of_part = kernels.softmax_sums(logits, targets[part], base, over_vocabulary=request.over_vocabulary)
                sums[:, part] = of_part
                if gradient is not None:
                    kernels.softmax_gradient_(logits, targets[part], of_part, _factors({'log_prob': -1.0}, of_part, 0))
            if gradient is not None:
                if slope is not None:
                    logits *= slope
                    slopes[part] = slope.gather(1, targets[part, None])[:, 0].to(slopes)
                product(logits, head.weight, out=gradient[part])
        ctx.request, ctx.made, ctx.num_tokens = request, made, len(hidden)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        kept = None if not needed else gradient if made else chosen
        ctx.save_for_backward(kept, weight, bias, targets, rows, base_hidden, sums, slopes)
        ctx.set_materialize_grads(False)
        found = tuple(sums[SOFTMAX_SUMS.index(name)].clone() for name in request.values)
        fixed = [value for name, value in zip(request.values, found, strict=True) if name in request.no_grad]
        ctx.mark_non_differentiable(*fixed)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all values, from the rows made in the forward pass or from the logits again."""
        arrived = {name: grad for name, grad in zip(ctx.request.values, grads, strict=True) if grad is not None}
        if not arrived:
            return (None,) * 7
        rows = ctx.saved_tensors[4]
        by_hidden, by_weight, by_bias = (_scaled if ctx.made else _recomputed)(ctx, arrived)
        if by_hidden is not None and len(rows) < ctx.num_tokens:
            by_hidden = by_hidden.new_zeros(ctx.num_tokens, by_hidden.shape[1]).index_copy_(0, rows, by_hidden)
        return by_hidden, by_weight, by_bias, None, None, None, None


class _Head:
    """The head's weight and bias in the dtype to multiply in, and logits a slice of tokens at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, request: _Request) -> None:
        self.weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._request = request

    def slices(
        self, hidden_TH: Tensor, base_hidden_TH: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        """Yields a slice of tokens, its logits, the derivative of their cap, and the base's logits."""
        for start in range(0, len(hidden_TH), self._request.slice_tokens):
            part = slice(start, start + self._request.slice_tokens)
            logits, slope = self._logits(hidden_TH[part])
            yield part, logits, slope, None if base_hidden_TH is None else self._logits(base_hidden_TH[part])[0]

    def _logits(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, cap = product(hidden_TH, self.weight.t(), self._bias), self._request.cap
        return logits, None if cap is None else cap_logits_(logits, cap)


def _factors(arrived: Mapping[str, Any], sums_7T: Tensor, vocabulary: int) -> Tensor:
    """What `softmax_gradient_` multiplies by, (5, T): the sum of the values' gradients by the logits.

    By the logits z, with p = softmax(z), q = softmax(base), 1_y = 1 at the target:

        log_prob        1_y - p                      entropy      -p (log p + entropy)
        log_sum_exp     p                            kl_to_base   p (log p - log q - kl_to_base)
        sum_log_probs   1 - V p

    Args:
        arrived: Gradient by each value that has one, (T,).
        sums_7T: What `softmax_sums` returned.
        vocabulary: V.
    """
    log_prob, log_sum_exp, entropy, sum_log_probs, kl = (arrived.get(name, 0.0) for name in VALUES[:5])
    factors = sums_7T.new_empty(5, sums_7T.shape[1])
    factors[0] = log_prob
    factors[1] = sum_log_probs
    factors[2] = log_sum_exp - log_prob - vocabulary * sum_log_probs - entropy * sums_7T[2] - kl * sums_7T[4]
    factors[3] = kl - entropy
    factors[4] = -kl
    return factors


def _scaled(ctx: Any, arrived: Mapping[str, Tensor]) -> tuple[Tensor, None, None]:
    """Gradient by the hidden states without a product: rows of the gradient of -log_prob, scaled, and of the head.

    With s the derivative of the cap at the target, row t of the gradient of -log_prob is G = P - s w_y, where P is the
    gradient of log_sum_exp; sum_log_probs (without a cap) has `sum_j w_j - V P`.
    """
    gradient, weight, _, targets, _, _, _, slopes = ctx.saved_tensors
    log_prob, log_sum_exp, sum_log_probs = (arrived.get(n) for n in ('log_prob', 'log_sum_exp', 'sum_log_probs'))
    if log_sum_exp is None and sum_log_probs is None:
        assert log_prob is not None
        return gradient * -log_prob[:, None].to(gradient.dtype), None, None
    zeros = torch.zeros_like(slopes)
    of_weight = (zeros if log_sum_exp is None else log_sum_exp).clone()
    total = None
    if sum_log_probs is not None:
        of_weight -= len(weight) * sum_log_probs
        total = weight.sum(0, dtype=slopes.dtype)
    of_gradient = of_weight - (zeros if log_prob is None else log_prob)
    of_weight = of_weight * slopes
    result = torch.empty_like(gradient)
    for start in range(0, len(result), ctx.request.slice_tokens):
        part = slice(start, start + ctx.request.slice_tokens)
        made = gradient[part] * of_gradient[part, None] + weight[targets[part]] * of_weight[part, None]
        if total is not None and sum_log_probs is not None:
            made += total * sum_log_probs[part, None]
        result[part] = made
    return result, None, None


def _recomputed(ctx: Any, arrived: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden states, weight and bias: the logits once more, turned into their gradient in place."""
    hidden, weight, bias, targets, _, base_hidden, sums, _ = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    head = _Head(weight, bias, hidden.dtype, ctx.request)
    factors = _factors(arrived, sums, len(weight))
    # Gradients carry 1 / (targets of the step): half precision keeps more of them without it.
    scale = factors.abs().amax().clamp_min(1e-30) if factors.numel() else factors.new_ones(())
    factors = factors / scale
    kernels = kernels_for(hidden.device)
    by_hidden = torch.empty_like(hidden) if need_hidden else None
    by_weight = torch.zeros(weight.shape, dtype=sums.dtype, device=weight.device) if need_weight else None
    by_bias = torch.zeros(len(weight), dtype=sums.dtype, device=weight.device) if need_bias else None
    for part, logits, slope, base in head.slices(hidden, base_hidden):
        kernels.softmax_gradient_(
            logits, targets[part], sums[:, part].contiguous(), factors[:, part].contiguous(), base
        )
        if slope is not None:
            logits *= slope
        if by_hidden is not None:
            product(logits, head.weight, out=by_hidden[part])
        if by_weight is not None:
            by_weight += sum_of_products(logits, hidden[part])
        if by_bias is not None:
            by_bias += logits.sum(0, dtype=sums.dtype)
    return (
        None if by_hidden is None else by_hidden * scale.to(by_hidden.dtype),
        None if by_weight is None else (by_weight * scale).to(ctx.dtypes[0]),
        None if by_bias is None else (by_bias * scale).to(ctx.dtypes[1]),
    )


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
