"""Attention of one new token over the KV cache."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.test_elementwise import DEVICE, error, rand
from tests.kernels.triton.test_gemv import DTYPES, ROUNDING
from tests.tiny_models import combinations
from xtuner.kernels.triton import decode_attention
from xtuner.kernels.triton.nf4_lut import to_planes


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
