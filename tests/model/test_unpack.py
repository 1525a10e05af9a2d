"""Weights kept as floats: the same values, as many as there is room for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.model.kernels.conftest import DEVICE, quantise, tiny_llama
from xtuner.model.quantization import keep_plain_layout
from xtuner.model.unpack import unpack_weights


@pytest.fixture(params=[False, True], ids=['bare', 'under an adapter'])
def model(request: pytest.FixtureRequest) -> Any:
    model = quantise(tiny_llama())
    keep_plain_layout(model)
    if request.param:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj', 'up_proj'], init_lora_weights=False))
    return model.eval()


@torch.inference_mode()
def test_answers_stay_what_they_were(model: Any) -> None:
    ids = torch.arange(3, 23, device=DEVICE).view(2, 10)
    before = model(ids).logits
    names = sorted(model.state_dict())
    done = unpack_weights(model)
    assert (done.num_layers, done.num_kept) == (14, 14)
    assert done.num_bytes == 4 * 2 * (64 * 64 * 2 + 32 * 64 * 2 + 64 * 192 * 3)
    assert torch.equal(model(ids).logits, before)
    assert sorted(model.state_dict()) == names, 'what would be saved has changed'


def test_the_budget_is_kept(model: Any) -> None:
    one = 64 * 64 * 4
    assert unpack_weights(model, one - 1).num_kept == 0
    assert unpack_weights(model, one).num_bytes == one
    ids = torch.arange(3, 23, device=DEVICE).view(2, 10)
    assert model(ids).logits.isfinite().all()


def test_a_model_without_4_bit_layers_is_left_alone() -> None:
    assert unpack_weights(tiny_llama()).num_layers == 0
