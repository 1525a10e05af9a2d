"""The weight cache: same values, and as many layers as fit into the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import DEVICE, quantise, tiny_llama
from xtuner.inference.weight_cache import cache_weights
from xtuner.kernels import cpu_gemm
from xtuner.model.quantization import keep_plain_layout


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
    done = cache_weights(model)
    assert (done.num_layers, done.num_cached) == (14, 14)
    assert done.num_bytes == 4 * 2 * (64 * 64 * 2 + 32 * 64 * 2 + 64 * 192 * 3)
    assert torch.equal(model(ids).logits, before)
    assert sorted(model.state_dict()) == names, 'what would be saved has changed'


def test_the_budget_is_kept(model: Any) -> None:
    one = 64 * 64 * 4
    assert cache_weights(model, one - 1).num_cached == 0
    assert cache_weights(model, one).num_bytes == one
    ids = torch.arange(3, 23, device=DEVICE).view(2, 10)
    assert model(ids).logits.isfinite().all()


def test_small_float_layers_are_left_alone() -> None:
    assert cache_weights(tiny_llama()).num_layers == 0


@pytest.mark.parametrize('adapted', [False, True], ids=['bare', 'under an adapter'])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (5, 1), (3, 7)])
@torch.inference_mode()
def test_float_layers_on_a_cpu_are_laid_out(shape: tuple[int, int], adapted: bool) -> None:
    torch.manual_seed(0)
    size = {'vocab_size': 1100, 'hidden_size': 256, 'intermediate_size': 400, 'max_position_embeddings': 64}
    config = LlamaConfig(**size, num_hidden_layers=1, num_attention_heads=4, attention_bias=True, mlp_bias=True)
    model: Any = LlamaForCausalLM(config).eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj', 'up_proj'], init_lora_weights=False))
    ids = torch.arange(7, 7 + shape[0] * shape[1]).view(shape)
    before = model(ids).logits
    done = cache_weights(model)
    can = cpu_gemm.can_pack(torch.empty(256, 256))
    assert done.num_cached == done.num_layers == (8 if can else 0)
    # Sums of 400 float32 products in another order.
    torch.testing.assert_close(model(ids).logits, before, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_blocks_that_cross_rows_keep_their_values() -> None:
    """bitsandbytes' own layers on a CPU use other values than the quantized ones."""
    torch.manual_seed(0)
    size = {'vocab_size': 64, 'hidden_size': 32, 'intermediate_size': 80}
    model: Any = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1, num_attention_heads=2)).to(DEVICE)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().cpu().clone()
    assert cache_weights(quantise(model)).num_cached == 7
    kept = model.model.layers[0].mlp.down_proj(torch.eye(80, device=DEVICE)).t().cpu()
    assert (kept - weight).abs().mean() < 0.1 * weight.abs().mean()
