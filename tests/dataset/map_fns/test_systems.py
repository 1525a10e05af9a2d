"""System texts of a record."""

from __future__ import annotations

import pytest

from tests.dataset.map_fns.test_registration import RECORDS, TURN, texts
from xtuner.errors import DataError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('name', ['alpaca', 'sharegpt', 'openai', 'conversation'])
def test_a_system_text_may_be_called_system_prompt(name):
    record = {key: value for key, value in RECORDS[name].items() if key not in ('system', 'tools')}
    if name == 'conversation':
        record = {'conversation': [{'input': 'q', 'output': 'a'}]}
    expected = texts(name, {**record, 'system': 'Be brief.'})
    assert expected[0][0] == ('system', 'Be brief.')
    assert texts(name, {**record, 'system_prompt': 'Be brief.'}) == expected
    assert texts(name, {**record, 'system': 'Be brief.', 'system_prompt': 'Be brief.'}) == expected
    assert texts(name, {**record, 'system': '', 'system_prompt': 'Be brief.'}) == expected
    with pytest.raises(DataError, match=r'file:1: `system` and `system_prompt` differ; ignore one'):
        texts(name, {**record, 'system': 'Be long.', 'system_prompt': 'Be brief.'})
    with pytest.raises(DataError, match=r'file:1: `system_prompt` must be text, got list'):
        texts(name, {**record, 'system_prompt': ['x']})


@pytest.mark.parametrize('extra', [{}, {'loss': False}, {'weight': 0}, {'name': 'x'}])
def test_a_system_text_that_the_conversation_begins_with_is_not_doubled(extra):
    turns = [{'from': 'system', 'value': 'Be brief.', **extra}, *TURN]
    [found] = texts('sharegpt', {'conversations': turns, 'system_prompt': 'Be brief.'})
    assert found == [('system', 'Be brief.'), ('user', 'q'), ('assistant', 'a')]
    messages = [{'role': 'system', 'content': 'Be brief.', **extra}, *RECORDS['openai']['messages']]
    assert texts('openai', {'messages': messages, 'system_prompt': 'Be brief.'}) == [found]
