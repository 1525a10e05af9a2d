"""`from_tokenizer`: the tokenizer's own chat template, with the exact spans of the answers.

The template is rendered up to each answer with the generation prompt, and up to the answer's end; the answer is the
text in between. Control tokens that a message contains as text are hidden from the template and restored as text.
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
    """A template rendered by the tokenizer's Jinja chat template.

    Attributes:
        tokenizer: The tokenizer.
        openings: Tokens such as `<think>` with which the generation prompt already begins the answer; an answer in the
            data contains them as text, but in the rendering they are the prompt's tokens.
    """

    tokenizer: Any = None
    openings: tuple[str, ...] = ()

    @property
    def fillable(self) -> bool:
        """False: a Jinja template may inspect the texts."""
        return False

    def reads(self, field: str) -> bool:
        """Whether the field's name occurs in the chat template, or in one of several."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, Mapping) else [template]
        return any(re.search(rf'(?<!\w){re.escape(field)}(?!\w)', text or '') for text in texts)

    def render(self, conversation: Conversation, *, train_on: str = 'assistant', prompt: bool = False) -> list[Piece]:
        """Renders a conversation as pieces; see `Template.render`.

        Raises:
            DataError: The chat template rejects the conversation, exceeds a limit of `rendering`, or renders a trained
                answer differently from what follows its prompt.
        """
        pieces = next(self.render_many([conversation], train_on=train_on, prompt=prompt))
        if isinstance(pieces, DataError):
            raise pieces
        return pieces

    def render_many(
        self, conversations: Sequence[Conversation], *, train_on: str = 'assistant', prompt: bool = False
    ) -> Iterator[list[Piece] | DataError]:
        """Renders conversations, many per request to the worker process; see `Template.render_many`."""
        for source, group in groupby(conversations, self._source):
            if source is None:
                yield from (
                    super(TokenizerTemplate, self).render(one, train_on=train_on, prompt=prompt) for one in group
                )
                continue
            requests = [_request(conversation, self, prompt) for conversation in group]
            rendered = render_chats(source, [one.chat for one in requests if isinstance(one, _RenderRequest)])
            yield from (self._pieces_of(one, next(rendered), train_on) if isinstance(one, _RenderRequest) else one
                        for one in requests)  # fmt: skip

    def chat_template(self) -> str:
        """Returns the tokenizer's own chat template."""
        return self.tokenizer.get_chat_template()

    def marker_ids(self, tokenizer: Any) -> dict[str, int]:
        """Returns the ids of all special tokens of the tokenizer and of the tokens that the template writes."""
        used = {*self.markers, *self.stop, *self.openings, *self.answer_tokens}
        added = tokenizer.added_tokens_decoder.items()
        return {token.content: id_ for id_, token in added if token.special or token.content in used}

    def check(self, tokenizer: Any) -> None:
        """Does nothing: the template is the tokenizer's own."""

    def fingerprint(self) -> str:
        """Returns a hash of the chat templates and of the allowed answer tokens."""
        template = self.tokenizer.chat_template
        others = sorted(template.items()) if isinstance(template, dict) else []
        return digest([self.chat_template(), *others, *filter(None, [self.answer_tokens])])

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The control tokens, longest first."""
        return tuple(sorted(filter(None, self.marker_ids(self.tokenizer)), key=len, reverse=True))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile('|'.join(map(re.escape, self.controls)) or r'(?!)')

    def _source(self, conversation: Conversation) -> ChatTemplate | None:
        """The chat template for a conversation (a tokenizer may have another for tools); None for a plain document."""
        return None if conversation.messages[0].role == 'text' else self._sources[bool(conversation.tools)]

    @cached_property
    def _sources(self) -> list[ChatTemplate]:
        texts = [self.tokenizer.get_chat_template(), self.tokenizer.get_chat_template(tools=[{}])]
        return [ChatTemplate(text, source_name(self.tokenizer), self.tokenizer.special_tokens_map) for text in texts]

    def _pieces_of(
        self, request: _RenderRequest, texts: list[str] | DataError, train_on: str
    ) -> list[Piece] | DataError:
        if isinstance(texts, DataError):
            return texts
        hidden, text, messages = request.hidden, texts[0], request.conversation.messages
        everything = train_on == 'all' and not request.prompt
        answers = [] if request.prompt else request.answers
        pieces: list[Piece] = []
        done = 0
        for number, index in enumerate(answers):
            trained = messages[index].loss
            if trained is None:
                trained = train_on != 'last_turn' or index == answers[-1]
            before, upto = texts[1 + 2 * number : 3 + 2 * number]
            if index + 1 == len(messages) and not upto.startswith(before):
                text = upto = self._answer_after_opening(request, before, upto) or upto
            if not (text.startswith(upto) and upto.startswith(before)):
                if trained or everything:
                    return _rendering_differs(request, index, before, upto)
                continue
            end = max((m.end() for m in self._pattern.finditer(upto, len(before))), default=len(upto))
            pieces += self._split(text[done : len(before)], hidden, everything)
            answer = self._split(text[len(before) : end], hidden, trained)
            pieces += [piece._replace(starts=position == 0) for position, piece in enumerate(answer)]
            pieces += self._split(text[end : len(upto)], hidden, everything)
            done = len(upto)
        pieces += self._split(text[done:], hidden, everything)
        return pieces if request.prompt else _without_final_separator(pieces)

    def _answer_after_opening(self, request: _RenderRequest, before: str, upto: str) -> str | None:
        """Rendering with the last answer after the generation prompt, for templates that strip thoughts from answers.

        The prompt opens `<think>` and the answer begins with it, but the template renders only what follows the
        thoughts. The model must write the whole answer, closed as the template closes it.
        """
        same = common_length(before, upto)
        opening, end = before[same:], upto.rfind(self.stop[0]) if self.stop else -1
        content = request.chat.messages[-1]['content']
        begins = content.startswith(opening.strip()) and content.endswith(upto[same:end].strip())
        if not opening.strip() or end < same or not begins:
            return None
        body = content[len(opening.strip()) :]
        return before + (body.lstrip('\n') if opening.endswith('\n') else body) + upto[end:]

    def _split(self, text: str, hidden: HiddenTokens, trained: bool) -> list[Piece]:
        pieces = []
        done = 0
        for match in self._pattern.finditer(text):
            pieces += [Piece(hidden.restore(text[done : match.start()]), trained=trained),
                       Piece(match.group(), control=True, trained=trained)]  # fmt: skip
            done = match.end()
        pieces.append(Piece(hidden.restore(text[done:]), trained=trained))
        return [piece for piece in pieces if piece.text]


def tokenizer_template(tokenizer: Any) -> TokenizerTemplate:
    """Returns the template for the tokenizer's own chat template.

    Raises:
        ConfigError: It has none, or one that cannot be rendered or whose answers do not end with a token.
    """
    if tokenizer is None:
        raise ConfigError("`model.template` 'from_tokenizer' requires the tokenizer")
    if not getattr(tokenizer, 'chat_template', None):
        raise ConfigError("the tokenizer has no chat template ('from_tokenizer'); use a built-in one, such as "
                          'internlm_chat, as `model.template` or --prompt-template')  # fmt: skip
    check_chat_template(tokenizer.chat_template, f'{source_name(tokenizer)}: `chat_template`')
    try:
        probed = probe(tokenizer)
    except DataError as error:
        hint = '' if isinstance(error, TemplateBoundError) else '; use a built-in template with `model.template`'
        raise ConfigError(f'{error}{hint}') from None
    if not probed.end:
        raise ConfigError('the chat template of the tokenizer does not end an answer with a token, so the model would '
                          'not learn to stop; use a built-in template with `model.template`')  # fmt: skip
    return TokenizerTemplate('from_tokenizer', {'assistant': Turn()}, markers=probed.markers, stop=(probed.end,),
                             tokenizer=tokenizer, openings=probed.openings)  # fmt: skip


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns messages as rendered by the tokenizer's chat template, with the generation prompt.

    Raises:
        DataError: The template rejects them, or exceeds a limit of `rendering`.
        ConfigError: The tokenizer has no template that can be rendered.
    """
    check_chat_template(tokenizer.chat_template, f'{source_name(tokenizer)}: `chat_template`')
    source = ChatTemplate(tokenizer.get_chat_template(), source_name(tokenizer), tokenizer.special_tokens_map)
    [texts] = render_chats(source, [Chat(messages, None, [(len(messages), True)], 'the messages')])
    if isinstance(texts, DataError):
        raise texts
    return texts[0]


