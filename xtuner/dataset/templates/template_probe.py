"""Validates a tokenizer's chat template and finds the control tokens that it writes around an answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xtuner.dataset.conversation import Message
from xtuner.dataset.templates.rendering import MOST_TEMPLATE, Chat, ChatTemplate, excerpt, render_chats
from xtuner.errors import ConfigError, DataError, ModelError


def check_chat_template(value: Any, where: str) -> None:
    """Raises ConfigError if `value`, found at `where` (file and field), is not a valid chat template.

    A valid value is text, or several templates by name, one of which is `default`.
    """
    fault = template_fault(value, where)
    if fault:
        raise ConfigError(fault)
    if isinstance(value, dict) and 'default' not in value:
        raise ConfigError(f"{where} has {len(value)} templates but no 'default'; use a built-in one with "
                          '`model.template`')  # fmt: skip


def check_template_files(folder: Path, settings: Mapping[str, Any]) -> None:
    """Validates the chat templates of a tokenizer folder before transformers reads them.

    Args:
        folder: The tokenizer folder.
        settings: The content of its `tokenizer_config.json`.

    Raises:
        ModelError: A template is neither text nor a list of named ones, is larger than any published one, or is not
            UTF-8.
    """
    value = settings.get('chat_template')
    fault = None if value is None else template_fault(value, f'{folder / "tokenizer_config.json"}: `chat_template`')
    for file in (folder / 'chat_template.jinja', *sorted((folder / 'additional_chat_templates').glob('*.jinja'))):
        if not fault and file.is_file():
            fault = _file_fault(file)
    if fault:
        raise ModelError(fault)


def template_fault(value: Any, where: str) -> str:
    """Returns what is wrong with a chat template; '' if nothing is."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ('name', 'template')):
                return f'{where}[{number}] must have a `name` and a `template`, both text'
        value = {item['name']: item['template'] for item in value}
    for name, text in (value if isinstance(value, dict) else {'': value}).items():
        what = f'{where}[{excerpt(repr(name))}]' if name else where
        if not isinstance(name, str) or not isinstance(text, str):
            return f'{what} has type {type(text).__name__}; it must be text: a Jinja template'
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


class TemplateProbe(NamedTuple):
    """What a chat template writes around an answer: its control tokens, those that open it, and the end token."""

    markers: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    end: str = ''


def probe(tokenizer: Any) -> TemplateProbe:
    """Finds the control tokens that the template writes, which the tokenizer need not mark as special.

    Tokens that occur only inside answers, such as those around thoughts, are not included: messages may contain
    them as control tokens. If the generation prompt opens the answer with such a token, it is told apart from the
    answer's header by an earlier answer, which templates render without its thoughts.

    Raises:
        DataError: The template rejects a question and an answer, or exceeds a limit of `rendering`.
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
    in_prompt = [name for name in added if name in prompt]
    openings = tuple(name for name in in_prompt if prompt.rindex(name) + len(name) > header)
    return TemplateProbe(tuple(name for name in in_prompt if name not in (end, *openings)), openings, end)


def source_name(tokenizer: Any) -> str:
    """Where a tokenizer comes from, for messages."""
    return tokenizer.name_or_path or 'the tokenizer'


def common_length(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    if one.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
