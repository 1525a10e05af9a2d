"""Kernels for one token against float64. On a CPU they run in Triton's interpreter."""

import pytest
import torch

from tests.kernels.triton.test_elementwise import DEVICE, error, rand
from tests.tiny_models import combinations, triton_obstacle
from xtuner.kernels.quantized import unpack_weight

if triton_obstacle():
    pytest.skip(triton_obstacle(), allow_module_level=True)

from xtuner.kernels import reference
from xtuner.kernels.triton import decode_attention, gemv
from xtuner.kernels.triton.nf4_lut import to_planes

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of what is written, not of the sums
DTYPES = list(ROUNDING)
TABLE = 1e-6 if DEVICE == 'cpu' else 4e-4  # a GPU holds the table of 4-bit values as float16
TILE = gemv.Tile(rows=4, row_bytes=64)  # several steps along a row of the sizes below


def quantised(rows, size, nested=True):
    """A 4-bit weight and its values in float64."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(size, rows, bias=False, quant_type='nf4', compress_statistics=nested)
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(rows))
    weight = unpack_weight(linear.to(DEVICE))
    values = torch.empty(rows, size, dtype=torch.float64, device=DEVICE)
    reference.dequantize_into(values, weight)
    return weight, values


def adapters(sizes, size, rank, dtype, planes):
    down = rand(len(sizes) * rank, size, dtype=dtype) / size**0.5
    up = rand(sum(sizes), rank, dtype=dtype)
    low = gemv.GemvLora(to_planes(down, planes).contiguous(), up, rank)
    member = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def exact(x):
        projected = (down.double() @ x.double()).view(len(sizes), rank)
        return (up.double() * projected[member.to(DEVICE)]).sum(1)

    return low, exact


@pytest.mark.parametrize(
    ('dtype', 'form', 'sizes', 'extras'),
    combinations(DTYPES, ['float', 'nf4', 'nested'], [(6,), (9, 4, 7)], [False, True]),
)
def test_multiply(dtype, form, sizes, extras):
    size = 320
    x = rand(size)
    if form == 'float':
        parts = [rand(n, size, dtype=dtype) for n in sizes]
        matrix = torch.cat(parts).double()
    else:
        both = [quantised(n, size, form == 'nested') for n in sizes]
        parts, matrix = [b[0] for b in both], torch.cat([b[1] for b in both])
    weights = gemv.gemv_weights(parts)
    exact, x_in = matrix @ x.double(), to_planes(x, weights.planes).contiguous()
    keywords = {'tile': TILE}
    if extras:
        low, low_exact = adapters(sizes, size, 8, dtype, weights.planes)
        bias, down = rand(sum(sizes), dtype=dtype), torch.empty(len(sizes) * 8, device=DEVICE)
        gemv.project(low, x_in, down)
        exact = exact + bias.double() + low_exact(x)
        keywords |= {'bias_N': bias, 'lora': low, 'lora_ax': down}
    wide = torch.full((sum(sizes) + 5,), float('nan'), dtype=dtype, device=DEVICE)
    gemv.multiply(weights, x_in, wide[: sum(sizes)], **keywords)
    least = ROUNDING[torch.float32] if form == 'float' else TABLE
    assert error(wide[: sum(sizes)], exact) < max(ROUNDING[dtype], least) and wide[sum(sizes) :].isnan().all()
    total = rand(sum(sizes)).clone()
    expected = total.double() + exact
    gemv.multiply(weights, x_in, total, add=True, **keywords)
    assert error(total, expected) < least


@pytest.mark.parametrize('form', ['float', 'nested'])
@pytest.mark.parametrize('extras', [False, True])
def test_multiply_gated(form, extras):
    size, rows, dtype = 192, 16, torch.float32
    x = rand(size)
    if form == 'float':
        parts = [rand(rows, size), rand(rows, size, wide=1).contiguous()]
        matrix = torch.cat(parts).double()
    else:
        both = [quantised(rows, size), quantised(rows, size)]
        parts, matrix = [b[0] for b in both], torch.cat([b[1] for b in both])
    weights = gemv.gemv_weights(parts)
    exact, x_in = matrix @ x.double(), to_planes(x, weights.planes).contiguous()
    keywords = {'tile': TILE}
    if extras:
        low, low_exact = adapters((rows, rows), size, 16, dtype, weights.planes)
        bias, down = rand(2 * rows), torch.empty(32, device=DEVICE)
        gemv.project(low, x_in, down)
        exact = exact + bias.double() + low_exact(x)
        keywords |= {'bias_N': bias, 'lora': low, 'lora_ax': down}
    gate, up = exact.chunk(2)
    out = torch.empty(rows, device=DEVICE)
    gemv.multiply_gated(weights, x_in, out, **keywords)
    gated = torch.nn.functional.silu(gate) * up
    assert error(out, gated) < 2 * (TABLE if form == 'nested' else 1e-6)
    gemv.multiply_gated(weights, x_in, out, planes=8, **keywords)
    assert error(out, to_planes(gated, 8)) < 2 * (TABLE if form == 'nested' else 1e-6)


def test_weights_of_several_forms_are_refused():
    weight, values = quantised(4, 64)
    assert isinstance(gemv.gemv_weights([weight, values]), str)
    assert isinstance(gemv.gemv_weights([quantised(4, 96)[0]]), str)  # blocks of 64 straddle its rows


@pytest.mark.parametrize('planes', [1, 8])
@pytest.mark.parametrize('dtype', DTYPES)
def test_norm(planes, dtype):
    x, weight = rand(48) * 3, rand(48)
    out = torch.empty(48, dtype=dtype, device=DEVICE)
    decode_attention.norm(x, weight, 1e-6, out, planes=planes)
    exact = x.double() * torch.rsqrt(x.double().square().mean() + 1e-6) * weight.double()
    assert error(out, to_planes(exact, planes)) < ROUNDING[dtype]
