"""Looks at a tokenizer's chat template before it is used: whether it is one, and what it writes around an answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xtuner.dataset.conversation import Message
from xtuner.dataset.templates.rendering import MOST_TEMPLATE, Chat, ChatTemplate, excerpt, render_chats
from xtuner.errors import ConfigError, DataError, ModelError


def check_chat_template(value: Any, where: str) -> None:
    """Raises ConfigError where `value`, found at `where` (file and field), is no chat template that could be rendered.

    It is a text, or several of them by name, one of which is `default`.
    """
    fault = template_fault(value, where)
    if fault:
        raise ConfigError(fault)
    if isinstance(value, dict) and 'default' not in value:
        raise ConfigError(f"{where} names {len(value)} templates, and none of them 'default'; name one of ours with "
                          '`model.template`')  # fmt: skip


def check_template_files(folder: Path, settings: Mapping[str, Any]) -> None:
    """Looks at the chat templates of a tokenizer's folder before transformers reads them.

    Args:
        folder: The tokenizer's.
        settings: What its `tokenizer_config.json` holds.

    Raises:
        ModelError: One is no text or no list of named ones, is larger than any published one, or is not UTF-8.
    """
    value = settings.get('chat_template')
    fault = None if value is None else template_fault(value, f'{folder / "tokenizer_config.json"}: `chat_template`')
    for file in (folder / 'chat_template.jinja', *sorted((folder / 'additional_chat_templates').glob('*.jinja'))):
        if not fault and file.is_file():
            fault = _file_fault(file)
    if fault:
        raise ModelError(fault)


def template_fault(value: Any, where: str) -> str:
    """Says what is wrong with what shall be a chat template; '' where nothing is."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ('name', 'template')):
                return f'{where}[{number}] must have a `name` and a `template`, both text'
        value = {item['name']: item['template'] for item in value}
    for name, text in (value if isinstance(value, dict) else {'': value}).items():
        what = f'{where}[{excerpt(repr(name))}]' if name else where
        if not isinstance(name, str) or not isinstance(text, str):
            return f'{what} is of type {type(text).__name__}; it must be text: a Jinja template'
        if len(text) > MOST_TEMPLATE:
            return f'{what} has {len(text):,} characters; a chat template may have {MOST_TEMPLATE:,}'
    return ''


def _file_fault(file: Path) -> str:
    if file.stat().st_size > MOST_TEMPLATE:
        return f'{file} has {file.stat().st_size:,} bytes; a chat template may have {MOST_TEMPLATE:,}'
    try:
        file.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        return f'{file} cannot be read as UTF-8: {excerpt(str(error))}'
    return ''


class Probe(NamedTuple):
    """What a chat template writes around an answer: control tokens, those that open it, the one that ends it."""

    markers: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    end: str = ''


def probe(tokenizer: Any) -> Probe:
    """Finds the control tokens that the template writes; a tokenizer need not call them special.

    Tokens that only occur inside answers, such as those around thoughts, are not among them: what a message spells of
    those is meant as such. Where the generation prompt opens the answer with one, earlier answers, which templates show
    without their thoughts, tell it from the header of an answer.

    Raises:
        DataError: The template refuses a question and an answer, or reaches a bound of `rendering`.
    """
    question, answer = 'q0q', 'a0a'
    messages = [Message('user', question), Message('assistant', answer), Message('user', question)]
    shown = [{'role': message.role, 'content': message.content} for message in messages]
    source = ChatTemplate(tokenizer.get_chat_template(), source_name(tokenizer), tokenizer.special_tokens_map)
    tried = f'{source_name(tokenizer)}, tried with a question and an answer'
    chats = [Chat(shown[:2], None, [(2, False), (1, True)], tried), Chat(shown, None, [(3, False)], tried)]
    both, history = render_chats(source, chats)
    if isinstance(both, DataError):
        raise both
    whole, prompt = both
    header = start = common_length(whole, prompt)
    if not isinstance(history, DataError) and question in prompt and question in history[0]:
        asked = prompt.rindex(question)
        header = min(header, asked + common_length(prompt[asked:], history[0][history[0].index(question) :]))
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content]
    ends = sorted((whole.rfind(name) + len(name), name) for name in added if whole.rfind(name) >= start)
    end = ends[-1][1] if ends else ''
    written = [name for name in added if name in prompt]
    openings = tuple(name for name in written if prompt.rindex(name) + len(name) > header)
    return Probe(tuple(name for name in written if name not in (end, *openings)), openings, end)


def source_name(tokenizer: Any) -> str:
    """Where a tokenizer is from, for messages."""
    return tokenizer.name_or_path or 'the tokenizer'


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    if one.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
