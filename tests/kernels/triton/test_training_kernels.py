"""The Triton kernels against plain PyTorch, and both against float64. On a CPU they run in Triton's interpreter."""

import pytest
import torch

from tests.tiny_models import DEVICE, triton_obstacle
from xtuner.kernels import reference as reference_kernels
from xtuner.kernels.dispatch import PLAIN, fused_kernels
from xtuner.kernels.quantized import unpack_weight

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


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('nested', 'kind'), [(True, 'nf4'), (False, 'nf4'), (True, 'fp4')])
@pytest.mark.parametrize('shape', [(48, 128), (7, 192)])
def test_dequantize_equals_bitsandbytes(dtype, nested, kind, shape):
    bnb = pytest.importorskip('bitsandbytes')
    linear = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind, compress_statistics=nested)
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    linear = linear.to(DEVICE)
    weight = unpack_weight(linear)
    expected = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    for kernels in (reference_kernels, FUSED):
        out, tail = poisoned(*shape, dtype=dtype, wide=8)
        kernels.dequantize_into(out, weight)
        assert error(out, expected) < ERROR[dtype] and tail.isnan().all()


def test_dequantize_where_blocks_straddle_rows():
    """bitsandbytes' CPU kernel starts a block with each row here and is wrong, so the original weight is the judge."""
    bnb = pytest.importorskip('bitsandbytes')
    linear = bnb.nn.Linear4bit(96, 5, bias=False, quant_type='nf4')
    original = rand(5, 96)
    linear.weight.data.copy_(original)
    linear = linear.to(DEVICE)
    for kernels in (reference_kernels, FUSED):
        out, tail = poisoned(5, 96, dtype=torch.float32, wide=8)
        kernels.dequantize_into(out, unpack_weight(linear))
        assert error(out, original.double()) < 0.12 and tail.isnan().all()


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
