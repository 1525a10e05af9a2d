"""Triton kernels for what objectives ask of logits: sums over a row, and the gradient of a weighted sum of them."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtuner.kernels.reference_softmax import SOFTMAX_SUMS
from xtuner.kernels.triton.cross_entropy import launch_size, log_sum_exp


@triton.jit
def _softmax_sums(logits, base, targets, sums, num_rows, vocabulary, row_stride, base_stride,
                  OVER_VOCABULARY: tl.constexpr, WITH_BASE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    target = tl.load(targets + row)
    log_sum = log_sum_exp(z, vocabulary, BLOCK)
    tl.store(sums + row, tl.load(z + target).to(tl.float32) - log_sum)
    tl.store(sums + num_rows + row, log_sum)
    base_log_sum = 0.0
    if WITH_BASE:
        z_base = base + row * base_stride
        base_log_sum = log_sum_exp(z_base, vocabulary, BLOCK)
        tl.store(sums + 5 * num_rows + row, tl.load(z_base + target).to(tl.float32) - base_log_sum)
        tl.store(sums + 6 * num_rows + row, base_log_sum)
    if OVER_VOCABULARY or WITH_BASE:
        entropy = tl.zeros((BLOCK,), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        divergence = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            log_p = tl.load(z + column, mask=inside, other=0.0).to(tl.float32) - log_sum
            p = tl.exp(log_p)
            counted = inside & (p > 0)
            entropy -= tl.where(counted, p * log_p, 0.0)
            total += tl.where(inside, log_p, 0.0)
            if WITH_BASE:
                log_q = tl.load(z_base + column, mask=inside, other=0.0).to(tl.float32) - base_log_sum
                divergence += tl.where(counted, p * (log_p - log_q), 0.0)
        tl.store(sums + 2 * num_rows + row, tl.sum(entropy, axis=0))
        tl.store(sums + 3 * num_rows + row, tl.sum(total, axis=0))
        if WITH_BASE:
            tl.store(sums + 4 * num_rows + row, tl.sum(divergence, axis=0))


@triton.jit
def _softmax_gradient(logits, base, targets, sums, factors, num_rows, vocabulary, row_stride, base_stride,
                      WITH_BASE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * row_stride
    z_base = base + row * base_stride
    target = tl.load(targets + row)
    log_sum = tl.load(sums + num_rows + row)
    base_log_sum = tl.load(sums + 6 * num_rows + row)
    at_target = tl.load(factors + row)
    constant = tl.load(factors + num_rows + row)
    of_p = tl.load(factors + 2 * num_rows + row)
    of_log_p = tl.load(factors + 3 * num_rows + row)
    of_log_q = tl.load(factors + 4 * num_rows + row)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        log_p = tl.load(z + column, mask=inside, other=0.0).to(tl.float32) - log_sum
        p = tl.exp(log_p)
        inner = of_p + of_log_p * log_p
        if WITH_BASE:
            log_q = tl.load(z_base + column, mask=inside, other=0.0).to(tl.float32) - base_log_sum
            inner += of_log_q * log_q
        gradient = tl.where(p > 0, p * inner, 0.0) + constant + tl.where(column == target, at_target, 0.0)
        tl.store(z + column, gradient, mask=inside)


def softmax_sums(
    logits_TV: Tensor, targets_T: Tensor, base_TV: Tensor | None = None, *, over_vocabulary: bool = True
) -> Tensor:
    """See `reference_softmax.softmax_sums`."""
    rows, vocabulary = logits_TV.shape
    sums = torch.zeros(len(SOFTMAX_SUMS), rows, dtype=torch.float32, device=logits_TV.device)
    base = logits_TV if base_TV is None else base_TV
    block, num_warps = launch_size(vocabulary)
    _softmax_sums[(rows,)](
        logits_TV, base, targets_T, sums, rows, vocabulary, logits_TV.stride(0), base.stride(0),
        OVER_VOCABULARY=over_vocabulary, WITH_BASE=base_TV is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return sums


def softmax_gradient_(
    logits_TV: Tensor, targets_T: Tensor, sums_7T: Tensor, factors_5T: Tensor, base_TV: Tensor | None = None
) -> None:
    """See `reference_softmax.softmax_gradient_`."""
    rows, vocabulary = logits_TV.shape
    base = logits_TV if base_TV is None else base_TV
    block, num_warps = launch_size(vocabulary)
    _softmax_gradient[(rows,)](
        logits_TV, base, targets_T, sums_7T, factors_5T, rows, vocabulary, logits_TV.stride(0), base.stride(0),
        WITH_BASE=base_TV is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
