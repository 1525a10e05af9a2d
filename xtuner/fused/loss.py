"""Cross entropy of a linear head that never holds all logits: N tokens, V words, H hidden size.

A slice of tokens at a time gets its logits, turns them into their own gradient in place and multiplies that by the
head's weight; what stays is the hidden states' gradient. Tokens without a target are left out of every product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.kernels.cpu_gemm import product, sum_of_products
from xtuner.kernels.dispatch import kernels_for

_LOGITS_BYTES = 2**28


def target_rows(labels_N: Tensor) -> Tensor:
    """The positions that have a target, int64.

    On a GPU this waits for the labels; computed before the forward pass and handed to `fused_linear_cross_entropy`, it
    spares a wait in the middle of the step.
    """
    return (labels_N != IGNORE_INDEX).nonzero().squeeze(1)


def slice_tokens_for(vocabulary: int, item_bytes: int) -> int:
    """How many tokens' logits, of `item_bytes` each, are held at once: as many as fit 256 MiB, in steps of 128."""
    return max(128, min(4096, _LOGITS_BYTES // (vocabulary * item_bytes) // 128 * 128))


def fused_linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    rows: Tensor | None = None,
    slice_tokens: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Sums `-log softmax(hidden @ weight.T + bias)[label]` over the targets.

    Args:
        hidden_NH: Last hidden states, already in the dtype to multiply in.
        weight_VH: The head's weight; multiplied in the dtype of `hidden`.
        bias_V: The head's bias, or None.
        labels_N: int64, already shifted; -100 is left out.
        rows: `target_rows(labels_N)` if already known.
        slice_tokens: Tokens whose logits are held at once; by default as many as fit 256 MiB.
        cap: Logits x become `cap * tanh(x / cap)` first; None: they stay.

    Returns:
        float32 scalar (float64 for float64 inputs); 0, with zero gradients, where there is no target.

    Example:
        labels [-100, 3, 5] sum two terms: those of hidden[1] with word 3 and of hidden[2] with word 5.

    """
    rows = target_rows(labels_N) if rows is None else rows
    if slice_tokens is None:
        slice_tokens = slice_tokens_for(weight_VH.shape[0], hidden_NH.element_size())
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden_NH, weight_VH, bias_V, labels_N, rows, slice_tokens, cap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        slice_tokens: int,
        cap: float | None,
    ) -> Tensor:
        """The summed loss; gradients of what needs them are made on the way, slice by slice."""
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        everything = len(rows) == len(labels)
        chosen, targets = (hidden, labels) if everything else (hidden[rows], labels[rows])
        head = weight.detach().to(hidden.dtype)
        offset = None if bias is None else bias.detach().to(hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(chosen) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        dbias = torch.zeros(head.shape[0], dtype=wide, device=weight.device) if need_bias else None
        entropy = kernels_for(hidden.device).cross_entropy_
        for start in range(0, len(chosen), slice_tokens):
            part = slice(start, start + slice_tokens)
            x = chosen[part]
            logits = product(x, head.t(), offset)
            slope = None if cap is None else cap_logits_(logits, cap)
            total += entropy(logits, targets[part]).sum()
            if slope is not None:
                logits *= slope
            if dhidden is not None:
                product(logits, head, out=dhidden[part])
            if dweight is not None:
                dweight += sum_of_products(logits, x)
            if dbias is not None:
                dbias += logits.sum(0, dtype=wide)
        if dhidden is not None and not everything:
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden)
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that the forward pass made, times the incoming one."""
        dhidden, dweight, dbias = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * grad.to(dhidden.dtype),
            None if dweight is None else (dweight * grad).to(ctx.dtypes[0]),
            None if dbias is None else (dbias * grad).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def cap_logits_(logits: Tensor, cap: float) -> Tensor:
    """Turns logits x into `cap * tanh(x / cap)` in place; returns the derivative."""
    logits.div_(cap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(cap)
    return slope
