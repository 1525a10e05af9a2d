"""Looks at a tokenizer's chat template before it is used: whether it is one, and what it writes around an answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from xtuner.dataset.conversation import Message
from xtuner.dataset.rendering import MOST_TEMPLATE, Chat, ChatTemplate, printable, render_chats
from xtuner.errors import ConfigError, DataError


def check_chat_template(value: Any, where: str) -> None:
    """Raises ConfigError where `value`, found at `where` (file and field), is no chat template that could be rendered.

    It is a text, or several of them by name, one of which is `default`.
    """
    named = value if isinstance(value, dict) else {'default': value}
    for name, text in named.items():
        what = f'{where}[{printable(repr(name))}]' if isinstance(value, dict) else where
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f'{what} is of type {type(text).__name__}; it must be text: a Jinja template')
        if len(text) > MOST_TEMPLATE:
            raise ConfigError(f'{what} has {len(text):,} characters, and no chat template has more than '
                              f'{MOST_TEMPLATE:,}')  # fmt: skip
    if 'default' not in named:
        raise ConfigError(f"{where} names {len(named)} templates, and none of them 'default'; name one of ours with "
                          '`model.template`')  # fmt: skip


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
    chats = [Chat(shown[:2], None, [(2, False), (1, True)], 'the probe'),
             Chat(shown, None, [(3, False)], 'the probe')]  # fmt: skip
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
