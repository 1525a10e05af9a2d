"""A prompt's rotation and attention against float64. On a CPU the kernels run in Triton's interpreter."""

import pytest
import torch

from tests.kernels.triton.test_elementwise import DEVICE, error, rand
from tests.tiny_models import triton_obstacle

if triton_obstacle():
    pytest.skip(triton_obstacle(), allow_module_level=True)

from xtuner.kernels.triton import prefill_attention

CAPACITY = 96
# The interpreter multiplies no bfloat16.
ROUNDING = {torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if DEVICE == 'cuda' else {})
FORMS = [(1, 3, 3), (1, 4, 2), (2, 3, 1)]  # groups; query and key heads of a group


def filled(form, dtype, start, length, size):
    """Queries, keys and values of new tokens, a cache that holds `start` tokens and is undefined beyond, angles."""
    groups, queries, keys = form
    qkv = rand(length, groups, queries + 2 * keys, size, dtype=dtype)
    cache = torch.full((2, groups * keys, CAPACITY, size), float('nan'), dtype=dtype, device=DEVICE)
    cache[:, :, :start] = rand(2, groups * keys, start, size, dtype=dtype)
    turns = rand(length, size // 2).double()
    return qkv, cache, (turns.cos().float(), turns.sin().float())


def turned(x, angles):
    """(T, N, D) in float64, each head's halves rotated."""
    cos, sin = (a.double()[:, None] for a in angles)
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def exactly_attended(query_TND, keys_NLD, values_NLD, start, scale):
    shared = query_TND.shape[1] // len(keys_NLD)
    keys, values = (x.double().repeat_interleave(shared, 0) for x in (keys_NLD, values_NLD))
    score = torch.einsum('tnd,nld->ntl', query_TND.double(), keys) * scale
    hidden = torch.ones(score.shape[1:], dtype=torch.bool, device=DEVICE).triu(start + 1)
    weight = score.masked_fill(hidden, float('-inf')).softmax(-1)
    return torch.einsum('ntl,nld->tnd', weight, values).flatten(1)


@pytest.mark.parametrize('dtype', ROUNDING)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('start', 'length', 'size'), [(0, 35, 64), (46, 21, 64), (16, 16, 128), (70, 1, 64)])
def test_a_prompt_over_the_cache(dtype, form, start, length, size):
    qkv, cache, angles = filled(form, dtype, start, length, size)
    _, queries, heads = form
    given, end, before = qkv.clone(), start + length, cache[:, :, :start].clone()
    prefill_attention.rope_into_cache(qkv, angles, cache[0], cache[1], start, queries=queries)
    query, key, value = (part.flatten(1, 2) for part in given.split((queries, heads, heads), dim=2))
    assert error(qkv[:, :, :queries].flatten(1, 2), turned(query, angles)) < ROUNDING[dtype]
    assert error(cache[0, :, start:end].transpose(0, 1), turned(key, angles)) < ROUNDING[dtype]
    assert torch.equal(cache[1, :, start:end].transpose(0, 1), value)
    assert torch.equal(cache[:, :, :start], before) and cache[:, :, end:].isnan().all()

    out = prefill_attention.attend(qkv, cache[0], cache[1], start, 0.3, queries=queries)
    held = cache[:, :, :end]
    exact = exactly_attended(qkv[:, :, :queries].flatten(1, 2), held[0], held[1], start, 0.3)
    assert error(out, exact) < ROUNDING[dtype]


@pytest.mark.parametrize('dtype', ROUNDING)
@pytest.mark.parametrize('size', [64, 97])
def test_sum_and_norm(dtype, size):
    x, y, weight = rand(5, size, dtype=dtype).clone(), rand(5, size, dtype=dtype) * 0.3, rand(size, dtype=dtype)
    total = x.double() + y.double()
    exact = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    out = prefill_attention.add_norm(x, y, weight, 1e-5)
    assert error(x, total) < ROUNDING[dtype] and error(out, exact) < ROUNDING[dtype]


def test_what_it_takes():
    assert prefill_attention.supports(torch.bfloat16, 128)
    assert not prefill_attention.supports(torch.float32, 128) and not prefill_attention.supports(torch.float16, 80)
