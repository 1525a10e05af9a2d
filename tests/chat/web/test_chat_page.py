"""The page through Streamlit's own test harness: what is drawn, and what each control does."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('streamlit', reason="the page needs Streamlit: pip install 'xtuner[web]'")

from streamlit.testing.v1 import AppTest

from tests.chat.web.scripted import Scripted, share
from tests.hostile_text import COMMANDS, HOSTILE, obeyed
from xtuner.chat.web import app
from xtuner.cli.main import main
from xtuner.errors import UsageError


@pytest.fixture
def model() -> Any:
    scripted = Scripted()
    app.share_model(share(scripted))
    return scripted


@pytest.fixture(autouse=True)
def _main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit makes the page the main module, which processes that other tests start would then run."""
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])


def open_page() -> AppTest:
    page = AppTest.from_file(str(app.PAGE), default_timeout=30).run()
    assert not page.exception
    return page


def say(page: AppTest, text: str) -> AppTest:
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def texts(page: AppTest) -> list[list[str]]:
    """What each bubble shows."""
    return [[part.value for kind in (bubble.text, bubble.markdown, bubble.caption) for part in kind]
            for bubble in page.chat_message]  # fmt: skip


def test_a_conversation_of_two_turns(model: Scripted) -> None:
    page = open_page()
    assert page.title[0].value == 'tiny'
    say(page, 'one')
    say(page, 'two')
    assert texts(page) == [['one'], ['You said *one*.'], ['two'], ['You said *two*.']]
    assert not page.title
    assert [m.content for m in model.sessions[-1].history] == ['one', 'You said *one*.', 'two', 'You said *two*.']
    assert not page.chat_input[0].proto.disabled


def test_settings_reach_the_answer(model: Scripted) -> None:
    page = open_page()
    page.slider(key='length').set_value(33).run()
    page.slider(key='temperature').set_value(0.25).run()
    page.slider(key='top_p').set_value(0.5).run()
    page.text_area(key='system').set_value('Be brief.').run()
    say(page, 'settings')
    said = texts(page)[1][0]
    assert 'max_new_tokens=33, temperature=0.25, top_p=0.5, seed=None' in said
    assert "'Be brief.' 0 before" in said


def test_clear_forgets_what_was_said_and_keeps_the_settings(model: Scripted) -> None:
    page = open_page()
    assert page.button[0].disabled
    page.text_area(key='system').set_value('Be brief.').run()
    say(page, 'one')
    page.button[0].click().run()
    assert texts(page) == []
    say(page, 'settings')
    assert texts(page)[1][0].endswith("'Be brief.' 0 before")


def test_side_by_side(model: Scripted) -> None:
    page = open_page()
    page.toggle(key='compare').set_value(True).run()
    say(page, 'one')
    assert [[m.value for m in column.markdown] for column in page.chat_message[1].columns] == [
        ['Base: You said *one*.'],
        ['You said *one*.'],
    ]


def test_a_model_without_an_adapter_has_nothing_to_compare(model: Scripted) -> None:
    app.share_model(share(model, adapter=''))
    page = open_page()
    assert not page.toggle
    assert texts(say(page, 'one'))[1] == ['You said *one*.']


def test_what_went_otherwise_is_said(model: Scripted) -> None:
    page = open_page()
    say(page, 'fail')
    assert page.error[0].value == 'this message is longer than the model can read'
    say(page, 'empty')
    assert texts(page)[-1] == ['The model gave an empty answer.']
    say(page, 'drop')
    assert 'the oldest turn was dropped' in texts(page)[-1][1]
    say(page, 'long')
    assert texts(page)[-1][1] == 'The prompt is long: this answer was limited to 5 tokens.'
    assert len(page.chat_message) == 8  # what the model no longer reads still stands there


def test_each_tab_has_its_own_conversation(model: Scripted) -> None:
    first, second = open_page(), open_page()
    say(first, 'one')
    say(second, 'two')
    say(first, 'three')
    assert [m.content for m in model.sessions[-1].history][::2] == ['one', 'three']
    assert texts(second) == [['two'], ['You said *two*.']]


def test_messages_are_text_and_answers_are_made_safe(model: Scripted) -> None:
    page = open_page()
    say(page, '![x](http://outside/x.png) for $5')
    assert [part.value for part in page.chat_message[0].text] == ['![x](http://outside/x.png) for $5']
    assert not page.chat_message[0].markdown
    assert texts(page)[1] == ['You said *\\![x](http://outside/x.png) for \\$5*.']
    assert not any(m.allow_html for m in page.markdown)


def test_text_of_strangers_is_shown_as_text(model: Scripted) -> None:
    """The message, the answer, an error, the names of model and adapter."""
    model.replies = {'hostile': HOSTILE}
    shared = share(model, adapter=HOSTILE.replace('/', ''))
    shared.name = HOSTILE.replace('/', '')
    app.share_model(shared)
    page = open_page()
    shown = [page.title[0].value, page.sidebar.subheader[0].value, page.sidebar.caption[0].value]
    say(page, 'hostile')
    say(page, COMMANDS)
    say(page, 'fail: ' + HOSTILE)
    shown.append(page.error[0].value)
    for value in shown:
        assert 'clear' in value and not obeyed(value)
        assert not re.search(r'(?<!\\)[<\[`$!:&@]', value), 'Markdown would be read'
    assert not any(obeyed(value) for bubble in texts(page) for value in bubble)
    answer = texts(page)[1][0]
    assert not re.search(r'(?<!\\)!\[', answer) and '\\(javascript:' in answer


def test_the_page_without_a_model_says_how_to_start_it() -> None:
    app._shared = None
    with pytest.raises(UsageError, match='start the page with `xtuner chat LLM --web`'):
        app.shared_model()


@pytest.mark.parametrize(
    ('words', 'status', 'message'),
    [
        (['--port', '8501'], 2, '--port sets the port of the web page; add --web'),
        (['--web', '--port', '0'], 2, '--port: must be at least 1'),
        (['--web'], 1, 'no such folder'),
    ],
)
def test_a_wrong_call_ends_before_the_page_starts(
    words: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['chat', str(tmp_path / 'nothing'), *words]) == status
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_taken_port_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(['chat', 'no-model', '--web', '--port', str(port)]) == 2
    assert f'--port {port}: Address already in use' in capsys.readouterr().err


def test_a_missing_streamlit_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, 'xtuner.chat.web.app')
    monkeypatch.setitem(sys.modules, 'streamlit.starlette', None)  # none, or one too old
    assert main(['chat', 'no-model', '--web']) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert '--web needs Streamlit' in line
    assert line.endswith("pip install 'xtuner[web]'")


def test_the_export_of_the_newest_voice(model: Scripted) -> None:
    page = open_page()
    say(page, 'one')
    talk = page.session_state['talk']
    assert json.loads(talk.export(talk.voices[-1]))['messages'][-1]['content'] == 'You said *one*.'
