"""The demo's base model is written in InternLM-7B's published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.base import write_base_model
from xtuner.model.loading import load_model, load_tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp('base'))


def test_weights_have_the_published_names_and_shapes(folder: Path) -> None:
    weights = load_file(folder / 'model.safetensors')
    layer = {
        f'self_attn.{x}_proj.{kind}': [256] * dims for x in 'qkvo' for kind, dims in (('weight', 2), ('bias', 1))
    } | {
        'mlp.gate_proj.weight': [688, 256],
        'mlp.up_proj.weight': [688, 256],
        'mlp.down_proj.weight': [256, 688],
        'input_layernorm.weight': [256],
        'post_attention_layernorm.weight': [256],
    }
    expected = {f'model.layers.{n}.{name}': shape for n in range(4) for name, shape in layer.items()}
    expected |= {'model.embed_tokens.weight': [2000, 256], 'lm_head.weight': [2000, 256], 'model.norm.weight': [256]}
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_config_has_the_published_fields(folder: Path) -> None:
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert (config['model_type'], config['architectures']) == ('internlm', ['InternLMForCausalLM'])
    assert (config['bias'], config['hidden_act'], config['use_cache']) == (True, 'silu', True)


def test_it_loads(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32, device='cpu')
    ids = torch.tensor([tokenizer('Hello!').input_ids])
    assert ids[0, 0] == tokenizer.bos_token_id == 1
    logits_BSV = model(input_ids=ids).logits
    assert logits_BSV.shape == (1, ids.shape[1], len(tokenizer)) == (1, ids.shape[1], 2000)
    assert torch.isfinite(logits_BSV).all()


def test_the_seed_decides_and_the_callers_generator_stays(folder: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = write_base_model(tmp_path / 'again')
    other = write_base_model(tmp_path / 'other', seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    name = 'model.layers.0.mlp.up_proj.weight'
    ours, same, different = (load_file(f / 'model.safetensors')[name] for f in (folder, again, other))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, different)
