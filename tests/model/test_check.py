"""Weights that do not fit the model, found before it is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.published import CONFIGS, LAYERS, random_weights, write_model
from tests.model.test_loading import FP32, rewrite
from tests.model.weights.test_reader import Payload, write
from xtuner.errors import ModelError
from xtuner.model.loading import load_model


@pytest.mark.parametrize('layout', ['bin', 'safetensors-sharded'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('missing', r"no file contains tensor 'model.norm.weight'; searched .*model"),
        ('surplus', r"model[-0-9of]*\.(bin|safetensors): tensor 'model.extra' is not part of the model"),
        ('shape', r"model[-0-9of]*\.(bin|safetensors): tensor 'model.norm.weight' has shape \(31,\), .* \(32,\)"),
        ('layers', r"tensor 'model.layers.1.[a-z_.]*' is not part of the model, and 12 more"),
        ('bias', r"tensor 'model.layers.0.self_attn.k_proj.bias' is not part of the model"),
    ],
)
def test_wrong_tensors_are_named_with_their_file(tmp_path: Path, layout: str, change: str, message: str) -> None:
    folder = write_model(tmp_path, 'v1')
    (folder / 'pytorch_model.bin').unlink()
    tensors = random_weights(CONFIGS['v1'])
    if change == 'missing':
        del tensors['model.norm.weight']
    elif change == 'surplus':
        tensors['model.extra'] = torch.ones(2)
    elif change == 'shape':
        tensors['model.norm.weight'] = torch.ones(31)
    write(folder, layout, tensors)
    rewrite(folder, **({'num_hidden_layers': LAYERS - 1} if change == 'layers' else {}))
    rewrite(folder, **({'bias': False} if change == 'bias' else {}))
    with pytest.raises(ModelError, match=message):
        load_model(folder, dtype=FP32)


def test_a_payload_never_runs(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 'v1')
    torch.save({'evil': Payload()}, folder / 'pytorch_model.bin')
    with pytest.raises(ModelError, match=r'pytorch_model\.bin was rejected'):
        load_model(folder, dtype=FP32)
    assert not Path('/tmp/xtuner-payload-ran').exists()
