"""Weights that are cut while they are loaded: all ranks' rows together are the whole, bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.published import write_model
from xtuner.adapters.attach import needs_base_weights
from xtuner.config.schema import QuantizationConfig
from xtuner.model.loading import load_model
from xtuner.model.sharded_loading import ShardSpec, full_shapes, num_parameters, shard_on_load

RANKS = 3  # divides few of the sizes


def load(folder: Path, quantization: QuantizationConfig | None, share: ShardSpec | None = None) -> Any:
    return load_model(folder, dtype=torch.float32, quantization=quantization, sharded=True, share=share)


@pytest.mark.parametrize('quantization', [None, QuantizationConfig(), QuantizationConfig(double_quant=False)])
@pytest.mark.parametrize('name', ['v1', 'v2'])  # v2's q, k and v come out of one tensor
def test_rows_of_all_ranks_are_the_whole(tmp_path: Path, name: str, quantization: QuantizationConfig | None) -> None:
    folder = write_model(tmp_path, name)
    whole, parts = load(folder, quantization), [load(folder, quantization, ShardSpec(r, RANKS)) for r in range(RANKS)]
    num_cut = 0
    for path, module in whole.named_modules():
        own = [part.get_submodule(path) for part in parts]
        if not isinstance(module, nn.Linear):
            assert not any(full_shapes(part) for part in own)
            continue
        num_cut += 1
        assert full_shapes(own[0])['weight'] == module.weight.shape
        assert torch.equal(torch.cat([part.weight.data for part in own]), module.weight.data)
        assert len(own[0].weight) == -(-len(module.weight) // RANKS)  # what is held, and in memory of its own
        assert own[0].weight.untyped_storage().nbytes() == own[0].weight.nbytes
        state: Any = getattr(module.weight, 'quant_state', None)
        if state is not None:
            scales = [part.weight.quant_state.absmax for part in own]
            together = torch.cat(scales)
            assert full_shapes(own[0])['absmax'] == together.shape and together.is_floating_point()
            if state.nested:
                together = together.view(torch.uint8)[: state.absmax.numel()]
            assert torch.equal(together, state.absmax)
    assert num_cut > 10
    assert num_parameters(parts[0]) == num_parameters(whole)


@pytest.mark.parametrize('written', [False, True])
def test_a_tied_head_stays_whole(tmp_path: Path, written: bool) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    if written:  # some checkpoints hold the head all the same
        tensors = load_file(tmp_path / 'model.safetensors')
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()
        save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    model = load(tmp_path, None, ShardSpec(1, 2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (64, 32) and not full_shapes(model.lm_head)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 32)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    from transformers import modeling_utils

    before = modeling_utils.caching_allocator_warmup
    with pytest.raises(ZeroDivisionError), shard_on_load(ShardSpec(0, 2), tied=False):
        assert nn.Linear(4, 8).weight.shape == (4, 4)
        raise ZeroDivisionError
    assert nn.Linear(4, 8).weight.shape == (8, 4)
    assert modeling_utils.caching_allocator_warmup is before
    assert 'HF_DEACTIVATE_ASYNC_LOAD' not in os.environ


@pytest.mark.parametrize(
    ('section', 'expected'),
    [
        ({'type': 'peft.LoraConfig'}, False),
        ({'type': 'peft.LoraConfig', 'init_lora_weights': 'gaussian', 'use_rslora': True}, False),
        ({'type': 'peft.LoraConfig', 'use_dora': True}, True),
        ({'type': 'peft.LoraConfig', 'init_lora_weights': 'pissa_niter_4'}, True),
        ({'type': 'peft.LoraConfig', 'init_lora_weights': 'orthogonal'}, True),
        ({'type': 'peft.IA3Config'}, True),
        (None, False),
    ],
)
def test_which_adapters_need_whole_weights(section: dict[str, Any] | None, expected: bool) -> None:
    assert needs_base_weights(section) is expected
