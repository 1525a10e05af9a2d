"""A tokenizer made small is the same tokenizer, for us and for plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xtuner.model.loading import load_tokenizer
from xtuner.model.tokenizer_files import shrink_tokenizer


@pytest.mark.parametrize('model', ['tiny_internlm', pytest.param('real_vocabulary_internlm', marks=pytest.mark.real)])
def test_the_same_tokenizer_in_less(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = load_tokenizer(request.getfixturevalue(model))
    whole.save_pretrained(tmp_path)
    before = sum(file.stat().st_size for file in tmp_path.iterdir())
    shrink_tokenizer(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 0.45 * before
    small, plain = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert small.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    for text in ('Hello, 你好  x', 'a\n\n b ü𝄞 </s><s>', ' leading', ''):
        assert small(text)['input_ids'] == plain(text)['input_ids'] == whole(text)['input_ids']


def test_a_folder_without_tokenizer_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'tokenizer.model').write_bytes(b'pieces')
    shrink_tokenizer(tmp_path)
    assert (tmp_path / 'tokenizer.model').read_bytes() == b'pieces'
