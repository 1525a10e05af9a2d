"""Which base a merge takes: what was taught on a quantised base is kept, measured against the trained model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.convert.adapters import VOCAB, make_base
from xtuner.adapters.attach import Provenance, attach_adapter
from xtuner.adapters.load import load_adapter
from xtuner.cli.main import main
from xtuner.config.schema import QuantizationConfig
from xtuner.convert import verify
from xtuner.convert.base import quantized_weights, requantize, skeleton
from xtuner.dataset.probe import write_probe
from xtuner.model.loading import load_model
from xtuner.model.weights.reader import fingerprint, open_weights

SETTINGS = QuantizationConfig()
PROMPT, ANSWER = 4, 8  # tokens
LESSONS = torch.randint(3, VOCAB, (6, PROMPT + ANSWER), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that loses much in 4 bit: one large value in each block makes all others coarse."""
    folder = make_base(tmp_path_factory.mktemp('base'))
    for file in folder.glob('*.safetensors'):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith('_proj.weight'):
                tensors[name][:, ::64] *= 10
        save_file(tensors, file, {'format': 'pt'})
    return folder


def teach(base: Path, run: Path) -> Path:
    """A run's work folder: an adapter that has just learnt the lessons on the base in 4 bit, and their record."""
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32, quantization=SETTINGS)
    adapted = attach_adapter(model, {'type': 'peft:LoraConfig', 'r': 8, 'lora_alpha': 16, 'task_type': 'CAUSAL_LM',
                                     'target_modules': 'all-linear'})  # fmt: skip
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    labels = LESSONS.clone()
    labels[:, :PROMPT] = -100
    for step in range(100):
        adapted(input_ids=LESSONS, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0 and num_kept(adapted) == len(LESSONS):
            break
    folder = run / 'checkpoint-00000001'
    adapted.save_pretrained(folder)
    digest = fingerprint(open_weights(base))
    Provenance(str(base), digest, 'internlm_chat', 'fp32', dataclasses.asdict(SETTINGS)).write(folder)
    (run / 'last').write_text(folder.name)
    positions = torch.arange(PROMPT + ANSWER)
    write_probe(run, [{'input_ids': ids, 'labels': wanted, 'position_ids': positions}
                      for ids, wanted in zip(LESSONS, labels, strict=True)], 'training')  # fmt: skip
    return run


def num_kept(model: Any) -> int:
    """How many lessons a model recites, greedily."""
    ids = LESSONS[:, :PROMPT]
    with torch.no_grad():
        for _ in range(ANSWER):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return int((ids == LESSONS).all(1).sum())


def kept_by(folder: Path) -> int:
    return num_kept(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(scope='module')
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(base, tmp_path_factory.mktemp('run'))


def test_what_was_taught_is_kept_by_default_and_lost_on_the_published_weights(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = load_adapter(load_model(base, dtype=torch.float32, quantization=SETTINGS), run)
    assert num_kept(tuned) == len(LESSONS)
    assert main(['convert', 'merge', str(base), str(run), str(tmp_path / 'auto')]) == 0
    told = capsys.readouterr().err
    assert 'on 6 training samples of the run, 48 positions:' in told
    assert 'as trained: merged with --base dequantized, same likeliest token at 100.0 %' in told
    assert kept_by(tmp_path / 'auto') == len(LESSONS)
    assert main(['convert', 'merge', str(base), str(run), str(tmp_path / 'original'), '--base', 'original']) == 0
    assert 'merged with --base original, the model differs from the trained one' in capsys.readouterr().err
    assert kept_by(tmp_path / 'original') < len(LESSONS) - 2
    merged = {
        kind: json.loads((tmp_path / kind / 'xtuner.json').read_text())['merged'] for kind in ('auto', 'original')
    }
    assert merged['auto']['base'] == 'dequantized'
    assert merged['auto']['agreement'] == 1.0
    assert merged['original']['agreement'] < 0.9
    assert merged['original']['positions'] == 48
    assert 'same likeliest token at 100.0 % of 48 positions' in (tmp_path / 'auto' / 'README.md').read_text()


def test_the_published_weights_are_taken_where_they_keep_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose weights are 4-bit values already loses nothing by quantisation."""
    own = make_base(tmp_path / 'base')
    reader = open_weights(own)
    names = quantized_weights(skeleton(own), SETTINGS, torch.float32, torch.device('cpu'))
    for file in own.glob('*.safetensors'):
        tensors = load_file(file)
        for name in tensors.keys() & names.keys():
            tensors[name] = requantize(tensors[name].clone(), SETTINGS)
        save_file(tensors, file, {'format': 'pt'})
    assert reader.names()
    run = teach(own, tmp_path / 'run')
    assert main(['convert', 'merge', str(own), str(run / 'last'), str(tmp_path / 'auto')]) == 0
    told = capsys.readouterr().err
    assert told.index('--base original: same likeliest token at 100.0 %') < told.index('--base dequantized: same likel')
    assert json.loads((tmp_path / 'auto' / 'xtuner.json').read_text())['merged']['base'] == 'original'
    assert kept_by(tmp_path / 'auto') == len(LESSONS)


def test_neither_reaches_the_bound(
    base: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, 'MOST_KL', -1.0)
    words = ['convert', 'merge', str(base), str(run), str(tmp_path / 'merged')]
    assert main(words) == 1
    assert 'differs from the trained one' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*words, '--base', 'dequantized']) == 0  # asked for by name: a warning
    assert 'it may not preserve what was trained' in capsys.readouterr().err


def test_without_a_measurement_the_trained_values_are_taken(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['convert', 'merge', str(base), str(run), str(tmp_path / 'merged'), '--verify', '0']) == 0
    assert 'base dequantized: not measured' in capsys.readouterr().err
    assert json.loads((tmp_path / 'merged' / 'xtuner.json').read_text())['merged'] == {'base': 'dequantized'}
    assert kept_by(tmp_path / 'merged') == len(LESSONS)
