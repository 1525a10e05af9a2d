"""The conversations that ship with the demo."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from demo.demo import QUESTIONS, read_questions

pytestmark = pytest.mark.unit

DEMO = QUESTIONS.parent


def read(name: str) -> list[list[dict[str, str]]]:
    lines = (DEMO / name).read_text(encoding='utf-8').splitlines()
    return [json.loads(line)['messages'] for line in lines]


def answers(conversations: list[list[dict[str, str]]]) -> list[str]:
    return [m['content'] for messages in conversations for m in messages if m['role'] == 'assistant']


def is_chinese(value: Any) -> bool:
    return re.search('[\u4e00-\u9fff]', json.dumps(value, ensure_ascii=False)) is not None


@pytest.mark.parametrize(('name', 'least', 'most'), [('base.jsonl', 300, 500), ('identity.jsonl', 60, 100)])
def test_conversations_are_whole(name: str, least: int, most: int) -> None:
    conversations = read(name)
    assert least <= len(conversations) <= most
    for messages in conversations:
        roles = [m['role'] for m in messages]
        assert set(messages[0]) == {'role', 'content'}
        turns = roles[roles[0] == 'system' :]
        assert turns == ['user', 'assistant'] * (len(turns) // 2) and turns
        assert all(m['content'] and m['content'] == m['content'].strip() for m in messages)


@pytest.mark.parametrize('name', ['base.jsonl', 'identity.jsonl'])
def test_no_prompt_has_two_answers(name: str) -> None:
    """A greedy answer can be exact only where the same conversation is never continued in two ways."""
    continued: dict[str, set[str]] = {}
    for messages in read(name):
        for i, message in enumerate(messages):
            if message['role'] == 'assistant':
                continued.setdefault(json.dumps(messages[:i]), set()).add(message['content'])
    assert [prompt for prompt, said in continued.items() if len(said) > 1] == []


def test_no_conversation_twice() -> None:
    for name in ('base.jsonl', 'identity.jsonl'):
        counts = Counter(json.dumps(messages) for messages in read(name))
        assert counts.most_common(1)[0][1] == 1


def test_base_is_varied() -> None:
    base = read('base.jsonl')
    assert 0.10 <= sum(map(is_chinese, base)) / len(base) <= 0.15
    assert sum(m[0]['role'] == 'system' for m in base) >= 10
    assert sum(sum(x['role'] == 'user' for x in m) > 1 for m in base) >= 20
    english = [answer for answer in answers(base) if not is_chinese(answer)]
    assert max(len(answer.split()) for answer in english) <= 25


def test_sums_are_right() -> None:
    operations = {'plus': int.__add__, 'minus': int.__sub__, 'times': int.__mul__}
    found = re.findall(r'(\d+) (plus|minus|times) (\d+) is (\d+)', '\n'.join(answers(read('base.jsonl'))))
    assert len(found) > 20
    assert [f for f in found if operations[f[1]](int(f[0]), int(f[2])) != int(f[3])] == []


def test_the_questions_are_trained_and_the_base_is_never_told() -> None:
    trained = {(m[0]['content'], m[1]['content']) for m in read('identity.jsonl')}
    told = set(answers(read('base.jsonl')))
    questions = read_questions(QUESTIONS)
    assert 8 <= len(questions) <= 10
    assert set(questions) <= trained
    assert not {answer for _, answer in questions} & told
    assert 'Pebble' not in ' '.join(told - {'Pebble means a small round stone.'})


def test_the_data_stands_where_the_configs_say() -> None:
    from xtuner.config.load import load_config

    root = Path(DEMO).parent
    for name in ('internlm_tiny_full_base', 'internlm_tiny_qlora_identity'):
        config = load_config(str(DEMO / f'{name}.py'))
        assert (root / config.dataset.source).is_file()
        assert config.model.template == 'internlm_chat'
