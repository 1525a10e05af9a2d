r"""Pieces -> token ids and labels: the only place that masks.

Control tokens are inserted as ids. The text between two control tokens is encoded in one go, template text and content
together, as the tokenizer itself would see it, except that a cut is made where the model starts to write: there the
ids of what came before must be those that the model gets as its prompt. Ids of control tokens that the encoding of a
text nevertheless contains came from the content; that text is encoded again so that they cannot.

    <s>  <|User|>:Hi  <eoh>  \n <|Bot|>:  |  Hello  <eoa>          | a cut, though no control token stands there
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
_MOST_PLANS = 1024  # kinds of conversations whose rendering is kept
_MOST_OVER_BOUND = 20  # conversations on which a chat template may take too much before preparation fails


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens.

    Attributes:
        input_ids: int64 `(S,)`.
        labels: int64 `(S,)`: the id itself where it is trained, else -100. The first is always -100: nothing stands
            before it. The loss shifts by one, we do not.
    """

    input_ids: np.ndarray
    labels: np.ndarray


def encode_conversation(
    conversation: Conversation, tokenizer: Any, template: Template, *, train_on: str = 'assistant'
) -> Sample:
    """Encodes one conversation for training.

    Args:
        conversation: What to encode.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        train_on: 'assistant', 'last_turn' or 'all'; see `Template.render`.

    Raises:
        DataError: Where the template has no form for a role of the conversation.
    """
    return Encoder(tokenizer, template, train_on=train_on).encode([conversation])[0]


def encode_prompt(messages: Sequence[Message | dict[str, Any]], tokenizer: Any, template: Template) -> list[int]:
    """Encodes messages up to where the next answer begins: exactly the ids that stand before that answer in training.

    Args:
        messages: `Message`s, or dicts with `role` and `content`; the last one must not be an answer.
        tokenizer: A transformers tokenizer.
        template: The prompt format.

    Raises:
        DataError: On a wrong message, or where the last one is an answer already.
    """
    return encode_pieces(template.render(to_prompt(messages), prompt=True), tokenizer, template)


def encode_pieces(pieces: Sequence[Piece], tokenizer: Any, template: Template) -> list[int]:
    """Encodes what `template` rendered."""
    encoder = Encoder(tokenizer, template)
    return [id_ for ids in encoder.texts.encode(encoder.runs(pieces)) for id_ in ids]


class Encoder:
    """Encodes many conversations at a time with one tokenizer, template and choice of what is trained."""

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
        """The id of the tokenizer's begin, which `truncate_left` keeps in front; None where it has none."""
        return self.texts.controls.get(self._strings['{bos}'])

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Encodes conversations, in order; raises DataError for the first that cannot be encoded."""
        samples = []
        for sample in self.encode_each(conversations, stop=True):
            if isinstance(sample, DataError):
                raise sample
            samples.append(sample)
        return samples

    def encode_each(self, conversations: Sequence[Conversation], *, stop: bool = False) -> list[Sample | DataError]:
        """Encodes conversations, in order; one that cannot be encoded leaves its error in its place.

        Args:
            conversations: What to encode.
            stop: Whether the first error is the last of the results, and nothing is rendered behind it.
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
        except DataError:  # of one of them; which one, each alone tells
            samples = map(self._sample, good)
        return [runs if isinstance(runs, DataError) else next(samples) for runs in results]

    def _count_bounds(self, runs: list[TextRun] | DataError) -> None:
        """Raises DataError once so many conversations cost seconds each that this will not end."""
        self._num_over_bound += isinstance(runs, TemplateBoundError)
        if self._num_over_bound >= _MOST_OVER_BOUND:
            raise DataError(f'{runs}; {self._num_over_bound} conversations have met a bound of the template, and no '
                            'more are tried')  # fmt: skip

    def spelt(self, conversation: Conversation) -> set[str]:
        """Returns the special tokens that answers spell and that are text to the model, though they could be ids."""
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
        trained[cuts[:-1][cuts[:-1] < len(trained)]] = False  # nothing stands before the first token
        labels = np.where(trained, ids, IGNORE_INDEX)
        return [Sample(ids[start:end], labels[start:end]) for start, end in pairwise(cuts.tolist())]

    def runs(self, pieces: Sequence[Piece]) -> list[TextRun]:
        """Joins neighbouring texts: runs end at control tokens, at starts of answers, and where training changes."""
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
        """Renders conversations; a template that is a program looks at the texts, and is run for each."""
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
        """Renders a conversation, or fills its texts into the runs of an earlier one of the same kind.

        Conversations of the same roles, in the same order, differ in their texts alone: rendering them is most of the
        work there is in Python. A kind is all that a rendering looks at but for the texts: where two conversations of
        one kind could be rendered unlike, one would depend on the other.
        """
        if self._spelt_in(conversation, self._meant):  # these texts are not filled in, but taken apart
            return self.runs(self.template.render(conversation, train_on=self.train_on))
        messages = conversation.messages
        kind = (bool(conversation.tools), *((m.role, m.loss, not m.content, *_said(m.extra)) for m in messages))
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plan(conversation)
            if len(self._plans) < _MOST_PLANS:
                self._plans[kind] = plan
        texts = [message.content for message in messages]
        return [
            run if not parts else TextRun(_filled(parts, texts), run.before, run.trained, None, run.next)
            for run, parts in plan
        ]

    def _plan(self, conversation: Conversation) -> list[tuple[TextRun, tuple[str, ...]]]:
        """Renders with numbers for texts; a run with some goes with its parts: template text and numbers in turn."""
        numbered = [replace(message, content=f'\0{number}\0' if message.content else '')
                    for number, message in enumerate(conversation.messages)]  # fmt: skip
        pieces = self.template.render(replace(conversation, messages=tuple(numbered)), train_on=self.train_on)
        runs = self.runs(pieces)
        return [(run, tuple(run.text.split('\0')) if '\0' in run.text else ()) for run in runs]


def _pattern(names: Collection[str]) -> re.Pattern[str] | None:
    return re.compile('|'.join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _said(extra: Mapping[str, Any]) -> list[str]:
    """The names of what a message says beside its text."""
    return [name for name, value in extra.items() if value] if extra else []


def _filled(parts: Sequence[str], texts: Sequence[str]) -> str:
    return ''.join([texts[int(part)] if index % 2 else part for index, part in enumerate(parts)])
