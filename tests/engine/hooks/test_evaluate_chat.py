"""Samples within a run: what fails on the rank that records them does not leave the other ranks behind."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from xtuner.dataset.conversation import Message
from xtuner.engine.hooks import EvaluateChatHook


def test_an_answer_that_cannot_be_recorded_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, 'xtuner')
    agreed: list[str] = []
    hook: Any = object.__new__(EvaluateChatHook)
    hook._prints = True
    monkeypatch.setattr(hook, '_generate', lambda *_, **__: [1, 2])

    def full_disk(*_: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hook, '_print', full_disk)
    watch = SimpleNamespace(agree_on_success=lambda what, failure: agreed.append(failure))
    runner = SimpleNamespace(strategy=SimpleNamespace(together=True), watch=watch, bare_model=SimpleNamespace(llm=None))
    hook._sample(runner, [Message('user', 'hi')], 1, 7)
    assert agreed == ['']
    assert 'sample at step 7 was not recorded, training continues: OSError' in caplog.text
