"""Kernels for one token against float64. On a CPU they run in Triton's interpreter."""

import pytest
import torch

from tests.model.kernels.conftest import triton_obstacle
from tests.model.kernels.test_fused import DEVICE, error, rand
from xtuner.model.kernels.quantized import take_apart

if triton_obstacle():
    pytest.skip(triton_obstacle(), allow_module_level=True)

from xtuner.model.kernels import fused_step, plain

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of what is written, not of the sums
DTYPES = list(ROUNDING)
TILE = fused_step.Tile(rows=4, row_bytes=64)  # several steps along a row of the sizes below


def quantised(rows, size, nested=True):
    """A 4-bit weight and its values in float64."""
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(size, rows, bias=False, quant_type='nf4', compress_statistics=nested)
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(rows))
    weight = take_apart(linear.to(DEVICE))
    values = torch.empty(rows, size, dtype=torch.float64, device=DEVICE)
    plain.dequantize_into(values, weight)
    return weight, values


def adapters(sizes, size, rank, dtype):
    down = rand(len(sizes) * rank, size, dtype=dtype) / size**0.5
    up = rand(sum(sizes), rank, dtype=dtype)
    low = fused_step.LowRank(down, up, rank)
    member = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def exact(x):
        projected = (down.double() @ x.double()).view(len(sizes), rank)
        return (up.double() * projected[member.to(DEVICE)]).sum(1)

    return low, exact


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('form', ['float', 'nf4', 'nested'])
@pytest.mark.parametrize('sizes', [(6,), (9, 4, 7)])
@pytest.mark.parametrize('extras', [False, True])
def test_multiply(dtype, form, sizes, extras):
    size = 320
    x = rand(size, dtype=dtype)
    if form == 'float':
        parts = [rand(n, size, dtype=dtype) for n in sizes]
        matrix = torch.cat(parts).double()
    else:
        both = [quantised(n, size, form == 'nested') for n in sizes]
        parts, matrix = [b[0] for b in both], torch.cat([b[1] for b in both])
    weights = fused_step.weights_of(parts)
    exact = matrix @ x.double()
    keywords = {'tile': TILE}
    if extras:
        low, low_exact = adapters(sizes, size, 8, dtype)
        bias, down = rand(sum(sizes), dtype=dtype), torch.empty(len(sizes) * 8, device=DEVICE)
        fused_step.project(low, x, down)
        exact = exact + bias.double() + low_exact(x)
        keywords |= {'bias_N': bias, 'low_rank': low, 'down': down}
    wide = torch.full((sum(sizes) + 5,), float('nan'), dtype=dtype, device=DEVICE)
    fused_step.multiply(weights, x, wide[: sum(sizes)], **keywords)
    assert error(wide[: sum(sizes)], exact) < ROUNDING[dtype] and wide[sum(sizes) :].isnan().all()
    total = rand(sum(sizes)).clone()
    expected = total.double() + exact
    fused_step.multiply(weights, x, total, add=True, **keywords)
    assert error(total, expected) < ROUNDING[torch.float32]


@pytest.mark.parametrize('form', ['float', 'nested'])
@pytest.mark.parametrize('extras', [False, True])
def test_multiply_gated(form, extras):
    size, rows, dtype = 192, 10, torch.float32
    x = rand(size, dtype=dtype)
    if form == 'float':
        parts = [rand(rows, size), rand(rows, size, wide=1).contiguous()]
        matrix = torch.cat(parts).double()
    else:
        both = [quantised(rows, size), quantised(rows, size)]
        parts, matrix = [b[0] for b in both], torch.cat([b[1] for b in both])
    exact, keywords = matrix @ x.double(), {'tile': TILE}
    if extras:
        low, low_exact = adapters((rows, rows), size, 16, dtype)
        bias, down = rand(2 * rows), torch.empty(32, device=DEVICE)
        fused_step.project(low, x, down)
        exact = exact + bias.double() + low_exact(x)
        keywords |= {'bias_N': bias, 'low_rank': low, 'down': down}
    gate, up = exact.chunk(2)
    out = torch.empty(rows, device=DEVICE)
    fused_step.multiply_gated(fused_step.weights_of(parts), x, out, **keywords)
    assert error(out, torch.nn.functional.silu(gate) * up) < 2e-6


def test_weights_of_several_forms_are_refused():
    weight, values = quantised(4, 64)
    assert isinstance(fused_step.weights_of([weight, values]), str)
    assert isinstance(fused_step.weights_of([quantised(4, 96)[0]]), str)  # blocks of 64 straddle its rows


@pytest.mark.parametrize(('groups', 'queries', 'keys'), [(1, 6, 2), (2, 3, 1)])
@pytest.mark.parametrize('position', [0, 5])
def test_turn_and_store(groups, queries, keys, position):
    size, capacity = 12, 9
    qkv = rand(groups, queries + 2 * keys, size).contiguous()
    angles = rand(capacity, size // 2)
    cos, sin = angles.cos(), angles.sin()
    query = torch.empty(groups * queries, size, device=DEVICE)
    key_cache, value_cache = (torch.full((groups * keys, capacity, size), 7.0, device=DEVICE) for _ in range(2))
    at = torch.tensor(position, dtype=torch.int32, device=DEVICE)
    fused_step.turn_and_store(qkv, (cos, sin), at, query, key_cache, value_cache, queries=queries)
    first, second = qkv.double().chunk(2, -1)
    c, s = cos[position].double(), sin[position].double()
    turned = torch.cat((first * c - second * s, second * c + first * s), -1)
    assert error(query, turned[:, :queries].reshape(-1, size)) < 1e-6
    assert error(key_cache[:, position], turned[:, queries : queries + keys].reshape(-1, size)) < 1e-6
    assert torch.equal(value_cache[:, position], qkv[:, queries + keys :].reshape(-1, size))
    for cache in (key_cache, value_cache):
        cache[:, position] = 7
        assert (cache == 7).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('heads', 'key_heads', 'size'), [(4, 4, 16), (6, 2, 12)])
@pytest.mark.parametrize('position', [0, 130, 299])
def test_attention(dtype, heads, key_heads, size, position):
    """Three pieces of 128 tokens; what lies beyond the position must not be looked at."""
    query = rand(heads, size)
    keys, values = rand(key_heads, 300, size, dtype=dtype).clone(), rand(key_heads, 300, size, dtype=dtype).clone() + 1
    keys[:, position + 1 :] = values[:, position + 1 :] = float('nan')
    out = torch.empty(heads, size, dtype=dtype, device=DEVICE)
    at = torch.tensor(position, dtype=torch.int32, device=DEVICE)
    fused_step.Attention(heads, keys)(query, keys, values, at, out, 0.3)
    k, v = (t[:, : position + 1].double().repeat_interleave(heads // key_heads, 0) for t in (keys, values))
    shares = torch.softmax(torch.einsum('nd,ntd->nt', query.double(), k) * 0.3, -1)
    assert error(out, torch.einsum('nt,ntd->nd', shares, v)) < 2 * ROUNDING[dtype]
