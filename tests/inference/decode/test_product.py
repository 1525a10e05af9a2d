"""Cached weights of a group of layers are discarded when the weights change."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import DEVICE, quantise, tiny_llama
from xtuner.inference.decode.product import Product
from xtuner.kernels.dispatch import PLAIN


@torch.inference_mode()
def test_nothing_kept_outlives_a_change() -> None:
    layer: Any = quantise(tiny_llama(layers=1, bias=False)).model.layers[0].mlp
    x = torch.randn(3, 64, device=DEVICE)
    in_one, as_floats = (Product([layer.gate_proj, layer.up_proj], torch.float32) for _ in range(2))
    assert in_one.cache_merged(10**9) and as_floats.allow_cached_floats(10**9)
    before = in_one(x, PLAIN)
    torch.testing.assert_close(as_floats(x, PLAIN), before)
    for projection in (layer.gate_proj, layer.up_proj):
        projection.weight.quant_state.absmax.zero_()
        if projection.weight.quant_state.nested:
            projection.weight.quant_state.offset.zero_()
            projection.weight.quant_state.state2.absmax.zero_()
    for product in (in_one, as_floats):
        torch.testing.assert_close(product(x, PLAIN), before)  # it was kept
        product.refresh()
        assert product.cache_merged(0) == 0  # no budget
        assert not product(x, PLAIN).any()
