"""The fused linear cross entropy against float64, on a CPU."""

import pytest
import torch
from torch.nn import functional

from xtuner.fused.loss import fused_linear_cross_entropy, target_rows


def problem(dtype=torch.float32, *, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(101, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, 101, (37,), generator=generator)
    labels[::4] = -100
    return hidden, weight, offset, labels


def exact(hidden, weight, offset, labels):
    inputs = [t.detach().double().requires_grad_() for t in (hidden, weight, offset) if t is not None]
    loss = functional.cross_entropy(functional.linear(*inputs), labels, reduction='sum')
    return loss.detach(), torch.autograd.grad(loss * 3, inputs)


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('slice_tokens', [None, 5, 1])
def test_loss_and_all_gradients(dtype, tolerance, bias, slice_tokens):
    hidden, weight, offset, labels = problem(dtype, bias=bias)
    expected, gradients = exact(hidden, weight, offset, labels)
    loss = fused_linear_cross_entropy(hidden, weight, offset, labels, slice_tokens=slice_tokens)
    (loss * 3).backward()
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    for tensor, gradient in zip((hidden, weight, offset), gradients, strict=False):
        assert float((tensor.grad.double() - gradient).norm() / gradient.norm()) < tolerance
    assert not hidden.grad[::4].any()


def test_frozen_head_gets_no_gradient_and_rows_may_be_given():
    hidden, weight, offset, labels = problem()
    plain = fused_linear_cross_entropy(hidden, weight.detach(), offset.detach(), labels)
    given = fused_linear_cross_entropy(hidden, weight.detach(), None, labels, rows=target_rows(labels))
    plain.backward()
    assert weight.grad is None and hidden.grad is not None and float(given) != float(plain)


def test_no_target_is_zero_with_a_gradient():
    hidden, weight, _, labels = problem()
    loss = fused_linear_cross_entropy(hidden, weight, None, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss) == 0 and not hidden.grad.any() and not weight.grad.any()


def test_never_holds_all_logits(monkeypatch):
    """No tensor of the forward pass is larger than a slice's logits or the head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    hidden, weight, _, labels = problem()
    with Largest():
        fused_linear_cross_entropy(hidden, weight.detach(), None, labels, slice_tokens=2)
    assert Largest.size <= max(weight.numel(), hidden.numel()) < labels.numel() * weight.shape[0]
