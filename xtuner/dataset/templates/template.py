r"""Prompt templates: strings around the text of each role, rendered into pieces, and exported as Jinja.

A piece is text or a control token, with flags for whether it is trained and whether the model starts writing with it:

    <s>       <|User|>:   Hi        <eoh>     \n <|Bot|>:   Hello     <eoa>
    control   text        text      control   text          text      control
                                                            starts
    -         -           -         -         -             trained   trained
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from xtuner.dataset.conversation import MODEL_ROLES, Conversation, Message
from xtuner.dataset.templates.jinja_text import Turn, write_jinja
from xtuner.errors import ConfigError, DataError

TRAIN_ON = ('assistant', 'last_turn', 'all')


class Piece(NamedTuple):
    """A part of a rendered conversation: `text`, and whether it is a control token, trained, or starts an answer."""

    text: str
    control: bool = False
    trained: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Template:
    """A prompt format as data.

    Attributes:
        name: Its name in the registry.
        turns: The strings around each role's text, by role.
        markers: The control tokens in those strings: inserted as ids if the vocabulary has them, otherwise as text.
        stop: Stop words for generation besides the tokenizer's EOS.
        begin: Precedes the whole conversation.
        default_system: The system text if a conversation has no system message; an empty message means none.
        system_in_user: Whether the system text is put in front of the text of the following user message.
        alternates: Whether the template supports only alternating user and assistant messages, user first; the
            published templates reject others.
        answer_tokens: Special tokens that the model writes: if an answer contains them, they are inserted as ids.
    """

    name: str
    turns: Mapping[str, Turn]
    markers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    begin: str = '{bos}'
    default_system: str = ''
    system_in_user: bool = False
    alternates: bool = False
    answer_tokens: tuple[str, ...] = ()
    _parsed: dict[tuple[str, bool], tuple[Piece, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def fillable(self) -> bool:
        """Whether the rendering of a conversation depends on its texts only by inserting them."""
        return True

    def reads(self, field: str) -> bool:
        """Whether the template reads `tools`, or this field of a message besides its role and content."""
        return False

    def __call__(self, conversation: Conversation) -> list[Piece]:
        """Renders with the default `train_on`, so that a template can be registered like a function."""
        return self.render(conversation)

    def render(self, conversation: Conversation, *, train_on: str = 'assistant', prompt: bool = False) -> list[Piece]:
        """Renders a conversation as pieces.

        Args:
            conversation: The conversation to render.
            train_on: 'assistant' trains every answer, 'last_turn' the last one, 'all' everything; a message's own
                `loss` overrides it.
            prompt: Whether to end with the generation prompt; nothing is trained then.

        Raises:
            DataError: The template does not support a role, or tools.
        """
        if conversation.tools:
            raise DataError(f'{conversation.origin}: template `{self.name}` does not support `tools`; '
                            'use `from_tokenizer`, or write them into the system message')  # fmt: skip
        if prompt and self.alternates:
            self._check_turns(conversation)
        messages = self._with_default_system(conversation.messages)
        last = max((i for i, m in enumerate(messages) if m.role == 'assistant'), default=-1)
        everything = train_on == 'all' and not prompt
        pieces = [*self._pieces(self.begin, everything)]
        system: list[Piece] = []
        round_ = 0
        for index, message in enumerate(messages):
            trained = not prompt and _is_trained(message, index, last, train_on)
            if message.role == 'text':
                pieces += [Piece(message.content, trained=trained), *self._pieces('{eos}', trained)]
                continue
            turn = self._turn(message, conversation.origin)
            if message.role == 'system':
                if message.content:
                    shown = self._system(turn, message.content, everything)
                    if self.system_in_user:
                        system = shown
                    else:
                        pieces += shown
                continue
            round_ += message.role == 'user'
            pieces += self._pieces(turn.before, everything, round_)
            if message.role in MODEL_ROLES:
                if system:
                    raise DataError(f'{conversation.origin}: template `{self.name}` puts the system text into the next '
                                    'user message, but none follows')  # fmt: skip
                pieces += _starting([*self._pieces(turn.lead, trained), *self._answer(message.content, trained)])
                pieces += self._pieces(turn.end, trained)
            else:
                pieces += [*system, Piece(message.content, trained=trained), *self._pieces(turn.end, trained)]
                system = []
            if index + 1 < len(messages) or prompt:
                pieces += self._pieces(turn.after, everything)
        if prompt:
            pieces += self._pieces(self.turns['assistant'].before)
        return pieces

    def render_many(
        self, conversations: Sequence[Conversation], *, train_on: str = 'assistant', prompt: bool = False
    ) -> Iterator[list[Piece] | DataError]:
        """Renders conversations in order; yields the error that `render` raises for one instead of its pieces."""
        for conversation in conversations:
            try:
                yield self.render(conversation, train_on=train_on, prompt=prompt)
            except DataError as error:
                yield error

    def chat_template(self) -> str:
        """Returns the same format as a Jinja template, to be saved with the tokenizer."""
        return write_jinja(
            self.turns, begin=self.begin, default_system=self.default_system, system_in_user=self.system_in_user
        )

    def marker_ids(self, tokenizer: Any) -> dict[str, int]:
        """Returns the id of each marker that is a single token, and of the tokenizer's BOS and EOS."""
        names = [*self.markers, *self.stop, *self.answer_tokens,
                 *filter(None, (tokenizer.bos_token, tokenizer.eos_token))]  # fmt: skip
        return {name: id_ for name in names if (id_ := token_id(tokenizer, name)) is not None}

    def allowing(self, choice: bool | Sequence[str] | None, tokenizer: Any) -> Template:
        """Returns this template with the given special tokens inserted as ids where an answer contains them.

        Args:
            choice: `dataset.special_tokens_in_answers`: the tokens, or True for all special tokens of the tokenizer
                that neither the template nor the tokenizer uses otherwise.
            tokenizer: A transformers tokenizer.

        Raises:
            ConfigError: A name is not a token of the tokenizer, or a token that ends or separates messages.
        """
        names = self.allowable(tokenizer) if choice is True else tuple(choice or ())
        for name in names:
            if not isinstance(name, str) or not name or token_id(tokenizer, name) is None:
                raise ConfigError(f'`dataset.special_tokens_in_answers` names {name!r}, which is not a token of the '
                                  'tokenizer')  # fmt: skip
            if name in self._used(tokenizer):
                raise ConfigError(f'`dataset.special_tokens_in_answers` names {name!r}, which the template or the '
                                  'tokenizer uses to separate messages: remove it')  # fmt: skip
        return replace(self, answer_tokens=names) if names != self.answer_tokens else self

    def allowable(self, tokenizer: Any) -> tuple[str, ...]:
        """Returns the special tokens of the tokenizer that an answer may contain as ids, in id order."""
        added = sorted(tokenizer.added_tokens_decoder.items())
        used = self._used(tokenizer)
        return tuple(token.content for _, token in added if token.special and token.content not in used)

    def _used(self, tokenizer: Any) -> set[str]:
        return {'', *self.markers, *self.stop, *map(str, tokenizer.special_tokens_map.values())}

    def stop_ids(self, tokenizer: Any) -> list[int]:
        """Returns the ids that stop generation: stop words that are single tokens, then the tokenizer's EOS."""
        ids = [token_id(tokenizer, word) for word in (*self.stop, tokenizer.eos_token) if word]
        return list(dict.fromkeys(id_ for id_ in ids if id_ is not None))

    def check(self, tokenizer: Any) -> None:
        """Raises ConfigError if the tokenizer has no token that ends an answer of this template."""
        ends = [piece.text for piece in self._pieces(self.turns['assistant'].end) if piece.control]
        for end in ends[-1:] or ['{eos}']:
            word = tokenizer.eos_token if end == '{eos}' else end
            if not word or token_id(tokenizer, word) is None:
                raise ConfigError(f'`model.template` {self.name!r} ends an answer with {word or "the end token"!r}, '
                                  'which is not a token of the tokenizer, so the model could not learn to stop; '
                                  'use the template of this model, or `from_tokenizer`')  # fmt: skip

    def fingerprint(self) -> str:
        """Returns a hash that changes with anything that changes the rendering."""
        turns = sorted((role, repr(turn)) for role, turn in self.turns.items())
        content: tuple[Any, ...] = (self.name, turns, self.markers, self.stop, self.begin, self.default_system,
                                    self.system_in_user)  # fmt: skip
        if self.answer_tokens:  # without them, the hash equals that of older caches
            content += (self.answer_tokens,)
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    def _check_turns(self, conversation: Conversation) -> None:
        expected = 'user'
        for number, message in enumerate(conversation.messages, 1):
            if message.role == 'system':
                continue
            if message.role != expected:
                raise DataError(f'{conversation.origin}: template `{self.name}` expects alternating user and assistant '
                                f'messages, user first; message {number} has the role {message.role!r}')  # fmt: skip
            expected = 'assistant' if expected == 'user' else 'user'

    def _with_default_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.default_system and messages[0].role not in ('system', 'text'):
            return (Message('system', self.default_system), *messages)
        return messages

    def _system(self, turn: Turn, content: str, trained: bool) -> list[Piece]:
        pieces = [*self._pieces(turn.before, trained), Piece(content, trained=trained)]
        return [*pieces, *self._pieces(turn.end, trained), *self._pieces(turn.after, trained)]

    def _turn(self, message: Message, origin: str) -> Turn:
        if message.role not in self.turns or message.extra.get('tool_calls'):
            what = 'tool calls' if message.role in self.turns else f'the role {message.role!r}'
            raise DataError(f'{origin}: template `{self.name}` does not support {what}; use `from_tokenizer`')
        return self.turns[message.role]

    def _answer(self, content: str, trained: bool) -> list[Piece]:
        """Pieces of an answer's content; answer tokens in it become control tokens."""
        if not self.answer_tokens or not content:
            return [Piece(content, trained=trained)]
        return [piece._replace(trained=trained) for piece in _split(content, self.answer_tokens)]

    def _pieces(self, text: str, trained: bool = False, round_: int = 0) -> Sequence[Piece]:
        """Returns a format string as pieces; cached, since it is called for every message."""
        pieces = self._parsed.get((text, trained))
        if pieces is None:
            split = _split(text, (*self.markers, '{bos}', '{eos}')) if text else []
            pieces = self._parsed[text, trained] = tuple(piece._replace(trained=trained) for piece in split)
        if '{round}' in text:
            return [piece._replace(text=piece.text.replace('{round}', str(round_))) for piece in pieces]
        return pieces


def token_id(tokenizer: Any, text: str) -> int | None:
    """Returns the id of `text` if it is exactly one token of the vocabulary, else None."""
    if getattr(tokenizer, 'is_fast', False):
        return tokenizer.backend_tokenizer.token_to_id(text)
    id_ = tokenizer.convert_tokens_to_ids(text)
    return None if id_ is None or id_ == tokenizer.unk_token_id else id_


def _is_trained(message: Message, index: int, last: int, train_on: str) -> bool:
    if message.loss is not None:
        return message.loss
    if message.role == 'text' or train_on == 'all':
        return True
    return message.role in MODEL_ROLES and (train_on == 'assistant' or index == last)


def _starting(answer: list[Piece]) -> list[Piece]:
    return [answer[0]._replace(starts=True), *answer[1:]]


def _split(text: str, markers: Iterable[str]) -> list[Piece]:
    """Splits a format string at its control tokens."""
    longest_first = sorted(markers, key=len, reverse=True)
    parts = re.split('(' + '|'.join(map(re.escape, longest_first)) + ')', text)
    return [Piece(part, control=bool(i % 2)) for i, part in enumerate(parts) if part]
