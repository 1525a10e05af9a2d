"""MOSS: thoughts, commands and results."""

from __future__ import annotations

import pytest

from tests.dataset.map_fns.test_registration import texts

pytestmark = pytest.mark.unit


def test_moss_keeps_thoughts_commands_and_results_and_takes_the_markers_off():
    turn = {'Human': '<|Human|>: hi<eoh>\n', 'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
            'Commands': '<|Commands|>: Search("x")<eoc>\n', 'Tool Responses': '<|Results|>: r <b><eor>\n',
            'MOSS': '<|MOSS|>: yes<eom>\n'}  # fmt: skip
    record = {'meta_instruction': 'You are MOSS.', 'chat': {'turn_2': turn, 'turn_1': turn, 'turn_10': turn}}
    [messages] = texts('moss_003_sft', record)
    assert messages[:6] == [('system', 'You are MOSS.'), ('user', 'hi'), ('thoughts', 'None'),
                            ('commands', 'Search("x")'), ('tool', 'r <b>'), ('assistant', 'yes')]  # fmt: skip
    assert len(messages) == 16
