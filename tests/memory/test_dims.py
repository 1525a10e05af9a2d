"""A model's dimensions."""

from __future__ import annotations

import pytest

from xtuner.memory.dims import model_dims


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [('llama', (8, 0, 8, 0, 0, 0, 8)), ('internlm2', (8, 0, 0, 0, 0, 0, 8)), ('gpt_neox', (8,) * 7)],
)
def test_ranks_are_found_under_each_family_s_names(kind: str, expected: tuple[int, ...]) -> None:
    from transformers import AutoConfig

    targets = {'llama': ['q_proj', 'v_proj', 'down_proj'], 'internlm2': ['wqkv', 'w2'], 'gpt_neox': 'all-linear'}[kind]
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    section = {'type': 'peft:LoraConfig', 'r': 8, 'target_modules': targets, 'task_type': 'CAUSAL_LM'}
    assert model_dims(config, section).ranks == expected
