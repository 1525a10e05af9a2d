"""Triton kernel that replaces a row of logits by its loss gradient in place: two reads and one write."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def log_sum_exp(start_of_row, vocabulary, BLOCK: tl.constexpr):
    """The logarithm of the sum of exponentials of a row, in one read."""
    row_max = tl.full((BLOCK,), -float('inf'), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):  # each lane keeps its own running maximum, which needs no reduction
        column = start + tl.arange(0, BLOCK)
        value = tl.load(start_of_row + column, mask=column < vocabulary, other=-float('inf')).to(tl.float32)
        new_max = tl.maximum(row_max, value)
        finite = new_max > -float('inf')
        row_sum = tl.where(finite, row_sum * tl.exp(row_max - new_max) + tl.exp(value - new_max), 0.0)
        row_max = new_max
    peak = tl.max(row_max, axis=0)
    return peak + tl.log(tl.sum(tl.where(row_max > -float('inf'), row_sum * tl.exp(row_max - peak), 0.0), axis=0))


@triton.jit
def _cross_entropy(logits, targets, loss, vocabulary, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * row_stride
    target = tl.load(targets + row)
    target_logit = tl.load(start_of_row + target).to(tl.float32)
    log_sum = log_sum_exp(start_of_row, vocabulary, BLOCK)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(start_of_row + column, mask=column < vocabulary, other=0.0).to(tl.float32)
        gradient = tl.exp(value - log_sum) - tl.where(column == target, 1.0, 0.0)
        tl.store(start_of_row + column, gradient, mask=column < vocabulary)
    tl.store(loss + row, log_sum - target_logit)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """See `reference.cross_entropy_`."""
    rows, vocabulary = logits_TV.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits_TV.device)
    block, num_warps = launch_size(vocabulary)
    _cross_entropy[(rows,)](
        logits_TV,
        targets_T,
        loss,
        vocabulary,
        logits_TV.stride(0),
        BLOCK=block,
        num_warps=num_warps,
    )
    return loss


def launch_size(vocabulary: int) -> tuple[int, int]:
    """Columns a block, and warps, of a program that reads a row of logits."""
    block = min(8192, triton.next_power_of_2(vocabulary))
    return block, max(1, min(16, block // 256))
