from __future__ import annotations

import pytest

from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.errors import DataError

pytestmark = pytest.mark.unit

USER, ANSWER = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}


def test_both_forms_become_the_same():
    turns = {'conversation': [{'system': 's', 'input': 'q', 'output': 'a'}, {'input': None, 'output': 'b', 'loss': 0}]}
    messages = {'messages': [{'role': 'system', 'content': 's'}, USER, ANSWER, {'role': 'human', 'content': None},
                             {'role': 'gpt', 'content': [{'type': 'text', 'text': 'b'}], 'loss': False}]}  # fmt: skip
    found = to_conversation(turns, 'f:1')
    assert found == to_conversation(messages, 'f:1') == to_conversation(found)
    assert found.messages[-1] == Message('assistant', 'b', loss=False)


def test_tools_and_calls_are_kept():
    call = {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 1}]}
    record = {'messages': [USER, call, {'role': 'tool', 'content': 'r', 'name': 'f'}, ANSWER], 'tools': '[{"x": 1}]'}
    found = to_conversation(record)
    assert found.tools == ({'x': 1},)
    assert found.messages[1].extra == {'tool_calls': [{'id': 1}]} and found.messages[2].extra == {'name': 'f'}


@pytest.mark.parametrize(
    ('record', 'text'),
    [
        ([], 'returned list, not a dict'),
        ({'text': 1}, r"returned the keys \['text'\]; it must return `conversation` or `messages`"),
        ({'conversation': 'x'}, '`conversation` must be a list with at least one turn'),
        ({'conversation': [{'input': 'q'}]}, r'`conversation\[0\]` must be a dict with `input` and `output`'),
        ({'conversation': [{'input': 'q', 'output': ''}]}, r'`conversation\[0\].output` is empty'),
        ({'conversation': [{'input': 'q', 'output': ' \n'}]}, r'`conversation\[0\].output` is empty'),
        ({'conversation': [{'input': 'q', 'output': None}]}, r'`conversation\[0\].output` must be text, got NoneType'),
        ({'conversation': [{'input': 3, 'output': 'a'}]}, r'`conversation\[0\].input` must be text, got int 3'),
        ({'conversation': [{'input': 'q', 'output': 'a', 'loss': 'yes'}]}, r"`conversation\[0\].loss` must be true"),
        ({'messages': []}, '`messages` must be a list with at least one message'),
        ({'messages': ['x']}, r"`messages\[0\]` must be a dict with `role` and `content`, got 'x'"),
        ({'messages': [{'role': 'usr', 'content': 'q'}]}, r"`messages\[0\].role` is 'usr'; known: "),
        ({'messages': [{'role': ['user'], 'content': 'q'}]}, r"`messages\[0\].role` is \['user'\]; known: "),
        ({'messages': [USER, {'role': 'assistant', 'content': ''}]}, r'`messages\[1\].content` is empty'),
        ({'messages': [USER, {'role': 'assistant', 'content': [{'type': 'image'}]}]}, 'a part that is not text'),
        ({'messages': [ANSWER]}, "roles out of order: message 1, 'assistant', comes first"),
        ({'messages': [USER, USER]}, "roles out of order: message 2, 'user', follows 'user'"),
        ({'messages': [USER, ANSWER, ANSWER]}, "message 3, 'assistant', follows 'assistant'"),
        ({'messages': [USER, {'role': 'tool', 'content': 'r'}]}, "message 2, 'tool', follows 'user'"),
        ({'messages': [USER, {'role': 'system', 'content': 's'}]}, "message 2, 'system', follows 'user'"),
        ({'messages': [USER, ANSWER], 'tools': '{'}, '`tools` is not valid JSON'),
        ({'messages': [USER, ANSWER], 'tools': 3}, '`tools` must be a list, got int'),
        ({'messages': [USER, {'role': 'assistant', 'content': 'half \ud800'}]}, 'lone surrogate'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(record, text):
    with pytest.raises(DataError, match=text) as caught:
        to_conversation(record, 'file.jsonl:12')
    assert str(caught.value).startswith('file.jsonl:12: ') and '\n' not in str(caught.value)


def test_a_conversation_is_checked_too():
    with pytest.raises(DataError, match='f:1: roles out of order'):
        to_conversation(Conversation((Message('assistant', 'a'),)), 'f:1')
