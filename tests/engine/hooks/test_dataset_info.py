"""What the log shows of the first item."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.stream import PackStream
from xtuner.dataset.templates.builtin import get_template
from xtuner.engine.hooks.dataset_info import DatasetInfoHook
from xtuner.errors import DataError
from xtuner.model.loading import load_tokenizer


def test_trained_tokens_are_marked_and_the_text_is_cut(tiny_internlm: Path) -> None:
    tokenizer = load_tokenizer(tiny_internlm)
    asked, answered = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in ('ask', 'say\x1b'))
    item = {'input_ids': asked + answered, 'labels': [-100] * len(asked) + answered}
    assert DatasetInfoHook([item], tokenizer).preview(item) == 'ask«say␛»'
    assert DatasetInfoHook([item], tokenizer, max_chars=5).preview(item) == 'ask«s … (9 characters)'


def test_a_stream_says_what_is_not_used_and_where_nothing_is_left(
    tiny_internlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger('xtuner'), 'propagate', True)
    caplog.set_level(logging.INFO, 'xtuner')
    file, tokenizer = tmp_path / 'data.jsonl', load_tokenizer(tiny_internlm)
    file.write_text(json.dumps({'question': 'q', 'answer': 'long ' * 50, 'score': 1}))

    def begin(**options: object) -> None:
        config = DatasetConfig(source=str(file), streaming=True, **options)
        stream = PackStream(config, tokenizer=tokenizer, template=get_template('internlm_chat', tokenizer))
        DatasetInfoHook(stream, tokenizer).before_train(SimpleNamespace(rank=0))

    begin(max_length=512)
    assert 'data, so far: `score` is not used (1 record)' in caplog.text
    with pytest.raises(
        DataError, match=r'contains no conversation to train on; .*1 dropped because longer than max_length'
    ):
        begin(max_length=8, on_long='drop')
