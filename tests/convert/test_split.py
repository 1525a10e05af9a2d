"""Splitting: the same tensors, one to a file, and every other file of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.published import write_model, write_tokenizer
from xtuner.cli.main import main
from xtuner.model.weights.reader import fingerprint, open_weights


def test_each_tensor_in_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1', 'bin-sharded', stray=True))
    (folder / 'modeling.py').write_text('# its own code')
    assert main(['convert', 'split', str(folder), str(tmp_path / 'out')]) == 0
    assert capsys.readouterr().out == f'{tmp_path / "out"}\n'
    before, after = open_weights(folder), open_weights(tmp_path / 'out')
    assert fingerprint(before) == fingerprint(after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    assert len(list((tmp_path / 'out').glob('*.safetensors'))) == len(before.names())
    others = {p.name for p in folder.iterdir() if p.suffix != '.bin' and not p.name.endswith('index.json')}
    assert others <= {p.name for p in (tmp_path / 'out').iterdir()}
    assert not list((tmp_path / 'out').glob('*.bin*'))


def test_up_to_a_size_and_others_read_it(tmp_path: Path) -> None:
    from tests.convert.adapters import make_base

    folder = make_base(tmp_path / 'model')
    assert main(['convert', 'split', str(folder), str(tmp_path / 'out'), '--max-shard-size', '200KB']) == 0
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    assert 1 < len(set(index['weight_map'].values())) < len(index['weight_map'])
    a, b = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / 'out'))
    assert all(torch.equal(a[name], b[name]) for name in a)
