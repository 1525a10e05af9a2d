"""What an adapter adds to a weight, from its files alone, against peft's own merge in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.convert.delta import AdapterFile
from xtuner.errors import CheckpointError


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
        )
    )


def save_trained(folder: Path, config: Any) -> Any:
    """An adapter whose every trainable number is random, so that none of its parts can be forgotten unnoticed."""
    model = get_peft_model(make_base(), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


KINDS = {
    'LoRA': {},
    'rank-stabilised': {'use_rslora': True},
    'DoRA': {'use_dora': True},
    'rank and alpha by layer': {'rank_pattern': {'q_proj': 2, 'layers.1.mlp.up_proj': 6},
                                'alpha_pattern': {'^model.layers.0.self_attn.k_proj': 3, 'o_proj': 1}},
    'a whole module': {'modules_to_save': ['lm_head']},
    'biases': {'bias': 'lora_only'},
}  # fmt: skip


@pytest.mark.parametrize('kind', sorted(KINDS))
def test_it_adds_what_peft_adds(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM', **KINDS[kind])
    expected = save_trained(tmp_path, config).merge_and_unload().state_dict()
    adapter = AdapterFile(tmp_path)
    before = make_base().state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, expected[name])}
    assert adapter.targets == changed
    for name, tensor in before.items():
        # float32 sums in another order: a few units in the last place
        torch.testing.assert_close(adapter.apply(name, tensor), expected[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, IA3Config(task_type='CAUSAL_LM'))
    with pytest.raises(CheckpointError, match='only LoRA adapters can be merged, this one is IA3'):
        AdapterFile(tmp_path)
    with pytest.raises(CheckpointError, match='cannot be read'):
        AdapterFile(tmp_path / 'nothing')
