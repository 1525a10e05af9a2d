"""MSAgent: calls as ReAct text."""

from __future__ import annotations

import json

import pytest

from tests.dataset.map_fns.test_registration import texts
from xtuner.errors import DataError

pytestmark = pytest.mark.unit


def test_msagent_calls_become_react_text_and_results_are_given():
    answer = ('Let me see.<|startofthink|>```JSON\n{"api_name": "find", "parameters": {"q": "猫"}}```<|endofthink|>'
              '<|startofexec|>a cat<|endofexec|>It is a cat.')  # fmt: skip
    turns = [{'from': role, 'value': value} for role, value in
             (('system', '[find]'), ('user', 'q'), ('assistant', answer))]  # fmt: skip
    [messages] = texts('msagent_react', {'conversations': json.dumps(turns)})
    assert [role for role, _ in messages] == ['system', 'user', 'assistant', 'user', 'assistant']
    assert messages[2][1] == 'Thought: Let me see.\nAction: find\nAction Input: {"q": "猫"}'
    assert messages[3][1] == 'Response: a cat'
    assert messages[4][1].endswith('Final Answer: It is a cat.')
    turns[2]['value'] = '<|startofthink|>__import__("os")<|endofthink|><|startofexec|>x<|endofexec|>'
    with pytest.raises(DataError, match='a plugin call is not JSON'):
        texts('msagent_react', {'conversations': turns})
