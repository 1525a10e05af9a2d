"""What the log shows of the first item."""

from __future__ import annotations

from pathlib import Path

from xtuner.engine.hooks.dataset_info import DatasetInfoHook
from xtuner.model.loading import load_tokenizer


def test_trained_tokens_are_marked_and_the_text_is_cut(tiny_internlm: Path) -> None:
    tokenizer = load_tokenizer(tiny_internlm)
    asked, answered = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in ('ask', 'say\x1b'))
    item = {'input_ids': asked + answered, 'labels': [-100] * len(asked) + answered}
    assert DatasetInfoHook([item], tokenizer).preview(item) == 'ask«say␛»'
    assert DatasetInfoHook([item], tokenizer, max_chars=5).preview(item) == 'ask«s … (9 characters)'
