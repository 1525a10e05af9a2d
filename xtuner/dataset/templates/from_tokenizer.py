"""`from_tokenizer`: the tokenizer's own chat template, with the exact spans of the answers.

The template is rendered up to each answer with its generation prompt, and up to the answer's end; what lies between is
the answer. Control tokens that a message spells are hidden from the template and come back as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from xtuner.dataset.cache.fingerprint import digest
from xtuner.dataset.conversation import Conversation, Message
from xtuner.dataset.templates.hidden_tokens import HiddenTokens
from xtuner.dataset.templates.rendering import Chat, ChatTemplate, TemplateBoundError, excerpt, render_chats
from xtuner.dataset.templates.template import Piece, Template, Turn
from xtuner.dataset.templates.template_probe import check_chat_template, common_length, probe, source_name
from xtuner.errors import ConfigError, DataError


@dataclass(frozen=True)
class TokenizerTemplate(Template):
    """A template whose strings are the tokenizer's Jinja.

    Attributes:
        tokenizer: Whose it is.
        openings: Tokens with which the generation prompt begins the answer itself, such as `<think>`: an answer in the
            data spells them, and they are the prompt's token there.
    """

    tokenizer: Any = None
    openings: tuple[str, ...] = ()

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
            DataError: Where the chat template refuses the conversation, reaches a bound of `rendering`, or shows an
                answer that is trained in another way than behind its prompt.
        """
        pieces = next(self.render_many([conversation], train_on=train_on, prompt=prompt))
        if isinstance(pieces, DataError):
            raise pieces
        return pieces

    def render_many(
        self, conversations: Sequence[Conversation], *, train_on: str = 'assistant', prompt: bool = False
    ) -> Iterator[list[Piece] | DataError]:
        """Renders conversations, many in one exchange with the process that renders; see `Template.render_many`."""
        for own, group in groupby(conversations, self._source):
            if own is None:
                yield from (
                    super(TokenizerTemplate, self).render(one, train_on=train_on, prompt=prompt) for one in group
                )
                continue
            shown = [_shown(conversation, self, prompt) for conversation in group]
            rendered = render_chats(own, [one.chat for one in shown if isinstance(one, _Shown)])
            yield from (self._pieces_of(one, next(rendered), train_on) if isinstance(one, _Shown) else one
                        for one in shown)  # fmt: skip

    def chat_template(self) -> str:
        """Returns the tokenizer's own chat template."""
        return self.tokenizer.get_chat_template()

    def marker_ids(self, tokenizer: Any) -> dict[str, int]:
        """Returns the ids of all tokens that the tokenizer calls special, and of those that the template writes."""
        written = {*self.markers, *self.stop, *self.openings, *self.answer_tokens}
        added = tokenizer.added_tokens_decoder.items()
        return {token.content: id_ for id_, token in added if token.special or token.content in written}

    def check(self, tokenizer: Any) -> None:
        """Nothing to check: the template is the tokenizer's."""

    def fingerprint(self) -> str:
        """Returns a hash of the chat templates and of what answers may spell."""
        own = self.tokenizer.chat_template
        others = sorted(own.items()) if isinstance(own, dict) else []
        return digest([self.chat_template(), *others, *filter(None, [self.answer_tokens])])

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The control tokens, the longest first."""
        return tuple(sorted(filter(None, self.marker_ids(self.tokenizer)), key=len, reverse=True))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile('|'.join(map(re.escape, self.controls)) or r'(?!)')

    def _source(self, conversation: Conversation) -> ChatTemplate | None:
        """The chat template for a conversation: a tokenizer may have another for tools; None for a bare document."""
        return None if conversation.messages[0].role == 'text' else self._sources[bool(conversation.tools)]

    @cached_property
    def _sources(self) -> list[ChatTemplate]:
        texts = [self.tokenizer.get_chat_template(), self.tokenizer.get_chat_template(tools=[{}])]
        return [ChatTemplate(text, source_name(self.tokenizer), self.tokenizer.special_tokens_map) for text in texts]

    def _pieces_of(self, shown: _Shown, texts: list[str] | DataError, train_on: str) -> list[Piece] | DataError:
        if isinstance(texts, DataError):
            return texts
        hidden, text, messages = shown.hidden, texts[0], shown.conversation.messages
        everything = train_on == 'all' and not shown.prompt
        answers = [] if shown.prompt else shown.answers
        pieces: list[Piece] = []
        done = 0
        for number, index in enumerate(answers):
            trained = messages[index].loss
            if trained is None:
                trained = train_on != 'last_turn' or index == answers[-1]
            before, upto = texts[1 + 2 * number : 3 + 2 * number]
            if index + 1 == len(messages) and not upto.startswith(before):
                text = upto = self._behind_opening(shown, before, upto) or upto
            if not (text.startswith(upto) and upto.startswith(before)):
                if trained or everything:
                    return _shown_otherwise(shown, index, before, upto)
                continue
            end = max((m.end() for m in self._pattern.finditer(upto, len(before))), default=len(upto))
            pieces += self._split(text[done : len(before)], hidden, everything)
            answer = self._split(text[len(before) : end], hidden, trained)
            pieces += [piece._replace(starts=place == 0) for place, piece in enumerate(answer)]
            pieces += self._split(text[end : len(upto)], hidden, everything)
            done = len(upto)
        pieces += self._split(text[done:], hidden, everything)
        return pieces if shown.prompt else _without_end(pieces)

    def _behind_opening(self, shown: _Shown, before: str, upto: str) -> str | None:
        """The conversation with its last answer behind the generation prompt, where the template leaves thoughts out.

        The prompt opens `<think>`, the answer begins with it, and the template shows what stands behind the thoughts
        alone. What the model shall write is all of the answer, closed as the template closes it.
        """
        same = common_length(before, upto)
        opening, end = before[same:], upto.rfind(self.stop[0]) if self.stop else -1
        content = shown.chat.messages[-1]['content']
        begins = content.startswith(opening.strip()) and content.endswith(upto[same:end].strip())
        if not opening.strip() or end < same or not begins:
            return None
        body = content[len(opening.strip()) :]
        return before + (body.lstrip('\n') if opening.endswith('\n') else body) + upto[end:]

    def _split(self, text: str, hidden: HiddenTokens, trained: bool) -> list[Piece]:
        pieces = []
        done = 0
        for match in self._pattern.finditer(text):
            pieces += [Piece(hidden.back(text[done : match.start()]), trained=trained),
                       Piece(match.group(), control=True, trained=trained)]  # fmt: skip
            done = match.end()
        pieces.append(Piece(hidden.back(text[done:]), trained=trained))
        return [piece for piece in pieces if piece.text]


def tokenizer_template(tokenizer: Any) -> TokenizerTemplate:
    """Returns the template that stands in the tokenizer.

    Raises:
        ConfigError: Where it has none, or one that cannot be rendered or whose answers do not end with a token.
    """
    if tokenizer is None:
        raise ConfigError("`model.template` 'from_tokenizer' needs the tokenizer")
    if not getattr(tokenizer, 'chat_template', None):
        raise ConfigError("the tokenizer has no chat template to take ('from_tokenizer'); name one of ours, such as "
                          'internlm_chat, as `model.template` or --prompt-template')  # fmt: skip
    check_chat_template(tokenizer.chat_template, f'{source_name(tokenizer)}: `chat_template`')
    try:
        found = probe(tokenizer)
    except DataError as error:
        hint = '' if isinstance(error, TemplateBoundError) else '; name one of our templates with `model.template`'
        raise ConfigError(f'{error}{hint}') from None
    if not found.end:
        raise ConfigError('the chat template of the tokenizer ends an answer with no token, so the model could not '
                          'learn to stop; name one of our templates with `model.template`')  # fmt: skip
    return TokenizerTemplate('from_tokenizer', {'assistant': Turn()}, markers=found.markers, stop=(found.end,),
                             tokenizer=tokenizer, openings=found.openings)  # fmt: skip


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns messages as the tokenizer's chat template writes them, with the generation prompt.

    Raises:
        DataError: The template refuses them, or reaches a bound of `rendering`.
        ConfigError: The tokenizer has no template that can be rendered.
    """
    check_chat_template(tokenizer.chat_template, f'{source_name(tokenizer)}: `chat_template`')
    source = ChatTemplate(tokenizer.get_chat_template(), source_name(tokenizer), tokenizer.special_tokens_map)
    [texts] = render_chats(source, [Chat(messages, None, [(len(messages), True)], 'the messages')])
    if isinstance(texts, DataError):
        raise texts
    return texts[0]


