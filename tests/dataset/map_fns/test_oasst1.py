"""OpenAssistant Guanaco: one text with markers."""

from __future__ import annotations

import pytest

from tests.dataset.map_fns.test_registration import texts

pytestmark = pytest.mark.unit


def test_a_heading_in_an_answer_of_oasst1_is_content():
    record = {'text': '### Human: What? ### Assistant: So:\n### Steps\n1.### Human: no### Assistant: ok ### Human: bye'}
    assert texts('oasst1', record) == [[('user', 'What?'), ('assistant', 'So:\n### Steps\n1.'), ('user', 'no'),
                                        ('assistant', 'ok')]]  # fmt: skip


def test_a_marker_of_oasst1_out_of_turn_is_content():
    record = {'text': '### Human: Say "### Human: x" twice### Assistant: ok'}
    assert texts('oasst1', record) == [[('user', 'Say "### Human: x" twice'), ('assistant', 'ok')]]
    assert texts('oasst1', {'text': '### Human: alone'}) == []
