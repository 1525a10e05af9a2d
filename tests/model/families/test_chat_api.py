"""`chat` and `stream_chat` with a scripted model: prompts, streamed text, stopping."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.published import CONFIGS, VOCAB, pieces, write_model, write_tokenizer
from xtuner.inference.detokenizer import TextStream
from xtuner.inference.generate import Sampling
from xtuner.model.families import chat_api
from xtuner.model.loading import load_model, load_tokenizer


class Script(torch.nn.Module):
    """A head that predicts the given ids one after the other."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.num_calls = ids, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*hidden.shape[:-1], VOCAB), -1e4)
        logits[..., self.ids[self.num_calls]] = 0
        self.num_calls += 1
        return logits


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load_model(write_model(tmp_path, 'v1'), dtype=torch.float32)


def say(model: Any, tokenizer: Any, text: str) -> Script:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    model.lm_head = Script([*ids, *ids, *ids, *ids])
    return model.lm_head


def test_chat_stops_at_the_end_of_the_answer(model: Any, tokenizer: Any) -> None:
    say(model, tokenizer, 'Hello, how are you?<eoa>and more')
    response, history = model.chat(tokenizer, 'hello', history=[])
    assert response == 'Hello, how are you?'
    assert history == [('hello', response)]
    say(model, tokenizer, 'I am well</s>and more')
    response, history = model.chat(tokenizer, 'and?', history=history)
    assert response == 'I am well'
    assert history == [('hello', 'Hello, how are you?'), ('and?', 'I am well')]


def test_a_character_that_is_cut_is_left_out(model: Any, tokenizer: Any) -> None:
    say(model, tokenizer, 'Hi 🙂')
    num = len(tokenizer('Hi 🙂', add_special_tokens=False).input_ids)
    for left_out in (1, 2):
        model.lm_head.num_calls = 0
        assert model.chat(tokenizer, 'hello', max_new_tokens=num - left_out)[0] == 'Hi '
        model.lm_head.num_calls = 0
        *_, (last, _) = model.stream_chat(tokenizer, 'hello', max_new_tokens=num - left_out)
        assert last == 'Hi '


def test_stream_shows_more_and_more_of_the_same_answer(model: Any, tokenizer: Any) -> None:
    say(model, tokenizer, 'how are you 世 é well .<eoa>')
    seen = list(model.stream_chat(tokenizer, 'Hello', history=[('a', 'b')]))
    responses = [response for response, _ in seen]
    assert len(responses) > 4
    assert not any('\ufffd' in response for response in responses)
    say(model, tokenizer, 'how are you 世 é well .<eoa>')
    response, history = model.chat(tokenizer, 'Hello', history=[('a', 'b')])
    assert response == 'how are you 世 é well.'  # the original's clean-up
    assert seen[-1] == (response, history) == (response, [('a', 'b'), ('Hello', response)])


def test_an_empty_answer(model: Any, tokenizer: Any) -> None:
    say(model, tokenizer, '<eoa>')
    assert list(model.stream_chat(tokenizer, 'Hello')) == [('', [('Hello', '')])]
    say(model, tokenizer, '<eoa>')
    assert model.chat(tokenizer, 'Hello') == ('', [('Hello', '')])


def test_the_defaults_of_the_model_card(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        'xtuner.model.families.chat_api.generate', lambda *args, **keywords: asked.update(keywords) or []
    )
    model.chat(tokenizer, 'hello', history=[])
    assert asked['sampling'] == Sampling(max_new_tokens=1024, temperature=0.8, top_p=0.8)
    assert sorted(asked['stop_ids']) == sorted([2, pieces_id(tokenizer, '<eoa>')])
    model.chat(tokenizer, 'hello', history=[], do_sample=False, max_new_tokens=5)
    assert asked['sampling'] == Sampling(max_new_tokens=5, temperature=0, top_p=0.8)


def pieces_id(tokenizer: Any, piece: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(piece))


def test_max_new_tokens_and_greedy_answers_are_generate_s(model: Any, tokenizer: Any) -> None:
    response, _ = model.chat(tokenizer, 'hello', do_sample=False, max_new_tokens=6)
    streamed = list(model.stream_chat(tokenizer, 'hello', do_sample=False, max_new_tokens=6))
    assert streamed[-1][0] == response


def test_closing_a_stream_ends_the_generation(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next token, on any machine: the sixth token is not generated before the stream is closed."""
    made: list[chat_api._Responses] = []

    class Waiting(Script):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if self.num_calls == 5:
                assert made[0].closed.wait(60)
            return super().forward(hidden)

    class Kept(chat_api._Responses):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(chat_api, '_Responses', Kept)
    script = model.lm_head = Waiting(say(model, tokenizer, 'the cat sat on the mat ' * 60).ids)
    stream = model.stream_chat(tokenizer, 'Hello')
    next(stream)
    stream.close()
    assert 1 <= script.num_calls <= 6
    assert not [thread for thread in threading.enumerate() if thread.name == 'stream_chat']


def test_what_fails_in_the_thread_is_raised(model: Any, tokenizer: Any) -> None:
    model.lm_head = Script([])
    with pytest.raises(IndexError):
        list(model.stream_chat(tokenizer, 'Hello'))


def test_internlm2_chats_too(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path, 'v2'), 'InternLM2')
    assert 'v2' in CONFIGS
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder, dtype=torch.float32)
    end = pieces(folder).index('[UNUSED_TOKEN_1]')
    model.output = Script([*tokenizer('the cat', add_special_tokens=False).input_ids, end, 5])
    assert model.chat(tokenizer, 'hi', meta_instruction='Be brief.') == ('the cat', [('hi', 'the cat')])


def test_a_stream_of_text_loses_no_punctuation(tokenizer: Any) -> None:
    """The original's clean-up removes the space before a full stop after it was streamed: streams skip it."""
    shown: list[str] = []
    stream = TextStream(tokenizer, shown.append, stop_ids=[2])
    stream.put(torch.tensor([[1]]))
    for i in tokenizer('how are you , well .', add_special_tokens=False).input_ids:
        stream.put(torch.tensor([i]))
    stream.end()
    assert ''.join(shown) == 'how are you , well .'


@pytest.mark.parametrize('seed', range(8))
def test_a_long_stream_is_the_text_of_all_its_ids(tokenizer: Any, seed: int) -> None:
    make = random.Random(seed)
    words = [
        'the',
        ' cat',
        ' ',
        '  ',
        'é',
        '世界',
        '🙂',
        '\n',
        '\n\n',
        '<|User|>:',
        ' .',
        '0',
        '\t',
        '<eoh>',
        '\ufffd',
        'Ω',
    ]
    text = ''.join(make.choices(words, k=150)) + 'end'
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > 200
    shown: list[str] = []
    stream = TextStream(tokenizer, shown.append, stop_ids=[2])
    stream.put(torch.tensor([[1]]))
    for i in ids:
        stream.put(torch.tensor([i]))
    stream.end()
    assert ''.join(shown) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) and stream.ids == ids


def test_a_long_stream_of_a_tokenizer_that_strips_the_first_space() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({'▁a': 0, '▁b': 1, 'c': 2, '<unk>': 3}, unk_token='<unk>'))
    inner.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = random.Random(0).choices(range(3), k=400)
    shown: list[str] = []
    stream = TextStream(tokenizer, shown.append, stop_ids=[9])
    for value in ([7], *([i] for i in ids)):
        stream.put(torch.tensor(value))
    stream.end()
    assert ''.join(shown) == tokenizer.decode(ids)
