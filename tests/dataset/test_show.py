from __future__ import annotations

import re

import numpy as np
import pytest

from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import encode_conversation
from xtuner.dataset.show import histogram, printable, show_sample
from xtuner.dataset.templates.builtin import get_template

pytestmark = pytest.mark.unit


@pytest.mark.torch
def test_trained_tokens_stand_apart(internlm_like):
    conversation = to_conversation(
        {'conversation': [{'input': 'Hi', 'output': 'Yes'}, {'input': '你', 'output': 'No'}]}
    )
    sample = encode_conversation(conversation, internlm_like, get_template('internlm_chat'))
    plain = show_sample(sample, internlm_like, color=False)
    assert plain == '<s><|User|>:Hi<eoh>\n<|Bot|>:«Yes<eoa>»\n<|User|>:你<eoh>\n<|Bot|>:«No<eoa>»'
    colored = show_sample(sample, internlm_like, color=True)
    assert colored.count('\x1b[32m') == colored.count('\x1b[90m') == 2
    assert '\x1b[32mYes<eoa>\x1b[0m' in colored


@pytest.mark.torch
def test_control_characters_are_shown_not_obeyed(internlm_like):
    assert printable('a\x1b[2J\r\x07\x7f\x9bm\n\tb 你') == 'a␛[2J␍␇␡\ufffdm\n\tb 你'
    conversation = to_conversation({'conversation': [{'input': 'Hi', 'output': 'a\x1b[2Jb'}]})
    sample = encode_conversation(conversation, internlm_like, get_template('internlm_chat'))
    assert '«a␛[2Jb<eoa>»' in show_sample(sample, internlm_like, color=False)


def test_histogram_counts_everything_once():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    lines = histogram(lengths)
    assert len(lines) == 10 and sum(int(line.split('tokens')[1].split()[0]) for line in lines) == 1000
    assert max(line.count('█') for line in lines) == 40
    for line in lines:
        low, high, count = (int(number) for number in re.findall(r'\d+', line))
        assert count == np.sum((lengths >= low) & (lengths <= high)), line
    assert histogram(np.array([])) == ['no conversation']
    assert len(histogram(np.array([7]))) == 1 and len(histogram(np.array([1, 2, 9]), num_bins=2)) == 2
