r"""Encodes pieces as token ids and labels: the only place that masks tokens from the loss.

Control tokens are inserted as ids. Text between two control tokens, from the template and from messages, is encoded
in one call, as the tokenizer itself would see it. It is split only where the model starts to write: there the ids
before the split must equal the prompt that the model gets at inference. If the encoded text contains the id of a
control token, it came from message content; that text is encoded again without recognising control tokens.

    <s>  <|User|>:Hi  <eoh>  \n <|Bot|>:  |  Hello  <eoa>          | split at the answer, without a control token
    id   one run      id     one run         run    id
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from xtuner.dataset.conversation import MODEL_ROLES, Conversation, Message, to_prompt
from xtuner.dataset.encode.text_encoder import BOS_CONTEXT, MIDDLE, TextEncoder, TextRun
from xtuner.dataset.templates.rendering import TemplateBoundError
from xtuner.dataset.templates.template import Piece, Template
from xtuner.errors import DataError

IGNORE_INDEX = -100
_MAX_PLANS = 1024  # cached renderings, one for each structure of conversation
_MAX_OVER_BOUND = 20  # conversations that may exceed a limit of the chat template before preparation fails


@dataclass(frozen=True)
class Sample:
    """One conversation as token ids.

    Attributes:
        input_ids: int64 `(S,)`.
        labels: int64 `(S,)`: the id where the token is trained, else -100. The first is always -100, because nothing
            precedes it. Labels are not shifted; the loss shifts them by one.
    """

    input_ids: np.ndarray
    labels: np.ndarray


def encode_conversation(
    conversation: Conversation, tokenizer: Any, template: Template, *, train_on: str = 'assistant'
) -> Sample:
    """Encodes one conversation for training.

    Args:
        conversation: The conversation to encode.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        train_on: 'assistant', 'last_turn' or 'all'; see `Template.render`.

    Raises:
        DataError: If the template does not support a role of the conversation.
    """
    return Encoder(tokenizer, template, train_on=train_on).encode([conversation])[0]


def encode_prompt(messages: Sequence[Message | dict[str, Any]], tokenizer: Any, template: Template) -> list[int]:
    """Encodes messages up to the start of the next answer: exactly the ids that precede that answer in training.

    Args:
        messages: `Message`s, or dicts with `role` and `content`; the last one must not be an answer.
        tokenizer: A transformers tokenizer.
        template: The prompt format.

    Raises:
        DataError: On a wrong message, or if the last one is already an answer.
    """
    return encode_pieces(template.render(to_prompt(messages), prompt=True), tokenizer, template)


def encode_pieces(pieces: Sequence[Piece], tokenizer: Any, template: Template) -> list[int]:
    """Encodes pieces that `template` rendered."""
    encoder = Encoder(tokenizer, template)
    return [id_ for ids in encoder.texts.encode(encoder.runs(pieces)) for id_ in ids]


class Encoder:
    """Encodes batches of conversations with one tokenizer, one template and one choice of trained messages."""

    def __init__(self, tokenizer: Any, template: Template, *, train_on: str = 'assistant') -> None:
        self.template = template
        self.train_on = train_on
        self.texts = TextEncoder(tokenizer, template.marker_ids(tokenizer))
        self._strings = {'{bos}': tokenizer.bos_token or '', '{eos}': tokenizer.eos_token or ''}
        controls = self.texts.controls
        named = {name: controls[text] for name, text in self._strings.items() if text in controls}
        self._controls = {**controls, **named}
        self._num_over_bound = 0
        self._meant = _pattern(template.answer_tokens)
        self._spellable = _pattern(set(template.allowable(tokenizer)) - set(template.answer_tokens))
        self._plans: dict[tuple, list[tuple[TextRun, tuple[str, ...]]]] = {}

    @property
    def begin_id(self) -> int | None:
        """The BOS id, which `truncate_left` keeps at the front; None if the tokenizer has none."""
        return self.texts.controls.get(self._strings['{bos}'])

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Encodes conversations in order; raises DataError for the first that cannot be encoded."""
        samples = []
        for sample in self.encode_each(conversations, stop=True):
            if isinstance(sample, DataError):
                raise sample
            samples.append(sample)
        return samples

    def encode_each(self, conversations: Sequence[Conversation], *, stop: bool = False) -> list[Sample | DataError]:
        """Encodes conversations in order; for one that cannot be encoded the result is its error.

        Args:
            conversations: The conversations to encode.
            stop: Whether to stop at the first error and render nothing after it.
        """
        results: list[list[TextRun] | DataError] = []
        for runs in self._runs_of_each(conversations):
            results.append(runs)
            self._count_bounds(runs)
            if stop and isinstance(runs, DataError):
                break
        good = [runs for runs in results if not isinstance(runs, DataError)]
        try:
            samples: Iterator[Sample | DataError] = iter(self._samples(good))
        except DataError:  # find out which one by encoding each alone
            samples = map(self._sample, good)
        return [runs if isinstance(runs, DataError) else next(samples) for runs in results]

    def _count_bounds(self, runs: list[TextRun] | DataError) -> None:
        """Raises DataError once so many conversations have exceeded a limit that preparation would take too long."""
        self._num_over_bound += isinstance(runs, TemplateBoundError)
        if self._num_over_bound >= _MAX_OVER_BOUND:
            raise DataError(f'{runs}; {self._num_over_bound} conversations have exceeded a limit of the template; '
                            'giving up')  # fmt: skip

    def spelt(self, conversation: Conversation) -> set[str]:
        """Returns the special tokens that answers contain as text but that could be encoded as ids."""
        return self._spelt_in(conversation, self._spellable)

    def _spelt_in(self, conversation: Conversation, tokens: re.Pattern[str] | None) -> set[str]:
        if tokens is None:
            return set()
        written = [message.content for message in conversation.messages if message.role in MODEL_ROLES - {'text'}]
        return {name for text in written for name in tokens.findall(text)}

    def _sample(self, runs: list[TextRun]) -> Sample | DataError:
        try:
            return self._samples([runs])[0]
        except DataError as error:
            return error

    def _samples(self, conversations: Sequence[list[TextRun]]) -> list[Sample]:
        runs = list(chain.from_iterable(conversations))
        ends = [0, *accumulate(map(len, conversations))]
        lists = self.texts.encode(runs)
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int64, int(sizes.sum()))
        trained = np.repeat(np.fromiter((run.trained for run in runs), bool, len(runs)), sizes)
        cuts = np.concatenate([[0], np.cumsum(sizes)])[ends]
        trained[cuts[:-1][cuts[:-1] < len(trained)]] = False  # no token precedes the first
        labels = np.where(trained, ids, IGNORE_INDEX)
        return [Sample(ids[start:end], labels[start:end]) for start, end in pairwise(cuts.tolist())]

    def runs(self, pieces: Sequence[Piece]) -> list[TextRun]:
        """Merges adjacent text; a run ends at a control token, at an answer's start, and where `trained` changes."""
        runs: list[TextRun] = []
        text, trained, before = '', False, BOS_CONTEXT
        for piece in pieces:
            control = self._controls.get(piece.text) if piece.control else None
            if text and (control is not None or piece.starts or piece.trained != trained):
                runs.append(TextRun(text, before, trained, None, MIDDLE if control is None else control))
                text, before = '', MIDDLE
            trained = piece.trained
            if control is not None:
                runs.append(TextRun('', control, trained, control))
                before = control
            else:
                text += self._strings.get(piece.text, piece.text) if piece.control else piece.text
        if text:
            runs.append(TextRun(text, before, trained))
        return runs

    def _runs_of_each(self, conversations: Sequence[Conversation]) -> Iterator[list[TextRun] | DataError]:
        """Renders conversations; a Jinja template may inspect the text, so it is run for each conversation."""
        if not self.template.fillable:
            for pieces in self.template.render_many(conversations, train_on=self.train_on):
                yield pieces if isinstance(pieces, DataError) else self.runs(pieces)
            return
        for conversation in conversations:
            try:
                yield self._filled_runs(conversation)
            except DataError as error:
                yield error

    def _filled_runs(self, conversation: Conversation) -> list[TextRun]:
        """Renders a conversation by filling its texts into the cached runs of one with the same structure.

        Conversations with the same sequence of roles differ only in their texts, and rendering is most of the Python
        work. The cache key holds everything that a rendering depends on except the texts; if two conversations with the
        same key rendered differently, the text of one would have affected the rendering.
        """
        if self._spelt_in(conversation, self._meant):  # answer tokens must be split out of the text
            return self.runs(self.template.render(conversation, train_on=self.train_on))
        messages = conversation.messages
        key = (bool(conversation.tools), *((m.role, m.loss, not m.content, *_extra_names(m.extra)) for m in messages))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(conversation)
            if len(self._plans) < _MAX_PLANS:
                self._plans[key] = plan
        texts = [message.content for message in messages]
        return [
            run if not parts else TextRun(_filled(parts, texts), run.before, run.trained, None, run.next)
            for run, parts in plan
        ]

    def _plan(self, conversation: Conversation) -> list[tuple[TextRun, tuple[str, ...]]]:
        """Renders with numbered placeholders as texts; returns each run with its text split at the placeholders."""
        numbered = [replace(message, content=f'\0{number}\0' if message.content else '')
                    for number, message in enumerate(conversation.messages)]  # fmt: skip
        pieces = self.template.render(replace(conversation, messages=tuple(numbered)), train_on=self.train_on)
        runs = self.runs(pieces)
        return [(run, tuple(run.text.split('\0')) if '\0' in run.text else ()) for run in runs]


def _pattern(names: Collection[str]) -> re.Pattern[str] | None:
    return re.compile('|'.join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _extra_names(extra: Mapping[str, Any]) -> list[str]:
    """Names of a message's non-empty extra fields."""
    return [name for name, value in extra.items() if value] if extra else []


def _filled(parts: Sequence[str], texts: Sequence[str]) -> str:
    return ''.join([texts[int(part)] if index % 2 else part for index, part in enumerate(parts)])
