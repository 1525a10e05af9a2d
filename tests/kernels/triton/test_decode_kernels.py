"""Kernels for one token against float64. On a CPU they run in Triton's interpreter."""

import random

import numpy as np
import pytest
import torch

from tests.kernels.triton.test_training_kernels import DEVICE, error, rand
from tests.tiny_models import combinations, triton_obstacle
from xtuner.kernels.quantized import unpack_weight

if triton_obstacle():
    pytest.skip(triton_obstacle(), allow_module_level=True)

from xtuner.kernels import reference
from xtuner.kernels.triton import decode_attention, gemv
from xtuner.kernels.triton.nf4_lut import WORD_SUM, table_words, to_planes

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
    low = gemv.LoraWeights(to_planes(down, planes).contiguous(), up, rank)
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
    decode_attention.rope_and_store(qkv, (cos, sin), at, query, key_cache, value_cache, queries=queries)
    first, second = qkv.double().chunk(2, -1)
    c, s = cos[position].double(), sin[position].double()
    turned = torch.cat((first * c - second * s, second * c + first * s), -1)
    assert error(query, turned[:, :queries].reshape(-1, size)) < 1e-6
    assert error(key_cache[:, position], turned[:, queries : queries + keys].reshape(-1, size)) < 1e-6
    assert torch.equal(value_cache[:, position], qkv[:, queries + keys :].reshape(-1, size))
    for cache in (key_cache, value_cache):
        cache[:, position] = 7
        assert (cache == 7).all()


@pytest.mark.parametrize(('dtype', 'shape', 'position'), combinations(DTYPES, [(4, 4, 16), (6, 2, 12)], [0, 130, 299]))
def test_attention(dtype, shape, position):
    """Three pieces of 128 tokens; what lies beyond the position must not be looked at."""
    heads, key_heads, size = shape
    query = rand(heads, size)
    keys, values = rand(key_heads, 300, size, dtype=dtype).clone(), rand(key_heads, 300, size, dtype=dtype).clone() + 1
    keys[:, position + 1 :] = values[:, position + 1 :] = float('nan')
    out = torch.empty(heads, size, dtype=dtype, device=DEVICE)
    at = torch.tensor(position, dtype=torch.int32, device=DEVICE)
    decode_attention.DecodeAttention(heads, keys)(query, keys, values, at, out, 0.3)
    k, v = (t[:, : position + 1].double().repeat_interleave(heads // key_heads, 0) for t in (keys, values))
    shares = torch.softmax(torch.einsum('nd,ntd->nt', query.double(), k) * 0.3, -1)
    exact = torch.einsum('nt,ntd->nd', shares, v)
    assert error(out, exact) < 2 * ROUNDING[dtype]
    wide = torch.empty(heads * size, device=DEVICE)
    decode_attention.DecodeAttention(heads, keys)(query, keys, values, at, wide, 0.3, planes=8)
    assert error(wide, to_planes(exact.flatten(), 8)) < 2e-6


@pytest.mark.parametrize('planes', [1, 8])
@pytest.mark.parametrize('dtype', DTYPES)
def test_norm(planes, dtype):
    x, weight = rand(48) * 3, rand(48)
    out = torch.empty(48, dtype=dtype, device=DEVICE)
    decode_attention.norm(x, weight, 1e-6, out, planes=planes)
    exact = x.double() * torch.rsqrt(x.double().square().mean() + 1e-6) * weight.double()
    assert error(out, to_planes(exact, planes)) < ROUNDING[dtype]


def permuted(a, b, selector):
    """PTX's `prmt`: bytes of two words, picked by four codes; the fourth bit of a code repeats the byte's sign."""
    data = a.to_bytes(4, 'little') + b.to_bytes(4, 'little')
    codes = [(selector >> 4 * i) & 15 for i in range(4)]
    return int.from_bytes([(255 if data[c & 7] & 128 else 0) if c & 8 else data[c & 7] for c in codes], 'little')


def run_assembly(assembly, word, x, table):
    """The assembly of a word's sum, instruction by instruction, in float64."""
    known = {'$1': word} | {f'${2 + i}': v for i, v in enumerate(x)}
    known |= {f'${10 + i}': v & 0xFFFFFFFF for i, v in enumerate(table)}
    do = {
        'and.b32': lambda a, b: a & b, 'or.b32': lambda a, b: a | b, 'shr.u32': lambda a, b: a >> b,
        'prmt.b32': permuted, 'cvt.f32.f16': lambda a: float(np.uint16(a).view(np.float16)),
        'mul.f32': lambda a, b: a * b, 'fma.rn.f32': lambda a, b, c: a * b + c, 'mov.f32': lambda a: a,
    }  # fmt: skip
    for line in assembly.strip()[1:-1].split(';'):
        name, _, rest = line.strip().partition(' ')
        if name == 'mov.b32':
            source = known[rest.split('}, ')[1]]
            known |= {'u': source & 0xFFFF, 'v': source >> 16}
        elif name in do:
            target, *sources = rest.split(', ')
            known[target] = do[name](*(known[s] if s in known else int(s, 0) for s in sources))
        else:
            assert name in ('', '.reg'), name
    return known['$0']


@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
def test_the_assembly_picks_what_the_table_says(kind):
    """Triton's interpreter runs none, so it is run here."""
    functional = pytest.importorskip('bitsandbytes.functional')
    table = functional.get_4bit_type(kind, device='cpu')
    words, halves, draw = table_words(table), table.half().tolist(), random.Random(0)
    for _ in range(300):
        data, x = draw.randbytes(4), [draw.gauss(0, 1) for _ in range(8)]
        pairs = [(byte >> 4, byte & 15) for byte in data]
        expected = sum(halves[code] * value for code, value in zip([c for p in pairs for c in p], x, strict=True))
        got = run_assembly(WORD_SUM.value, int.from_bytes(data, 'little'), x, words)
        assert got == pytest.approx(expected, abs=1e-12)
