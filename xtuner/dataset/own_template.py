"""`from_tokenizer`: the tokenizer's own chat template, with the exact spans of the answers.

The template is rendered up to each answer with its generation prompt, and up to the answer's end; what lies between is
the answer. Control tokens that a message spells are hidden from the template and come back as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.fingerprint import digest
from xtuner.dataset.prompt import Piece, Template, Turn
from xtuner.errors import ConfigError, DataError

_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True)
class TokenizerTemplate(Template):
    """A template whose strings are the tokenizer's Jinja."""

    tokenizer: Any = None

    @property
    def fillable(self) -> bool:
        """A program may look at the texts."""
        return False

    def reads(self, field: str) -> bool:
        """Whether the name of the field occurs in the chat template, or in one of several."""
        found = self.tokenizer.chat_template
        texts = found.values() if isinstance(found, Mapping) else [found]
        return any(re.search(rf'(?<!\w){re.escape(field)}(?!\w)', text or '') for text in texts)

    def render(self, conversation: Conversation, *, train_on: str = 'assistant', prompt: bool = False) -> list[Piece]:
        """Renders a conversation into pieces; see `Template.render`.

        Raises:
            DataError: Where the chat template refuses the conversation, or shows an answer that is trained in another
                way once more messages follow it.
        """
        messages = conversation.messages
        if messages[0].role == 'text':
            return super().render(conversation, train_on=train_on, prompt=prompt)
        hidden = _Hidden(messages, self._controls())
        shown = _Renderer(self, conversation, [hidden.show(message) for message in messages])
        text = shown.text(len(messages), prompt=prompt)
        everything = train_on == 'all' and not prompt
        last = max((i for i, m in enumerate(messages) if m.role == 'assistant'), default=-1)
        pieces: list[Piece] = []
        done = 0
        for index, message in enumerate(messages):
            if prompt or message.role != 'assistant':
                continue
            wanted = train_on != 'last_turn' or index == last
            trained = wanted if message.loss is None else message.loss
            span = self._span(shown, index, text)
            if span is None and not (trained or everything):
                continue
            if span is None:
                raise DataError(f'{shown.origin}: the chat template shows answer {index + 1} in another '
                                "way once more follows; train the last alone: `train_on = 'last_turn'`")  # fmt: skip
            start, end, behind = span
            pieces += self._split(text[done:start], hidden, everything)
            answer = self._split(text[start:end], hidden, trained)
            pieces += [piece._replace(starts=number == 0) for number, piece in enumerate(answer)]
            pieces += self._split(text[end:behind], hidden, everything)
            done = behind
        pieces += self._split(text[done:], hidden, everything)
        return pieces if prompt else _without_end(pieces)

    def chat_template(self) -> str:
        """Returns the tokenizer's own chat template."""
        return self.tokenizer.get_chat_template()

    def marker_ids(self, tokenizer: Any) -> dict[str, int]:
        """Returns the ids of all tokens that the tokenizer calls special, and of those that the template writes."""
        written = {*self.markers, *self.stop}
        added = tokenizer.added_tokens_decoder.items()
        return {token.content: id_ for id_, token in added if token.special or token.content in written}

    def check(self, tokenizer: Any) -> None:
        """Nothing to check: the template is the tokenizer's."""

    def fingerprint(self) -> str:
        """Returns a hash of the chat template."""
        return digest([self.chat_template()])

    def _controls(self) -> list[str]:
        return [name for name in self.marker_ids(self.tokenizer) if name]

    def _span(self, shown: _Renderer, index: int, text: str) -> tuple[int, int, int] | None:
        """Returns where answer `index` begins, where it ends, where the separator ends; None where `text` differs."""
        before, upto = shown.text(index, prompt=True), shown.text(index + 1)
        if not (text.startswith(upto) and upto.startswith(before)):
            return None
        ends = [match.end() for match in self._pattern().finditer(upto, len(before))]
        return len(before), ends[-1] if ends else len(upto), len(upto)

    def _pattern(self) -> re.Pattern[str]:
        names = sorted(self._controls(), key=len, reverse=True)
        return re.compile('|'.join(map(re.escape, names)) or r'(?!)')

    def _split(self, text: str, hidden: _Hidden, trained: bool) -> list[Piece]:
        pieces = []
        done = 0
        for match in self._pattern().finditer(text):
            pieces += [Piece(hidden.back(text[done : match.start()]), trained=trained),
                       Piece(match.group(), control=True, trained=trained)]  # fmt: skip
            done = match.end()
        pieces.append(Piece(hidden.back(text[done:]), trained=trained))
        return [piece for piece in pieces if piece.text]


