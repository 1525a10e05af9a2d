"""Prepared data must not be taken for another tokenizer's."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import normalizers

from demo.tokenizer import train_tokenizer
from tests.conftest import ROOT
from xtuner.dataset.fingerprint import fingerprint_tokenizer
from xtuner.model.loading import load_tokenizer


def test_it_changes_with_whatever_changes_the_ids(tiny_internlm: Path, tmp_path: Path) -> None:
    first = fingerprint_tokenizer(load_tokenizer(tiny_internlm))
    for name in ('tokenizer.model', 'tokenizer_config.json'):
        shutil.copyfile(tiny_internlm / name, tmp_path / name)
    assert fingerprint_tokenizer(load_tokenizer(tmp_path)) == first, 'another folder, the same tokenizer'

    grown = load_tokenizer(tiny_internlm)
    grown.add_tokens(['<new>'])
    lowered = load_tokenizer(tiny_internlm)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    renamed = load_tokenizer(tiny_internlm)
    renamed.pad_token = '<eoa>'
    train_tokenizer([ROOT / 'demo' / 'base.jsonl'], tmp_path, vocab_size=790)
    found = {first, *map(fingerprint_tokenizer, (grown, lowered, renamed, load_tokenizer(tmp_path)))}
    assert len(found) == 5
