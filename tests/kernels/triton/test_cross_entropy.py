"""Cross entropy and its gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.test_elementwise import DTYPES, ERROR, FUSED, error, rand
from tests.tiny_models import DEVICE
from xtuner.kernels import reference as reference_kernels


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('vocabulary', [40, 8192, 9001])
def test_cross_entropy_and_its_gradient(dtype, vocabulary):
    logits = (rand(4, vocabulary, dtype=dtype, wide=6) * 4).clone()
    targets = torch.tensor([0, 3, vocabulary - 1, 7], device=DEVICE)
    logits64 = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(logits64, targets, reduction='none')
    (exact_grad,) = torch.autograd.grad(exact.sum(), logits64)
    for kernels in (reference_kernels, FUSED):
        grad = logits.clone()
        loss = kernels.cross_entropy_(grad, targets)
        assert loss.dtype == torch.float32 and error(loss, exact.detach()) < 1e-6
        assert error(grad, exact_grad) < ERROR[dtype]
