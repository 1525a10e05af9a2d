"""A tokenizer's files: what is taken, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.model.test_config_file import _make_plain, base, changed  # noqa: F401
from xtuner.errors import ModelError
from xtuner.model.loading import load_tokenizer


@pytest.mark.parametrize(
    'fields',
    [
        {
            'vocab_file': '/etc/passwd',
            'tokenizer_file': '/home/one/.cache/x/tokenizer.json',
            'merges_file': '/etc/merges',
        },
        {'padding_side': None, 'truncation_side': None},
        {'model_max_length': math.inf},
        {'model_max_length': 1e30},
        {'auto_map': ['a.B', None]},
    ],
)
@pytest.mark.parametrize('plain', [True, False])
def test_what_published_tokenizers_have_is_taken(changed: Any, base: Path, fields: dict[str, Any], plain: bool) -> None:  # noqa: F811
    folder = changed()
    if plain:
        _make_plain(folder)
    _write(folder / 'tokenizer_config.json', fields)
    tokenizer, whole = load_tokenizer(folder), load_tokenizer(base)
    assert tokenizer('Hello, 你好  x')['input_ids'] == whole('Hello, 你好  x')['input_ids']
    assert tokenizer.padding_side in ('left', 'right')
    assert '/etc/' not in f'{vars(tokenizer)}' and '/home/one/' not in f'{vars(tokenizer)}'


def test_a_list_of_code_without_a_file_of_the_format_is_refused(changed: Any) -> None:  # noqa: F811
    folder = changed()
    _make_plain(folder)
    _write(folder / 'tokenizer_config.json', {'auto_map': ['a.B', None], 'tokenizer_class': 'OwnTokenizer'})
    (folder / 'tokenizer.json').rename(folder / 'vocab.json')
    with pytest.raises(ModelError, match='needs code from the model; pass --trust-remote-code'):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'tokenizer_class': 'AutoModelForCausalLM'}, "`tokenizer_class` must be a tokenizer's name"),
        ({'tokenizer_class': 'AutoTokenizer'}, "`tokenizer_class` must be a tokenizer's name"),
        ({'fast_tokenizer_files': ['../tokenizer.1.0.0.json']}, '`fast_tokenizer_files` is rejected'),
        ({'added_tokens_file': '/etc/passwd'}, '`added_tokens_file` is rejected'),
        ({'padding_side': 'up'}, '`padding_side` must be one of'),
        ({'eos_token': 3}, '`eos_token` must be a dict or text or None, got 3'),
        ({'auto_map': 'x'}, '`auto_map` must be a dict or a list or None'),
    ],
)
def test_a_wrong_field_of_a_tokenizer_is_named(changed: Any, fields: dict[str, Any], message: str) -> None:  # noqa: F811
    folder = changed()
    _write(folder / 'tokenizer_config.json', fields)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)


def _write(path: Path, fields: dict[str, Any]) -> None:
    content = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps(content))