class _RenderRequest(NamedTuple):
    """A conversation prepared for rendering by the chat template."""

    conversation: Conversation
    hidden: HiddenTokens
    chat: Chat
    prompt: bool

    @property
    def answers(self) -> list[int]:
        return _answers(self.conversation.messages)


def _request(conversation: Conversation, template: TokenizerTemplate, prompt: bool) -> _RenderRequest | DataError:
    messages, tools = conversation.messages, list(conversation.tools)
    views = [(len(messages), prompt)]
    for index in () if prompt else _answers(messages):
        views += [(index, True), (index + 1, False)]
    try:
        hidden = HiddenTokens(messages, tools, template.controls, {*template.openings, *template.answer_tokens})
        visible = [hidden.show(message) for message in messages]
        chat = Chat(visible, hidden.hide(tools) or None, views, conversation.origin)
    except RecursionError:
        return DataError(f'{conversation.origin}: the conversation is nested too deeply')
    except DataError as error:
        return DataError(f'{conversation.origin}: {error}')
    return _RenderRequest(conversation, hidden, chat, prompt)


def _rendering_differs(request: _RenderRequest, index: int, before: str, upto: str) -> DataError:
    origin, messages = request.conversation.origin, request.conversation.messages
    if index + 1 < len(messages):
        return DataError(f'{origin}: the chat template renders answer {index + 1} differently once messages follow; '
                         "train only the last answer: `train_on = 'last_turn'`")  # fmt: skip
    opening = excerpt(repr(before[common_length(before, upto) :]))
    return DataError(f'{origin}: the generation prompt of the chat template ends with {opening}, but the answer in '
                     f'message {index + 1} does not follow it; begin that answer with it')  # fmt: skip


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == 'assistant']


def _without_final_separator(pieces: list[Piece]) -> list[Piece]:
    """Drops the separator after the last control token if nothing follows it."""
    if len(pieces) > 1 and pieces[-2].control and not pieces[-1].control and not pieces[-1].text.strip():
        return pieces[:-1]
    return pieces