class _Shown(NamedTuple):
    """A conversation on its way through the template."""

    conversation: Conversation
    hidden: HiddenTokens
    chat: Chat
    prompt: bool

    @property
    def answers(self) -> list[int]:
        return _answers(self.conversation.messages)


def _shown(conversation: Conversation, template: TokenizerTemplate, prompt: bool) -> _Shown | DataError:
    messages, tools = conversation.messages, list(conversation.tools)
    views = [(len(messages), prompt)]
    for index in () if prompt else _answers(messages):
        views += [(index, True), (index + 1, False)]
    try:
        hidden = HiddenTokens(messages, tools, template.controls, {*template.openings, *template.answer_tokens})
        shown = [hidden.show(message) for message in messages]
        chat = Chat(shown, hidden.hide(tools) or None, views, conversation.origin)
    except RecursionError:
        return DataError(f'{conversation.origin}: the conversation is nested too deeply')
    except DataError as error:
        return DataError(f'{conversation.origin}: {error}')
    return _Shown(conversation, hidden, chat, prompt)


def _shown_otherwise(shown: _Shown, index: int, before: str, upto: str) -> DataError:
    origin, messages = shown.conversation.origin, shown.conversation.messages
    if index + 1 < len(messages):
        return DataError(f'{origin}: the chat template shows answer {index + 1} in another '
                         "way once more follows; train the last alone: `train_on = 'last_turn'`")  # fmt: skip
    opening = excerpt(repr(before[common_length(before, upto) :]))
    return DataError(f'{origin}: the generation prompt of the chat template ends with {opening}, and the answer in '
                     f'message {index + 1} is not shown behind it; begin that answer with it')  # fmt: skip


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == 'assistant']


def _without_end(pieces: list[Piece]) -> list[Piece]:
    """Leaves out the separator behind the last control token, where nothing follows it."""
    if len(pieces) > 1 and pieces[-2].control and not pieces[-1].control and not pieces[-1].text.strip():
        return pieces[:-1]
    return pieces
