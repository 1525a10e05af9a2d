"""Weights in chunks of rows, for minimum memory: same values, same products."""

import pytest
import torch

from tests.tiny_models import DEVICE
from xtuner.fused import linear
from xtuner.fused.frozen import FrozenLinear, LoraWeights
from xtuner.fused.linear import ComputePolicy, LinearGroup
from xtuner.kernels import reference
from xtuner.kernels.dispatch import PLAIN

bnb = pytest.importorskip('bitsandbytes')
SEEDS = torch.zeros(16, dtype=torch.int64, device=DEVICE)


def layer(rows, size, *, bias=True, nested=True):
    module = bnb.nn.Linear4bit(size, rows, bias=bias, quant_type='nf4', compress_statistics=nested).requires_grad_(
        False
    )
    generator = torch.Generator().manual_seed(rows)
    module.weight.data.copy_(torch.randn(rows, size, generator=generator))
    if bias:
        module.bias.data = torch.randn(rows, generator=generator)
    return FrozenLinear(module.to(DEVICE))


def adapter(rows, size, rank):
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((rank, size), (rows, rank)))
    return LoraWeights(a, b, 0.5, 0.0)


@pytest.mark.parametrize('nested', [False, True])
def test_chunks_contain_the_rows_of_the_whole(nested):
    whole = layer(700, 128, nested=nested)
    values = torch.empty(700, 128, device=DEVICE)
    reference.dequantize_into(values, whole.quantized())
    chunks = whole.row_chunks(256 * 128 * 4, 4)
    assert [(rows.start, rows.stop) for rows, _ in chunks] == [(0, 256), (256, 512), (512, 700)]
    for rows, part in chunks:
        out = torch.empty(part.shape, device=DEVICE)
        part.write_into(out, PLAIN)
        assert torch.equal(out, values[rows])
        assert torch.equal(part.bias(torch.float32), whole.bias(torch.float32)[rows])


def test_what_cannot_be_cut_stays_whole():
    small = layer(100, 128)
    assert small.row_chunks(1, 4) == [(slice(0, 100), small)]
    floats = FrozenLinear(torch.nn.Linear(64, 512))
    assert floats.row_chunks(1, 4) == [(slice(0, 512), floats)]


def test_rows_that_split_a_group_of_scales_are_refused():
    with pytest.raises(ValueError, match='not aligned with blocks of scales'):
        layer(512, 128).quantized().rows(3, 512)


def test_products_in_chunks_equal_the_products(monkeypatch):
    monkeypatch.setattr(linear, '_CHUNK_BYTES', 256 * 192 * 4)
    layers, ranks = [layer(700, 192), layer(300, 192, bias=False)], (8, 4)
    adapters = [adapter(frozen.shape[0], 192, rank) for frozen, rank in zip(layers, ranks, strict=True)]
    group, x = LinearGroup(layers), torch.randn(9, 192 + 12, device=DEVICE)
    dy = torch.randn(9, 1000 + 12, device=DEVICE)
    results = []
    for low_memory in (False, True):
        policy = ComputePolicy(PLAIN, torch.float32, fused_lora=True, low_memory=low_memory)
        y, _ = group.forward(policy, x.clone(), adapters, SEEDS)
        dx, _ = group.input_grad(policy, dy.clone(), adapters, SEEDS)
        results.append((y, dx))
    assert len(group._chunks(policy, adapters)) == 5
    for whole, chunks in zip(*results, strict=True):
        assert torch.allclose(chunks, whole, rtol=1e-5, atol=1e-3)  # other sums: entries are of size 20


def test_a_replaced_weight_is_taken_apart_anew():
    frozen = layer(256, 64)
    first = frozen.quantized()
    assert frozen.quantized() is first
    frozen.module.weight = layer(256, 64, nested=False).module.weight
    assert frozen.quantized() is not first and frozen.quantized().absmax_table is None
