"""The kernels of the decode step, one by one in Triton's interpreter, against float64 and the plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.decode.compare import PROMPT, four_bit
from tests.model.published import write_model
from tests.tiny_models import dequantised, tiny_llama, triton_obstacle, with_adapter
from xtuner.inference.decode.decoder import find_decoder
from xtuner.model.loading import load_model

if triton_obstacle() or torch.cuda.is_available():
    pytest.skip(triton_obstacle() or 'the GPU tests record the step', allow_module_level=True)

from xtuner.inference.decode.graph import DecodeStep
from xtuner.kernels.triton import gemv


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time depends on the number of programs, not of rows; small tiles are tested per kernel."""
    tile = gemv.Tile
    monkeypatch.setattr(gemv, 'Tile', lambda rows=64: tile(rows))


def stepped_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """Logits after a prompt whose last three tokens are computed by the decode step."""
    decoder: Any = find_decoder(model, len(prompt))
    with torch.inference_mode():
        decoder._prepare(len(prompt))
        decoder._prefill(prompt[:-3])
        assert decoder._cache is not None
        step = DecodeStep(decoder.layers, decoder._decoder, decoder._head, decoder._cache, decoder._angles)
        step.position.fill_(len(prompt) - 3)
        for token in prompt[-3:]:
            step.token.fill_(token)
            logits = step.run()
        assert int(step.position) == len(prompt)
    return logits[0]


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double() - exact).norm() / exact.norm())


def exact_logits(model: Any) -> torch.Tensor:
    return dequantised(model)(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()


@pytest.mark.parametrize('kv_heads', [1, 4])
def test_four_bit(kv_heads: int) -> None:
    model = four_bit(kv_heads=kv_heads, layers=1)
    assert error(stepped_logits(model, PROMPT), exact_logits(model)) < 5e-6


def test_four_bit_with_adapters_of_several_ranks() -> None:
    model = with_adapter(four_bit(layers=1), rank=5, rank_pattern={'k_proj': 16}, dropout=0.5).eval()
    exact = exact_logits(model)
    assert error(stepped_logits(model, PROMPT), exact) < 5e-6
    with model.disable_adapter():
        assert error(stepped_logits(model, PROMPT), exact) > 1e-2


def test_float_weights_and_an_adapter_on_some() -> None:
    model = with_adapter(tiny_llama(layers=1), targets=['q_proj', 'v_proj', 'up_proj']).eval()
    assert error(stepped_logits(model, PROMPT), exact_logits(model)) < 5e-6


@pytest.mark.parametrize('name', ['v1-8k', 'v2-bias', 'v2-linear', 'v3-bias'])
def test_internlm(tmp_path: Path, name: str) -> None:
    model: Any = load_model(write_model(tmp_path, name), dtype=torch.float32)
    exact = model.double()(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()
    assert error(stepped_logits(model.float(), PROMPT), exact) < 1e-5


@pytest.mark.parametrize('stay', [False, True])
def test_a_prompt_by_kernels(monkeypatch: pytest.MonkeyPatch, stay: bool) -> None:
    """In two chunks, then a second time, when dequantized weights may be cached."""
    monkeypatch.setattr('xtuner.inference.decode.decoder._MIN_COMPILED_PROMPT', 1)
    model = with_adapter(four_bit(heads=1, kv_heads=1).half()).eval()
    exact = exact_logits(model)
    decoder: Any = find_decoder(model, len(PROMPT))
    decoder._fused = True
    with torch.inference_mode():
        decoder._prepare(len(PROMPT))
        products = [product for layer in decoder.layers for product in layer.products]
        for product in products:
            product._merged_weight = None
            assert product.allow_cached_floats(10**9 if stay else 0) > 0 or not stay
        decoder._prefill(PROMPT[:-2])
        assert all((product._cached_floats is not None) is stay for product in products)
        logits = decoder._prefill(PROMPT)
        decoder._ids = []
        again = decoder._prefill(PROMPT)
    assert error(logits[0], exact) < 5e-3  # float16 through two layers
    assert error(again[0], exact) < 5e-3
