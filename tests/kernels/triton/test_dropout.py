"""Dropout whose mask is drawn again in the backward pass."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.test_elementwise import DTYPES, ERROR, FUSED, error, poisoned, rand
from tests.tiny_models import DEVICE
from xtuner.kernels import reference as reference_kernels


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('tokens', 'size', 'rank'), [(70, 96, 8), (33, 130, 64), (300, 64, 5)])
def test_dropout_products_share_one_mask(dtype, tokens, size, rank):
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly; float16 takes the same code")
    x, a, dxa = rand(tokens, size, dtype=dtype, wide=3), rand(rank, size, dtype=dtype), rand(tokens, rank, dtype=dtype)
    before = rand(tokens, size, dtype=dtype)
    p, seed = 0.3, torch.tensor(987654321, device=DEVICE)
    mask = reference_kernels.dropout_keep(tokens, size, p, seed).double() / (1 - p)
    for kernels in (reference_kernels, FUSED):
        out, tail = poisoned(tokens, rank, dtype=dtype, wide=4)
        kernels.dropout_project(x, a, p, seed, out)
        assert error(out, (x.double() * mask) @ a.double().t()) < 2 * ERROR[dtype] and tail.isnan().all()
        grad = kernels.dropout_project_weight_grad(dxa, x, p, seed)
        assert grad.dtype == torch.float32
        assert error(grad, dxa.double().t() @ (x.double() * mask)) < 2 * ERROR[dtype]
        dx = before.clone()
        kernels.dropout_project_input_grad_(dx, dxa, a, p, seed)
        assert error(dx, before.double() + (dxa.double() @ a.double()) * mask) < 2 * ERROR[dtype]


def test_fused_mask_is_the_plain_mask_bit_for_bit():
    """A product with the identity shows the mask itself."""
    ones, identity = torch.ones(50, 48, device=DEVICE), torch.eye(48, device=DEVICE)
    for seed in torch.tensor([0, 1, 2**31 - 1], device=DEVICE):
        out = torch.empty(50, 48, device=DEVICE)
        FUSED.dropout_project(ones, identity, 0.25, seed, out)
        assert torch.equal(out != 0, reference_kernels.dropout_keep(50, 48, 0.25, seed))
