"""The terms of the prediction."""

from __future__ import annotations

import pytest

from tests.memory.test_predict import measure, setup_of
from xtuner.fused import cuda_graphs
from xtuner.fused.decoder import FusedDecoder
from xtuner.kernels.dispatch import PLAIN
from xtuner.memory import terms as terms_kernels
from xtuner.memory.terms import cast_weights, kept_by_layer


@pytest.mark.parametrize('fast', [True, False])
def test_what_a_layer_keeps_is_exact(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for layers in (1, 3):
        model, setup = setup_of(fast=fast, layers=layers, checkpointing=False, dropout=0.0)
        found[layers] = measure(model, setup, monkeypatch)[0]
    a_layer = kept_by_layer(setup) + cast_weights(setup) / 3
    assert (found[3] - found[1]) / 2 == pytest.approx(a_layer, rel=0.001)


def test_constants_are_those_of_the_kernels() -> None:
    model, _ = setup_of(fast=True, layers=1, checkpointing=True, dropout=0.0)
    decoder = FusedDecoder(model.get_base_model().get_decoder(), PLAIN, fused_lora=False)
    assert terms_kernels._INPUT_BUFFERS == cuda_graphs._RING_SIZE
    assert decoder.memory.offload_from_bytes == terms_kernels._OFFLOAD_FROM