def tokenizer_template(tokenizer: Any) -> TokenizerTemplate:
    """Returns the template that stands in the tokenizer.

    Raises:
        ConfigError: Where it has none, or one whose answers do not end with a token.
    """
    if tokenizer is None:
        raise ConfigError("`model.template` 'from_tokenizer' needs the tokenizer")
    if not getattr(tokenizer, 'chat_template', None):
        raise ConfigError("the tokenizer has no chat template to take ('from_tokenizer'); name one of ours, such as "
                          'internlm_chat, as `model.template` or --prompt-template')  # fmt: skip
    found = _probe(tokenizer)
    if not found:
        raise ConfigError('the chat template of the tokenizer ends an answer with no token, so the model could not '
                          'learn to stop; name one of our templates with `model.template`')  # fmt: skip
    return TokenizerTemplate('from_tokenizer', {'assistant': Turn()}, markers=tuple(found[:-1]), stop=(found[-1],),
                             tokenizer=tokenizer)  # fmt: skip


def _probe(tokenizer: Any) -> list[str]:
    """Returns the control tokens that the template writes, the one that ends an answer last; none where nothing does.

    A tokenizer need not call them special. Tokens that only occur inside answers, such as those around thoughts, are
    not among them: what a message spells of those is meant as such.
    """
    plain = TokenizerTemplate('from_tokenizer', {'assistant': Turn()}, tokenizer=tokenizer)
    conversation = Conversation((Message('user', 'a'), Message('assistant', 'b')), 'the chat template')
    shown = _Renderer(plain, conversation, [{'role': m.role, 'content': m.content} for m in conversation.messages])
    prompt, whole = shown.text(1, prompt=True), shown.text(2)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    ends = sorted((whole.rfind(name) + len(name), name) for name in added if whole.rfind(name) >= len(prompt))
    return [*(name for name in added if name in prompt and name != ends[-1][1]), ends[-1][1]] if ends else []


class _Renderer:
    """Renders the beginnings of one conversation, each once."""

    def __init__(self, template: TokenizerTemplate, conversation: Conversation, messages: Sequence[dict]) -> None:
        self.origin = conversation.origin
        self._tokenizer = template.tokenizer
        self._messages = messages
        self._tools = list(conversation.tools) or None
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int, *, prompt: bool = False) -> str:
        """Returns the first `count` messages as text, perhaps with the generation prompt behind them."""
        key = (count, prompt)
        if key not in self._texts:
            try:
                self._texts[key] = self._tokenizer.apply_chat_template(
                    self._messages[:count], tools=self._tools, tokenize=False, add_generation_prompt=prompt
                )
            except Exception as error:  # Jinja raises many kinds, and templates raise their own
                raise DataError(f'{self.origin}: the chat template refuses the conversation: '
                                f'{str(error)[:200]}') from None  # fmt: skip
        return self._texts[key]


class _Hidden:
    """Stands characters that occur nowhere in a conversation for the control tokens that its messages spell."""

    def __init__(self, messages: Sequence[Message], controls: Sequence[str]) -> None:
        texts = ''.join(_texts([message.content for message in messages] + [dict(m.extra) for m in messages]))
        spelt = [name for name in sorted(controls, key=len, reverse=True) if name in texts]
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in texts)
        self._stands = {name: next(free) for name in spelt}

    def show(self, message: Message) -> dict[str, Any]:
        """Returns the message as the template sees it."""
        return self._hide({**message.extra, 'role': message.role, 'content': message.content})

    def back(self, text: str) -> str:
        """Puts what was hidden back."""
        for name, char in self._stands.items():
            text = text.replace(char, name)
        return text

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            for name, char in self._stands.items():
                value = value.replace(name, char)
            return value
        if isinstance(value, Mapping):
            return {key: self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for item in items for text in _texts(item)]


def _without_end(pieces: list[Piece]) -> list[Piece]:
    """Leaves out the separator behind the last control token, where nothing follows it."""
    if len(pieces) > 1 and pieces[-2].control and not pieces[-1].control and not pieces[-1].text.strip():
        return pieces[:-1]
    return pieces
