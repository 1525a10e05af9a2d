"""Generation settings of what is written: loaded and saved by transformers, with every end token."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from xtuner.errors import ModelError
from xtuner.model.generation_settings import generation_settings, write_generation_settings


def base(folder: Path, settings: Any, config: dict[str, Any] | None = None) -> Path:
    (folder / 'config.json').write_text(json.dumps(config or {}), encoding='utf-8')
    if settings is not None:
        (folder / 'generation_config.json').write_text(json.dumps(settings), encoding='utf-8')
    return folder


@pytest.mark.parametrize(
    'settings',
    [
        {'temperature': 0.9, 'top_p': 0.6},
        {'temperature': 0.9, 'do_sample': False, 'top_k': 7, 'min_p': 0.1, 'top_h': 0.2, 'typical_p': 0.3},
        {'length_penalty': 0.5, 'early_stopping': True, 'num_beams': 1},
        {'output_scores': True},
        {'num_return_sequences': 3},
    ],
)
def test_settings_without_effect_are_left_out(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_generation_settings(tmp_path, generation_settings(base(tmp_path, settings), [7]))
    loaded = GenerationConfig.from_pretrained(tmp_path)
    loaded.eos_token_id = [8]  # changed, so that transformers looks at all of it once more
    loaded.save_pretrained(tmp_path / 'again')


def test_settings_with_effect_stay(tmp_path: Path) -> None:
    settings = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9, 'repetition_penalty': 1.1, 'pad_token_id': 4}
    assert generation_settings(base(tmp_path, settings), [7]) == settings | {'eos_token_id': [7]}


@pytest.mark.parametrize(
    ('ends', 'stops', 'expected'),
    [
        (2, [5], [5, 2]),
        ([128001, 128008, 128009], [128009], [128009, 128001, 128008]),
        (None, [5], [5]),
        ([3, 4], None, [3, 4]),
    ],
)
def test_all_end_tokens_of_base_and_template_are_kept(
    tmp_path: Path, ends: Any, stops: list[int] | None, expected: list[int]
) -> None:
    assert generation_settings(base(tmp_path, {'eos_token_id': ends}), stops)['eos_token_id'] == expected


def test_without_the_file_the_config_names_the_tokens(tmp_path: Path) -> None:
    found = generation_settings(base(tmp_path, None, {'eos_token_id': 2, 'bos_token_id': 1, 'hidden_size': 8}), [5])
    assert found == {'bos_token_id': 1, 'eos_token_id': [5, 2]}


def test_what_transformers_refuses_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger='xtuner'):
        found = generation_settings(base(tmp_path, {'max_new_tokens': -1, 'bos_token_id': 1}), [5])
    assert found == {'bos_token_id': 1, 'eos_token_id': [5]}
    assert 'keeping only its special tokens' in caplog.text


@pytest.mark.parametrize('ends', ['</s>', [1, '2'], True, -1, {'a': 1}, [[1]]])
def test_end_tokens_that_are_no_ids_are_told(tmp_path: Path, ends: Any) -> None:
    with pytest.raises(ModelError, match=r'generation_config.json: eos_token_id is .*; expected a token id'):
        generation_settings(base(tmp_path, {'eos_token_id': ends}), [5])
