"""The Triton kernels against plain PyTorch, and both against float64. On a CPU they run in Triton's interpreter."""

import pytest
import torch

from tests.tiny_models import DEVICE, triton_obstacle
from xtuner.kernels import reference as reference_kernels
from xtuner.kernels.dispatch import fused_kernels

if triton_obstacle():
    pytest.skip(triton_obstacle(), allow_module_level=True)

FUSED = fused_kernels()
ERROR = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 5e-4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape, dtype=torch.float32, wide=0):
    """Random numbers; with `wide`, rows of a buffer that is wider by so many columns."""
    generator = torch.Generator().manual_seed(sum(shape) + wide)
    full = torch.randn(*shape[:-1], shape[-1] + wide, generator=generator).to(DEVICE, dtype)
    return full[..., : shape[-1]]


def poisoned(*shape, dtype, wide=0):
    full = torch.full((*shape[:-1], shape[-1] + wide), float('nan'), dtype=dtype, device=DEVICE)
    return full[..., : shape[-1]], full[..., shape[-1] :]


def error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [64, 97, 300])
def test_rms_norm_forward_and_backward(dtype, size):
    x, weight, dh, skip = rand(5, size, dtype=dtype), rand(size), rand(5, size, dtype=dtype, wide=3), rand(5, size)
    skip = skip.to(dtype)
    exact_out = torch.empty(5, size, dtype=torch.float64, device=DEVICE)
    x64 = x.double().requires_grad_()
    reference = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    (exact_dx,) = torch.autograd.grad(reference, x64, dh.double())
    reference_kernels.rms_norm(x.double(), weight.double(), 1e-6, exact_out)
    assert error(exact_out, reference.detach()) < 1e-14
    for kernels in (reference_kernels, FUSED):
        out, tail = poisoned(5, size, dtype=dtype, wide=7)
        rstd = kernels.rms_norm(x, weight, 1e-6, out)
        assert error(out, exact_out) < ERROR[dtype] and tail.isnan().all()
        dx = kernels.rms_norm_backward(dh, x, rstd, weight, skip)
        assert dx.dtype == dtype and error(dx, exact_dx + skip.double()) < ERROR[dtype]
        spacious = kernels.rms_norm_backward(dh, x, rstd, weight, None, spare=5)
        assert error(spacious, exact_dx) < ERROR[dtype] and spacious.stride() == (size + 5, 1)


def test_copy_rows():
    for kernels in (reference_kernels, FUSED):
        x, (out, tail) = rand(3, 5001, wide=2), poisoned(3, 5001, dtype=torch.float32, wide=4)
        kernels.copy_rows(x, out)
        assert torch.equal(out, x) and tail.isnan().all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('heads', 'size'), [(4, 16), (3, 12), (17, 8)])
def test_rotate_and_back(dtype, heads, size):
    x = rand(6, heads * size, dtype=dtype, wide=5).unflatten(-1, (heads, size))
    angles = rand(6, size // 2)
    cos, sin = angles.cos(), angles.sin()
    twice = torch.cat((angles, angles), -1).double()[:, None]
    swapped = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1).double()
    exact = x.double() * twice.cos() + swapped * twice.sin()
    for kernels in (reference_kernels, FUSED):
        out = torch.full((6, heads, size), float('nan'), dtype=dtype, device=DEVICE)
        kernels.rotate(x, cos, sin, out, inverse=False)
        assert error(out, exact) < ERROR[dtype]
        kernels.rotate(out, cos, sin, out, inverse=True)
        assert error(out, x.double()) < 2 * ERROR[dtype]


@pytest.mark.parametrize(('groups', 'queries', 'size'), [(2, 2, 16), (3, 7, 12), (1, 4, 8)])
def test_rotate_moves_heads_out_of_groups_and_back(groups, queries, size):
    """Queries grouped by key head, with the key and the value behind them, as InternLM2's are."""
    grouped = rand(6, groups * (queries + 2) * size, dtype=torch.float32).unflatten(-1, (groups, queries + 2, size))
    angles = rand(6, size // 2)
    q = grouped[:, :, :-2]
    for kernels in (reference_kernels, FUSED):
        expected = torch.empty(6, groups * queries, size, device=DEVICE)
        kernels.rotate(q.flatten(1, 2), angles.cos(), angles.sin(), expected, inverse=False)
        out = torch.full_like(expected, float('nan'))
        kernels.rotate(q, angles.cos(), angles.sin(), out.unflatten(1, (groups, queries)), inverse=False)
        assert torch.equal(out, expected)
        back = torch.full_like(grouped, float('nan'))
        kernels.rotate(out.unflatten(1, (groups, queries)), angles.cos(), angles.sin(), back[:, :, :-2], inverse=True)
        assert error(back[:, :, :-2], q) < 1e-6 and back[:, :, -2:].isnan().all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [32, 2051])
def test_swiglu_forward_and_backward(dtype, size):
    gate_up, dact = rand(3, 2 * size, dtype=dtype, wide=9), rand(3, size, dtype=dtype)
    gate_up64 = gate_up.double().requires_grad_()
    gate, up = gate_up64.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    (exact_grad,) = torch.autograd.grad(exact, gate_up64, dact.double())
    for kernels in (reference_kernels, FUSED):
        out, tail = poisoned(3, size, dtype=dtype, wide=2)
        kernels.swiglu(gate_up, out)
        assert error(out, exact.detach()) < ERROR[dtype] and tail.isnan().all()
        act, grad = dact.clone(), gate_up.clone()
        kernels.swiglu_backward_(act, grad)
        assert error(act, exact.detach()) < ERROR[dtype]
        assert error(grad, exact_grad) < ERROR[dtype]
