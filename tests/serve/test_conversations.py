"""Conversations that training data may not have: empty answers, several messages in a row, a greeting first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.serve.conftest import Running
from tests.serve.test_guard import chat, post
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.templates.builtin import TEMPLATES, get_template
from xtuner.errors import DataError

ODD: dict[str, list[dict[str, Any]]] = {
    'an empty answer': [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': ''},
                        {'role': 'user', 'content': 'two'}],
    'an answer of blanks': [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': ' \n'},
                            {'role': 'user', 'content': 'two'}],
    'an answer of empty parts': [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': []},
                                 {'role': 'user', 'content': 'two'}],
    'two in a row': [{'role': 'user', 'content': 'one'}, {'role': 'user', 'content': 'two'}],
    'a greeting': [{'role': 'assistant', 'content': 'hello'}, {'role': 'user', 'content': 'one'}],
    'a greeting and a system text': [{'role': 'system', 'content': 'brief'}, {'role': 'assistant', 'content': 'hello'},
                                     {'role': 'user', 'content': 'one'}],
}  # fmt: skip
STRICT = (
    '{%- for m in messages -%}{%- if (m.role == "user") != (loop.index0 % 2 == 0) -%}'
    '{{- raise_exception("roles must alternate") -}}{%- endif -%}<s>{{- m.role ~ ": " ~ m.content -}}</s>'
    '{%- endfor -%}{%- if add_generation_prompt -%}<s>assistant: {%- endif -%}'
)


@pytest.mark.parametrize('messages', ODD.values(), ids=ODD)
def test_the_service_answers_them(server: Running, messages: list[dict[str, Any]]) -> None:
    assert post(server, chat(server, messages=messages)) == (200, {})


def test_the_request_of_a_user(server: Running) -> None:
    request = ROOT.parent / 'shared' / 'cases' / 'empty_turn_serve' / 'request.json'
    if not request.is_file():
        pytest.skip(f'{request} is absent')
    assert post(server, json.loads(request.read_text()) | {'model': server.base})[0] == 200


@pytest.mark.parametrize('name', sorted(TEMPLATES.module_dict))
@pytest.mark.parametrize('messages', ODD.values(), ids=ODD)
def test_each_template_of_ours_shows_all_of_it_or_says_why_not(
    name: str, messages: list[dict[str, Any]], loaded: Any
) -> None:
    template, tokenizer = get_template(name), loaded.served[0].tokenizer
    try:
        shown = tokenizer.decode(encode_prompt(messages, tokenizer, template))
    except DataError as error:
        assert not any(messages is ODD[kind] for kind in ODD if 'answer' in kind), 'its roles are in turn'
        assert template.alternates or (messages[0]['role'] == 'system' and template.system_in_user)
        assert str(error)
        return
    at = 0
    for message in messages:
        if message['content']:
            at = shown.index(message['content'], at) + len(message['content'])


def test_a_tokenizers_own_template_decides_for_itself(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded.served[0].tokenizer
    monkeypatch.setattr(tokenizer, 'chat_template', STRICT)
    template = get_template('from_tokenizer', tokenizer)
    assert encode_prompt(ODD['an empty answer'], tokenizer, template)
    for kind in ('two in a row', 'a greeting'):
        with pytest.raises(DataError, match='roles must alternate'):
            encode_prompt(ODD[kind], tokenizer, template)


@pytest.mark.parametrize('kind', ['an empty answer', 'two in a row', 'a greeting'])
def test_training_data_stays_strict(kind: str) -> None:
    with pytest.raises(DataError):
        to_conversation({'messages': ODD[kind]})


@pytest.mark.parametrize('messages', [
    [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': ''}],
    [{'role': 'user', 'content': '1'}, *2 * [{'role': 'assistant', 'content': '2'}], {'role': 'user', 'content': '3'}],
    [{'role': 'tool', 'content': 'one'}],
    [{'role': 'user', 'content': 'one'}, {'role': 'system', 'content': 'two'}, {'role': 'user', 'content': 'three'}],
])  # fmt: skip
def test_what_has_no_order_is_refused_with_a_reason(server: Running, messages: list[dict[str, Any]]) -> None:
    status, error = post(server, chat(server, messages=messages))
    assert status == 400 and ('out of order' in error['message'] or 'ends with an answer' in error['message'])
