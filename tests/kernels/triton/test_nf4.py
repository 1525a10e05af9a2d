"""Dequantizing 4-bit weights."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.test_elementwise import DTYPES, ERROR, FUSED, error, poisoned, rand
from tests.tiny_models import DEVICE
from xtuner.kernels import reference as reference_kernels
from xtuner.kernels.quantized import unpack_weight


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
