"""Characters of several tokens in a stream."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.serve.conftest import serving
from tests.serve.test_guard import chat
from xtuner.inference.generate import Sampling


def test_a_character_of_several_tokens_comes_whole(loaded: Any, endless: Any) -> None:
    """The model is made to say a text whose characters are spelled byte by byte."""
    text = 'Ça va? 你好 🙂 é'
    tokenizer = loaded.served[0].tokenizer
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert len(ids) > len(text), 'no character of several tokens'
    said = iter(ids)

    def say(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        time.sleep(0.005)
        logits = torch.zeros(1, len(tokenizer))
        logits[0, next(said)] = 1
        return logits

    type(endless).prefill, type(endless).step = say, say
    with serving(loaded, decoder=endless, sampling=Sampling(64, 0)) as running:
        stream = running.client().chat.completions.create(**chat(running, max_tokens=len(ids), stream=True))
        pieces = [chunk.choices[0].delta.content or '' for chunk in stream]
    assert ''.join(pieces) == text
    assert '\ufffd' not in ''.join(pieces)
    assert len([piece for piece in pieces if piece]) > 3, 'it came in one piece'


@pytest.mark.parametrize('left_out', [1, 2, 3])
def test_a_character_that_is_cut_is_left_out(loaded: Any, endless: Any, left_out: int) -> None:
    """`max_tokens` ends the answer inside a character: nothing of it goes out, whole or as a stream."""
    import torch

    tokenizer = loaded.served[0].tokenizer
    ids = tokenizer('Hi 🙂', add_special_tokens=False)['input_ids']
    said = iter([*ids[:-left_out], *ids[:-left_out]])

    def say(*args: Any, **kwargs: Any) -> Any:
        logits = torch.zeros(1, len(tokenizer))
        logits[0, next(said)] = 1
        return logits

    endless.prefill = endless.step = say
    with serving(loaded, decoder=endless, sampling=Sampling(64, 0)) as running:
        asked: Any = chat(running, max_tokens=len(ids) - left_out)
        whole = running.client().chat.completions.create(**asked)
        stream = running.client().chat.completions.create(**asked, stream=True)
        assert ''.join(chunk.choices[0].delta.content or '' for chunk in stream) == 'Hi '
        assert whole.choices[0].message.content == 'Hi '
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ('length', len(ids) - left_out)
