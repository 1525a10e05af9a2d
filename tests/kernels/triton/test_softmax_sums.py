"""Sums over the softmax and their gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.test_elementwise import DTYPES, ERROR, FUSED, error, rand
from tests.tiny_models import DEVICE
from xtuner.kernels.dispatch import PLAIN


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('vocabulary', [40, 9001])
@pytest.mark.parametrize('with_base', [False, True])
def test_softmax_sums_and_their_gradient(dtype, vocabulary, with_base):
    logits = (rand(4, vocabulary, dtype=dtype, wide=6) * 4).clone()
    base = (rand(4, vocabulary, dtype=dtype, wide=3) * 4).clone() if with_base else None
    targets = torch.tensor([0, 3, vocabulary - 1, 7], device=DEVICE)
    factors = torch.rand(5, 4, device=DEVICE) - 0.5
    exact = PLAIN.softmax_sums(logits.double(), targets, None if base is None else base.double())
    exact_grad = logits.double()
    PLAIN.softmax_gradient_(exact_grad, targets, exact, factors.double(), None if base is None else base.double())
    for kernels in (PLAIN, FUSED):
        sums = kernels.softmax_sums(logits, targets, base)
        assert sums.dtype == torch.float32
        for ours, expected in zip(sums, exact, strict=True):
            assert not expected.any() or error(ours, expected) < 1e-5
        short = kernels.softmax_sums(logits, targets, base, over_vocabulary=False)
        rows = [0, 1, *((4, 5, 6) if with_base else ())]
        assert torch.allclose(short[rows], sums[rows], rtol=1e-5)
        grad = logits.clone()
        kernels.softmax_gradient_(grad, targets, sums, factors, base)
        assert error(grad, exact_grad) < ERROR[dtype]
