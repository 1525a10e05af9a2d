"""A conversation: what is asked of the model, what is kept, what no longer fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.errors import DataError, ModelError
from xtuner.inference.generate import Sampling


def quiet(_: str) -> None:
    pass


def roles(session: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.history]


def test_turns_build_up(scripted: Any) -> None:
    session = scripted.session(system='Be kind.')
    scripted.model.script = ['I am well!<eoa>', '世界<eoa>']
    pieces: list[str] = []
    assert session.ask('how are you?', pieces.append) == 'I am well!' == ''.join(pieces)
    assert session.ask('你好', quiet) == '世界'
    assert scripted.model.prompts[1].lstrip() == (
        '<s><|System|>:Be kind.\n<|User|>:how are you?<eoh>\n<|Bot|>:I am well!<eoa>\n<|User|>:你好<eoh>\n<|Bot|>:'
    )
    session.system = ''
    scripted.model.script = ['one<eoa>']
    session.ask('two', quiet)
    assert 'System' not in scripted.model.prompts[2]


def test_a_character_of_several_tokens_comes_whole(scripted: Any) -> None:
    scripted.model.script = ['é 🙂 界<eoa>']
    pieces: list[str] = []
    scripted.session().ask('hi', pieces.append)
    assert ''.join(pieces) == 'é 🙂 界' and not any('\ufffd' in piece for piece in pieces)


def test_a_character_that_is_cut_is_left_out(scripted: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is shown, and in the history that the model reads next."""
    real = scripted.model.generate

    def cut(*args: Any, streamer: Any, **more: Any) -> list[int]:
        put, room = streamer.put, [1 + len(tokenizer('hi 🙂', add_special_tokens=False).input_ids) - 1]

        def some(value: Any) -> None:
            room[0] -= 1
            if room[0] >= 0:
                put(value)

        streamer.put = some
        return real(*args, streamer=streamer, **more)

    monkeypatch.setattr('xtuner.chat.session.generate', cut)
    scripted.model.script = ['hi 🙂']
    session, pieces = scripted.session(), list[str]()
    assert session.ask('hello', pieces.append) == 'hi ' == ''.join(pieces)
    assert roles(session)[-1] == ('assistant', 'hi ')


def test_the_oldest_turns_go_whole_and_are_counted(scripted: Any) -> None:
    session = scripted.session(max_length=100)
    scripted.model.script = [f'{i} I am well!<eoa>' for i in range(6)]
    for i in range(6):
        session.ask(f'{i} how are you?', quiet)
    assert session.num_dropped_turns > 0
    first = int(session.history[0].content[0])
    assert roles(session)[0] == ('user', f'{first} how are you?') and len(session.history) == 2 * (6 - first)
    assert session.num_dropped_turns == first
    assert f'<s><|User|>:{first} how are you?' in scripted.model.prompts[-1]


def test_a_long_message_shortens_the_answer_and_a_longer_one_is_an_error(scripted: Any) -> None:
    session = scripted.session(max_length=60, sampling=Sampling(max_new_tokens=50))
    scripted.model.script = ['one<eoa>', 'two<eoa>']
    session.ask('hi', quiet)
    session.ask('how are you? ' * 4, quiet)
    length = len(session._encode(session.history[:1]))
    assert session.num_dropped_turns == 1 and session.answer_limit == 60 - length < 50
    assert scripted.model.samplings[-1].max_new_tokens == session.answer_limit
    before = roles(session)
    with pytest.raises(DataError, match='the context length is 60'):
        session.ask('how are you? ' * 20, quiet)
    assert roles(session) == before and session.num_dropped_turns == 1


def test_what_ends_an_answer_leaves_the_conversation_alone(scripted: Any) -> None:
    session = scripted.session()
    scripted.model.script = ['one<eoa>', ['I am', KeyboardInterrupt()], 'two<eoa>']
    session.ask('first', quiet)
    pieces: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        session.ask('second', pieces.append)
    assert roles(session) == [('user', 'first'), ('assistant', 'one')] and ''.join(pieces) == 'I am'
    session.keep('second', 'I am')
    session.ask('third', quiet)
    assert '<|User|>:second<eoh>\n<|Bot|>:I am<eoa>\n<|User|>:third' in scripted.model.prompts[-1]


def test_undo(scripted: Any) -> None:
    session = scripted.session()
    assert session.undo() is None
    scripted.model.script = ['one<eoa>', 'two<eoa>']
    session.ask('first', quiet)
    session.ask('second', quiet)
    assert session.undo() == 'second' and roles(session) == [('user', 'first'), ('assistant', 'one')]
    assert session.undo() == 'first' and session.history == []


def test_a_saved_conversation_is_training_data(scripted: Any, tmp_path: Path) -> None:
    from xtuner.dataset.conversation import to_conversation

    session = scripted.session(system='Be kind.')
    with pytest.raises(DataError, match='no conversation'):
        session.save(tmp_path / 'a.jsonl')
    scripted.model.script = ['世界<eoa>']
    session.ask('你好', quiet)
    session.save(tmp_path / 'a.jsonl')
    session.save(tmp_path / 'a.jsonl')
    lines = (tmp_path / 'a.jsonl').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 2 and '世界' in lines[0]
    conversation = to_conversation(json.loads(lines[0]))
    assert [m.role for m in conversation.messages] == ['system', 'user', 'assistant']
    with pytest.raises(DataError, match='cannot be written'):
        session.save(tmp_path / 'absent' / 'a.jsonl')


def test_memory_that_runs_out_in_the_middle_ends_the_answer_in_words(scripted: Any) -> None:
    """The conversation stays as it was, and goes on."""
    session = scripted.session()
    scripted.model.script = ['one<eoa>', ['two', torch.OutOfMemoryError('CUDA out of memory. Tried ...')], 'three<eoa>']
    session.ask('hi', quiet)
    before = session.history
    with pytest.raises(ModelError, match='memory during this answer; limit its length'):
        session.ask('and?', quiet)
    assert session.history == before
    assert session.ask('and?', quiet) == 'three'
