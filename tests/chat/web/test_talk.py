"""Conversations over one set of weights: what each voice remembers, stops, errors, the lock, the export."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat.web.scripted import Scripted, share
from xtuner.chat.load import open_chat_model
from xtuner.chat.web.talk import ADAPTER, BASE, SharedModel, Talk, Turn
from xtuner.inference.generate import Sampling


class Stop(BaseException):
    """As Streamlit's own: no Exception."""


def nothing(*_: object) -> None:
    pass


def say(talk: Talk, text: str, on_text: Callable[[str], None] = nothing) -> Turn:
    talk.pending = text
    turn = talk.begin_turn()
    for voice in talk.voices:
        talk.answer(turn, voice, on_text=on_text, on_wait=nothing)
    return turn


def stop_at(ending: str) -> Callable[[str], None]:
    def on_text(text: str) -> None:
        if text.endswith(ending):
            raise Stop

    return on_text


def remembered(model: Scripted) -> list[str]:
    return [message.content for message in model.sessions[-1].history]


def test_an_answer_grows_and_is_remembered() -> None:
    model, shown = Scripted(), []
    talk = Talk(share(model))
    say(talk, 'one', shown.append)
    assert shown == ['You', 'You said', 'You said *one*.']
    turn = say(talk, 'settings')
    assert turn.answers[ADAPTER].text.endswith("'Be kind.' 2 before")
    assert talk.pending == ''


def test_the_base_answers_without_the_adapter_and_remembers_its_own_words() -> None:
    model = Scripted()
    talk = Talk(share(model))
    say(talk, 'one')
    talk.compare = True
    turn = say(talk, 'two')
    assert [turn.answers[v].text for v in (BASE, ADAPTER)] == ['Base: You said *two*.', 'You said *two*.']
    say(talk, 'three')
    base, adapter = ([m.content for m in s.history] for s in model.sessions[-2:])
    assert base[1::2] == ['You said *one*.', 'Base: You said *two*.', 'Base: You said *three*.']
    assert adapter[1::2] == ['You said *one*.', 'You said *two*.', 'You said *three*.']
    talk.compare = False
    say(talk, 'four')
    talk.compare = True
    say(talk, 'five')
    assert [m.content for m in model.sessions[-2].history][7] == 'You said *four*.'  # not its own old words
    assert model.adapter_on


def test_without_an_adapter_there_is_one_voice_and_nothing_to_switch_off() -> None:
    model = Scripted()
    talk = Talk(share(model, adapter=''))
    talk.compare = True
    assert talk.voices == (BASE,)
    assert say(talk, 'one').answers[BASE].text == 'You said *one*.'


def test_a_stopped_answer_is_kept_as_far_as_it_came() -> None:
    model = Scripted()
    shared = share(model)
    talk = Talk(shared)
    with pytest.raises(Stop):
        say(talk, 'count 9', stop_at('3'))
    answer = talk.turns[0].answers[ADAPTER]
    assert (answer.text, answer.stopped, model.num_words) == ('1 2 3', True, 3)
    say(talk, 'next')
    assert remembered(model)[:3] == ['count 9', '1 2 3', 'next']
    with pytest.raises(Stop):
        say(talk, 'before a word', stop_at('You'))
    assert say(Talk(shared), 'another tab').answers[ADAPTER].text  # the lock is free, the adapter on


def test_a_stop_while_the_base_speaks_puts_the_adapter_back() -> None:
    model = Scripted()
    talk = Talk(share(model))
    talk.compare = True
    with pytest.raises(Stop):
        say(talk, 'one', stop_at('You'))
    assert model.adapter_on
    assert list(talk.turns[0].answers) == [BASE]


def test_one_answer_at_a_time_and_a_waiting_tab_may_give_up() -> None:
    model = Scripted(delay_s=0.02)
    shared = share(model)
    threads = [threading.Thread(target=say, args=(Talk(shared), 'count 20')) for _ in range(3)]
    for thread in threads:
        thread.start()
    waiting = Talk(shared)
    waiting.pending = 'and I?'

    def lose_patience() -> None:
        raise Stop

    turn = waiting.begin_turn()
    with pytest.raises(Stop):
        waiting.answer(turn, ADAPTER, on_text=nothing, on_wait=lose_patience)
    for thread in threads:
        thread.join()
    assert turn.answers[ADAPTER].stopped
    assert model.most_speaking == 1


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('fail', 'this message is longer than the model can read'),
        ('bug', 'unexpected ZeroDivisionError: a bug (the terminal has the traceback)'),
    ],
)
def test_an_error_is_one_line_and_the_conversation_goes_on(text: str, error: str) -> None:
    model = Scripted()
    talk = Talk(share(model))
    say(talk, 'one')
    answer = say(talk, text).answers[ADAPTER]
    assert (answer.error, answer.stopped) == (error, False)
    say(talk, 'two')
    assert remembered(model) == ['one', 'You said *one*.', 'two', 'You said *two*.']


def test_the_export_is_a_record_for_training(tmp_path: Path) -> None:
    talk = Talk(share(Scripted()))
    say(talk, 'one')
    say(talk, 'empty')
    say(talk, '你好\n')
    with pytest.raises(Stop):
        say(talk, 'count 9', stop_at('2'))
    [line] = talk.export(ADAPTER).splitlines()
    assert '你好' in line
    assert json.loads(line)['messages'] == [
        {'role': 'system', 'content': 'Be kind.'},
        {'role': 'user', 'content': 'one'},
        {'role': 'assistant', 'content': 'You said *one*.'},
        {'role': 'user', 'content': '你好\n'},
        {'role': 'assistant', 'content': 'You said *你好\n*.'},
        {'role': 'user', 'content': 'count 9'},
        {'role': 'assistant', 'content': '1 2'},
    ]
    talk.clear()
    assert talk.export(ADAPTER) == '{"messages": [{"role": "system", "content": "Be kind."}]}\n'


@pytest.fixture(scope='module')
def adapted(tiny_internlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model with a strong random adapter, and its adapter's folder."""
    from peft import LoraConfig, get_peft_model

    from xtuner.model.loading import load_model

    folder = tmp_path_factory.mktemp('adapter')
    model: Any = load_model(tiny_internlm, dtype=torch.float32, quantization=None, device='cpu')
    model = get_peft_model(model, LoraConfig(r=4, target_modules='all-linear', init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_both_voices_over_one_set_of_weights_say_what_each_alone_says(tiny_internlm: Path, adapted: Path) -> None:
    sampling = Sampling(12, 0.0, 1.0)
    alone = []
    for adapter in (None, adapted):
        chat = open_chat_model(str(tiny_internlm), adapter=adapter, template='internlm_chat')
        alone.append(chat.session(sampling=sampling).ask('Hello', nothing))
    assert alone[0] != alone[1]
    talk = Talk(SharedModel(chat, name='tiny', adapter='mine', system='', sampling=sampling))
    talk.compare = True
    for _ in range(2):  # off and on again leaves no trace
        talk.clear()
        assert [a.text for a in say(talk, 'Hello').answers.values()] == alone
