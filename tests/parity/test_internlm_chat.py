"""Prompts of the chat interface against the originals' construction: a string, read by the original tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.model.families.internlm.original import OriginalTokenizer
from tests.model.published import pieces, write_tokenizer
from xtuner.dataset.templates.builtin import get_template
from xtuner.model.families.chat_api import chat_prompt
from xtuner.model.loading import load_tokenizer

Turns = list[tuple[str, str]]
HISTORIES: list[Turns] = [
    [],
    [('hello', 'Hello! How can I help you today?')],
    [('你好', '你好 , 我是书生 .'), ('', ''), ('  1 + 1?\n', '2\n\n')],
    [(f'question {i}', f'answer  {i} .') for i in range(12)],
]


def default(query: str, history: Turns, system: str) -> str:
    turns = ''.join(f'<|User|>:{asked}<eoh>\n<|Bot|>:{answered}<eoa>\n' for asked, answered in history)
    return f'{turns}<|User|>:{query}<eoh>\n<|Bot|>:'


def first_release(query: str, history: Turns, system: str) -> str:
    prompt = ''
    for asked, answered in history:
        prompt += f'<s><|User|>:{asked}<eoh>\n<|Bot|>:{answered}<eoa>\n'
    if not prompt:
        prompt = '<s>'
    return f'{prompt}<|User|>:{query}<eoh>\n<|Bot|>:'


def of_2024(query: str, history: Turns, system: str) -> str:
    prompt = f'<|System|>:{system}\n' if system else ''
    for asked, answered in history:
        prompt += f'<|User|>:{asked}\n<|Bot|>:{answered}<eoa>\n'
    return f'{prompt}<|User|>:{query}\n<|Bot|>:'


def internlm2(query: str, history: Turns, system: str) -> str:
    prompt = f'<|im_start|>system\n{system}<|im_end|>\n' if system else ''
    for asked, answered in history:
        prompt += f'<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n'
    return f'{prompt}<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n'


V1 = {'internlm_chat': default, 'internlm_chat_2023': first_release, 'internlm_chat_2024': of_2024}


@pytest.mark.real
@pytest.mark.parametrize('history', HISTORIES)
@pytest.mark.parametrize('name', V1)
@pytest.mark.parametrize('query', ['hello', ' Two  spaces ,\nand a line', ''])
def test_internlm(shared_data: Path, name: str, history: Turns, query: str) -> None:
    folder = shared_data / 'internlm-7b-tokenizer'
    check(folder, name, V1[name], query, history, '', OriginalTokenizer(folder))


@pytest.mark.real
def test_system_text_of_2024(shared_data: Path) -> None:
    folder = shared_data / 'internlm-7b-tokenizer'
    check(folder, 'internlm_chat_2024', of_2024, 'hi', HISTORIES[1], 'Be brief.', OriginalTokenizer(folder))


@pytest.mark.parametrize('history', HISTORIES)
@pytest.mark.parametrize('system', ['', 'You are helpful.'])
def test_internlm2(tmp_path: Path, history: Turns, system: str) -> None:
    folder = write_tokenizer(tmp_path, 'InternLM2')
    known = pieces(folder)
    added = {'<|im_start|>': known.index('[UNUSED_TOKEN_0]'), '<|im_end|>': known.index('[UNUSED_TOKEN_1]')}
    check(folder, 'internlm2_chat', internlm2, 'hello', history, system, OriginalTokenizer(folder, added))


_loaded: dict[Path, Any] = {}


def check(
    folder: Path, name: str, construct: Callable, query: str, history: Turns, system: str, original: OriginalTokenizer
) -> None:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    tokenizer = _loaded[folder]
    template = get_template(name, tokenizer)
    theirs = original.encode(construct(query, history, system))
    assert chat_prompt(tokenizer, query, history, system, template) == theirs
    messages = [{'role': 'system', 'content': system}] if system else []
    for asked, answered in history:
        messages += [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': answered}]
    tokenizer.chat_template = template.chat_template()
    rendered = tokenizer.apply_chat_template([*messages, {'role': 'user', 'content': query}],
                                             add_generation_prompt=True, tokenize=False)  # fmt: skip
    assert tokenizer(rendered, add_special_tokens=False).input_ids == theirs
