"""NF4 in comparisons of integers: bitsandbytes' codes and scales bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xtuner.convert.base import _mean
from xtuner.model.weights.nf4 import BLOCK, _limits, _number, quantize_nf4

DTYPES = [torch.bfloat16, torch.float16]


def check(weight: Tensor) -> None:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, quant_type='nf4', blocksize=BLOCK)
    own, scales = quantize_nf4(weight)
    assert torch.equal(own, codes.view(-1))
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize('dtype', DTYPES)
def test_at_both_sides_of_every_limit_of_every_largest_value(dtype: torch.dtype) -> None:
    """Between two limits the code cannot change, since a product grows with its factor: so this is every weight."""
    largest = torch.arange(2**15, dtype=torch.int32)
    largest = largest[_number(largest, dtype).isfinite()]
    limits = _limits(dtype)[: len(largest)].int()
    ends = torch.stack([-1 - largest, largest], 1)
    reached = torch.minimum(limits, largest[:, None])  # a limit that none reaches lies one above
    below = torch.maximum(limits - 1, ends[:, :1])
    orders = torch.cat([ends, reached, below, ends.repeat(1, 16)], 1)
    assert orders.shape[1] == BLOCK
    check(_number(orders, dtype).to(dtype))
    check(_number(orders.flip(1), dtype).to(dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_weights_of_any_size(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(256, 1, generator=generator).mul_(8).exp_()
    weight = torch.randn(256, 4 * BLOCK, generator=generator) * spread
    weight[3] = 0
    weight[4] = -0.0
    check(weight.clamp(-6e4, 6e4).to(dtype))


def test_what_is_not_finite_is_told() -> None:
    weight = torch.ones(2, BLOCK, dtype=torch.bfloat16)
    for value in (torch.inf, -torch.inf, torch.nan):
        weight[1, 5] = value
        assert quantize_nf4(weight)[1].isfinite().tolist() == [True, False]


@pytest.mark.parametrize('count', [1000, 40_000, 100_000, 704_512])
def test_a_mean_as_several_threads_compute_it(count: int) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            for seed in range(5):
                values = torch.rand(count, generator=torch.Generator().manual_seed(seed))
                torch.set_num_threads(threads)
                expected = values.mean()
                torch.set_num_threads(1)
                assert torch.equal(_mean(values, threads), expected), (threads, seed)
    finally:
        torch.set_num_threads(before)
