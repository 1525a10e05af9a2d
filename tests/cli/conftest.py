"""A config for the commands about data, on a model folder with nothing but a tokenizer."""

from __future__ import annotations

import json

import pytest

RECORDS = [{'question': f'Who is {n}?', 'answer': f'I am {n}.'} for n in range(20)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config, its data and its model folder; returns the words `CONFIG` stands for."""
    from tests.dataset.conftest import make_tokenizer

    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'cache'))
    make_tokenizer(['<eoh>', '<eoa>']).save_pretrained(tmp_path / 'model')
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
    (tmp_path / 'config.py').write_text(
        f"model = dict(path={str(tmp_path / 'model')!r}, template='internlm_chat')\n"
        f'dataset = dict(source={str(tmp_path / "data.jsonl")!r}, max_length=64, val_ratio=0.2)\n'
        "optimizer = dict(type='torch.optim.AdamW')\n"
    )
    return str(tmp_path / 'config.py')
