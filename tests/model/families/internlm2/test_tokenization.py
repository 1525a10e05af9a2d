"""InternLM2's tokenizer: reserved pieces under the names that the config gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.families.internlm.original import OriginalTokenizer
from tests.model.published import pieces, write_tokenizer
from xtuner.model.families.internlm2.tokenization import InternLM2Tokenizer
from xtuner.model.loading import load_tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp('tokenizer'), 'InternLM2')


@pytest.mark.parametrize('text', ['', 'Hello', '<|im_start|>user\nthe cat<|im_end|>\n', '  a</s>b <|im_end|>', '語\0'])
def test_ids_and_texts(folder: Path, text: str) -> None:
    known = pieces(folder)
    added = {'<|im_start|>': known.index('[UNUSED_TOKEN_0]'), '<|im_end|>': known.index('[UNUSED_TOKEN_1]')}
    original = OriginalTokenizer(folder, added)
    ours = load_tokenizer(folder)
    assert type(ours) is InternLM2Tokenizer
    ids = original.encode(text)
    assert ours(text).input_ids == ids
    assert ours.decode(ids) == original.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    ours.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = '<|im_start|>user\nthe cat<|im_end|>\n'
    assert again(text).input_ids == ours(text).input_ids
    assert again.decode(again(text).input_ids) == ours.decode(ours(text).input_ids)
    assert again.convert_tokens_to_ids('<|im_end|>') == pieces(folder).index('[UNUSED_TOKEN_1]')
    assert len(again) == len(pieces(folder))
