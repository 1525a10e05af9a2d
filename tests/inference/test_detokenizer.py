"""Incremental text: each id decoded once, no incomplete characters, nothing of a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.model.loading import load_tokenizer


@pytest.fixture(scope='module')
def tokenizer(tiny_internlm: Path) -> Any:
    return load_tokenizer(tiny_internlm)


def read(text: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    pieces = []
    for id_ in ids:
        pieces.append(text.push(id_))
        if text.stopped:
            return pieces
    return [*pieces, text.end()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, 799), max_size=30))
def test_the_pieces_are_the_whole(tokenizer: Any, ids: list[int]) -> None:
    """Any ids, including invalid UTF-8; an incomplete character at the end is dropped."""
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip('\ufffd')
    assert ''.join(read(IncrementalDetokenizer(tokenizer), ids)) == whole


@pytest.mark.parametrize('stop', [(), ('never said',), ('Hi there',)])
def test_a_character_that_is_cut_is_left_out(tokenizer: Any, stop: tuple[str, ...]) -> None:
    ids = tokenizer('Hi 🙂', add_special_tokens=False)['input_ids']
    assert len(ids) >= 5, 'the emoji is no sequence of bytes'
    for left_out in (1, 2, 3):
        assert ''.join(read(IncrementalDetokenizer(tokenizer, stop), ids[:-left_out])) == 'Hi '
    assert ''.join(read(IncrementalDetokenizer(tokenizer, stop), ids)) == 'Hi 🙂'


def test_a_special_token_does_not_spoil_what_is_shown(tokenizer: Any) -> None:
    ids = tokenizer('Hello', add_special_tokens=False)['input_ids']
    pieces = read(IncrementalDetokenizer(tokenizer), [*ids, tokenizer.bos_token_id, *ids])
    assert ''.join(pieces).split() == ['Hello', '<s>Hello'] or ''.join(pieces).split() == ['Hello', '<s>', 'Hello']


@settings(max_examples=300, deadline=None)
@given(st.text('ab ', max_size=14), st.lists(st.text('ab ', min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_words_end_at_the_first_that_comes(tokenizer: Any, said: str, stop: list[str]) -> None:
    ids = [i for c in said for i in tokenizer(c, add_special_tokens=False)['input_ids']]  # a token a character
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert whole == said
    text = IncrementalDetokenizer(tokenizer, stop)
    shown = ''.join(read(text, ids))
    ends = [at for n in range(len(said) + 1) for word in stop if (at := said[:n].find(word)) >= 0]
    assert text.stopped == bool(ends)
    first = min((n for n in range(len(said) + 1) if any(word in said[:n] for word in stop)), default=len(said))
    want = min((at for word in stop if (at := said[:first].find(word)) >= 0), default=len(said))
    assert shown == said[:want]


def test_only_what_may_begin_a_stop_word_is_held_back(tokenizer: Any) -> None:
    text = IncrementalDetokenizer(tokenizer, ['bbc'])
    ids = {c: tokenizer(c, add_special_tokens=False)['input_ids'][0] for c in 'abc'}
    assert [text.push(ids[c]) for c in 'abbab'] == ['a', '', '', 'bba', '']
    assert text.end() == 'b'


def test_the_cost_of_an_id_does_not_grow(tokenizer: Any) -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids, **options)

    counting = Counting()
    read(IncrementalDetokenizer(counting), tokenizer('one two three ' * 50, add_special_tokens=False)['input_ids'])
    assert counting.longest <= 8
