"""Texts that spell control tokens: encoded as their characters, however many there are and whoever else encodes."""

from __future__ import annotations

import threading
import time

import pytest
from tokenizers import AddedToken

from tests.dataset.conftest import make_spaced_tokenizer, make_tokenizer
from xtuner.dataset.encode.text_encoder import MIDDLE, TextEncoder, TextRun


def encoder_of(make, names=('<A>',)):
    tokenizer = make(['<eoa>'])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer, TextEncoder(tokenizer, {name: tokenizer.convert_tokens_to_ids(name) for name in names})


@pytest.mark.parametrize('make', [make_tokenizer, make_spaced_tokenizer])
def test_any_number_of_markers_that_are_no_special_tokens_become_text(make):
    tokenizer, encoder = encoder_of(make)
    [ids] = encoder.encode([TextRun('x<A>' * 3000, MIDDLE, True)])
    assert tokenizer.convert_tokens_to_ids('<A>') not in ids
    assert ''.join(tokenizer.decode(ids).split()) == 'x<A>' * 3000  # the spaced one decodes with spaces between


def test_the_time_grows_with_the_text_and_not_with_its_square():
    _, encoder = encoder_of(make_tokenizer)

    def seconds(count: int) -> float:
        began = time.thread_time()
        encoder.encode([TextRun('x<A>' * count, MIDDLE, True)])
        return time.thread_time() - began

    seconds(100)
    assert seconds(8000) < 30 * max(seconds(1000), 0.002)  # 8 where linear, 64 where not


def test_what_is_left_of_a_marker_that_was_cut_is_no_marker_either():
    """`ab` cut behind its first character leaves `bc`, and `aa` leaves `aa` in a row of them."""
    tokenizer, encoder = encoder_of(make_tokenizer, names=('ab', 'bc', 'aa'))
    [ids] = encoder.encode([TextRun('abc' + 'a' * 500 + 'abc', MIDDLE, True)])
    assert not {tokenizer.convert_tokens_to_ids(name) for name in ('ab', 'bc', 'aa')} & set(ids)
    assert tokenizer.decode(ids) == 'abc' + 'a' * 500 + 'abc'


def test_two_threads_that_encode_with_one_tokenizer_get_what_each_alone_gets():
    """Such as a stream of data and the samples of a training: no setting of the tokenizer they share is touched."""
    tokenizer = make_spaced_tokenizer(['<|eoa|>'])
    encoders = [TextEncoder(tokenizer, {'<|eoa|>': tokenizer.convert_tokens_to_ids('<|eoa|>')}) for _ in range(2)]
    texts = [f'a <|eoa|> b{number} ' + 'Hello there ' * 3000 for number in range(40)]
    alone = encoders[0].encode([TextRun(text, MIDDLE, True) for text in texts])
    found: list[list[list[int]]] = [[], []]

    def encode(number: int) -> None:
        found[number] = [encoders[number].encode([TextRun(text, MIDDLE, True)])[0] for text in texts]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]
