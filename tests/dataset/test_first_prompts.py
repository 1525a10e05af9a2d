"""The first prompts of the data, for a run that names none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.first_prompts import first_prompts
from xtuner.dataset.templates.builtin import get_template

pytestmark = pytest.mark.unit


def prompts_of(tmp_path: Path, *records: Any, count: int = 2) -> list[list[tuple[str, str]]]:
    path = tmp_path / 'data.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    found = first_prompts(DatasetConfig(source=str(path)), get_template('internlm_chat'), count=count)
    return [[(message.role, message.content) for message in prompt] for prompt in found]


def conversation(*texts: str, system: str = '') -> dict[str, Any]:
    roles = ('user', 'assistant')
    messages = [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]
    return {'messages': [{'role': 'system', 'content': system}, *messages] if system else messages}


def test_they_end_before_the_first_answer_and_come_once(tmp_path: Path) -> None:
    records = [conversation('a', 'b', 'c', 'd', system='s'), conversation('a', 'x', system='s'), conversation('e', 'f')]
    assert prompts_of(tmp_path, *records) == [[('system', 's'), ('user', 'a')], [('user', 'e')]]
    assert prompts_of(tmp_path, *records, count=1) == [[('system', 's'), ('user', 'a')]]


def test_short_ones_go_before_long_ones(tmp_path: Path) -> None:
    long = conversation('long ' * 300, 'x')
    assert prompts_of(tmp_path, long, conversation('short', 'x')) == [[('user', 'short')]]
    assert prompts_of(tmp_path, long) == [[('user', 'long ' * 300)]]


def test_documents_have_none(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, {'text': 'a document'}) == []
