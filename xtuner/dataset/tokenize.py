r"""Pieces -> token ids and labels: the only place that masks.

Control tokens are inserted as ids. The text between two control tokens is encoded in one go, template text and content
together, as the tokenizer itself would see it, except that a cut is made where the model starts to write: there the
ids of what came before must be those that the model gets as its prompt. Ids of control tokens that the encoding of a
text nevertheless contains came from the content; that text is encoded again so that they cannot.

    <s>  <|User|>:Hi  <eoh>  \n <|Bot|>:  |  Hello  <eoa>          | a cut, though no control token stands there
    id   one run      id     one run         run    id
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from xtuner.dataset.conversation import Conversation, Message, to_conversation
from xtuner.dataset.prompt import Piece, Template
from xtuner.errors import DataError

IGNORE_INDEX = -100
_ANCHOR = '\n'  # encoded in front of a text that continues another, where a tokenizer treats beginnings differently
_SHORT, _MOST_KNOWN = 64, 4096  # characters of a text whose encoding is kept, and how many are kept


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
    conversation = to_conversation({'messages': list(messages)}, 'the prompt')
    if conversation.messages[-1].role == 'assistant':
        raise DataError('the prompt ends with an answer; it must end with a user or tool message')
    encoder = Encoder(tokenizer, template)
    ids, _ = encoder.encode_pieces([template.render(conversation, prompt=True)])[0]
    return ids.tolist()


class Encoder:
    """Encodes many conversations at a time with one tokenizer, template and choice of what is trained."""

    def __init__(self, tokenizer: Any, template: Template, *, train_on: str = 'assistant') -> None:
        self.template = template
        self.train_on = train_on
        self._texts = TextEncoder(tokenizer, template.marker_ids(tokenizer))
        self._strings = {'{bos}': tokenizer.bos_token or '', '{eos}': tokenizer.eos_token or ''}
        controls = self._texts.controls
        self._controls = {
            **controls,
            **{name: controls[text] for name, text in self._strings.items() if text in controls},
        }
        self._control_runs = {(id_, trained): _Run('', id_, trained, id_) for id_ in controls.values()
                              for trained in (False, True)}  # fmt: skip

    @property
    def begin_id(self) -> int | None:
        """The id of the tokenizer's begin, which `truncate_left` keeps in front; None where it has none."""
        return self._texts.controls.get(self._strings['{bos}'])

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Encodes conversations, in order; raises DataError for the first that the template has no form for."""
        pieces = [self.template.render(conversation, train_on=self.train_on) for conversation in conversations]
        samples = []
        for ids, trained in self.encode_pieces(pieces):
            labels = np.where(trained, ids, IGNORE_INDEX)
            labels[:1] = IGNORE_INDEX
            samples.append(Sample(ids, labels))
        return samples

    def encode_pieces(self, rendered: Sequence[Sequence[Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes rendered conversations: for each its ids, int64 `(S,)`, and which are trained, bool `(S,)`."""
        runs: list[_Run] = []
        ends = []
        for pieces in rendered:
            self._append_runs(pieces, runs)
            ends.append(len(runs))
        lists = self._texts.encode(runs)
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int64, int(sizes.sum()))
        trained = np.repeat(np.fromiter((run.trained for run in runs), bool, len(runs)), sizes)
        cuts = np.concatenate([[0], np.cumsum(sizes)])[np.asarray([0, *ends])]
        return [(ids[a:b], trained[a:b]) for a, b in pairwise(cuts.tolist())]

    def _append_runs(self, pieces: Sequence[Piece], runs: list[_Run]) -> None:
        """Joins neighbouring texts into runs: between control tokens, starts of answers, and changes of training."""
        text, trained, before = '', False, _START
        for piece in pieces:
            control = self._controls.get(piece.text) if piece.control else None
            if control is not None or piece.starts or piece.trained != trained:
                before = _flush(runs, text, trained, before, control)
                text = ''
            if control is not None:
                runs.append(self._control_runs[control, piece.trained])
                before = control
            else:
                text += self._strings.get(piece.text, piece.text)
            trained = piece.trained
        _flush(runs, text, trained, before, None)


_START, _MIDDLE = -1, -2  # what stands before a text: nothing, or more text; otherwise the id of a control token


class _Run(NamedTuple):
    """A text with the control tokens beside it, or (`id` given) one that is a control token itself."""

    text: str
    before: int
    trained: bool
    id: int | None = None
    next: int = _MIDDLE


def _flush(runs: list[_Run], text: str, trained: bool, before: int, next_: int | None) -> int:
    if not text:
        return before
    runs.append(_Run(text, before, trained, None, _MIDDLE if next_ is None else next_))
    return _MIDDLE


class TextEncoder:
    """Encodes texts so that no control token is recognised in them.

    Args:
        tokenizer: A transformers tokenizer.
        controls: The template's control tokens and their ids.
    """

    def __init__(self, tokenizer: Any, controls: dict[str, int]) -> None:
        self.controls = controls
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, 'is_fast', False) else None
        added = getattr(tokenizer, 'added_tokens_decoder', {})
        special = {id_ for id_, token in added.items() if token.special} | set(controls.values())
        self._special = np.array(sorted(special - {tokenizer.unk_token_id}), dtype=np.int64)
        self._names = {id_: token.content for id_, token in added.items()} | {i: t for t, i in controls.items()}
        self._strip_after = {id_ for id_, token in added.items() if token.rstrip}
        self._strip_before = {id_ for id_, token in added.items() if token.lstrip}
        self._strips = bool(self._strip_after or self._strip_before)
        self._anchored = self._begins_differently()
        self._known: dict[tuple[str, int], list[int]] = {}  # the encodings of short texts, most of them the template's

    def encode(self, runs: Sequence[_Run]) -> list[list[int]]:
        """Encodes runs, in order, as lists of ids; what is not known from before in one batch."""
        result: list[list[int]] = [[]] * len(runs)
        wanted: list[int] = []
        texts: list[tuple[str, int]] = []
        for index, run in enumerate(runs):
            if run.id is not None:
                result[index] = [run.id]
                continue
            key = (self._stripped(run) if self._strips else run.text, run.before if self._anchored else _MIDDLE)
            known = self._known.get(key) if len(run.text) < _SHORT else None
            if known is not None:
                result[index] = known
            else:
                wanted.append(index)
                texts.append(key)
        for index, key, ids in zip(wanted, texts, self._batch(texts), strict=True):
            result[index] = ids
            if len(key[0]) < _SHORT and len(self._known) < _MOST_KNOWN:
                self._known[key] = ids
        return result

    def _stripped(self, run: _Run) -> str:
        text = run.text.lstrip() if run.before in self._strip_after else run.text
        return text.rstrip() if run.next in self._strip_before else text

    def _batch(self, texts: list[tuple[str, int]]) -> list[list[int]]:
        """Encodes texts, each with what stands before it; no id in the result is that of a control token."""
        if not texts:
            return []
        encoded = self._behind_anchors(texts) if self._anchored else self._raw([text for text, _ in texts])
        sizes = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        ids = np.fromiter(chain.from_iterable(encoded), np.int64, int(sizes[-1]))
        hits = np.flatnonzero(np.isin(ids, self._special))
        for index in np.unique(np.searchsorted(sizes, hits, side='right')):
            encoded[index] = self._as_text(*texts[index])
        return encoded

    def _behind_anchors(self, texts: list[tuple[str, int]]) -> list[list[int]]:
        """Encodes each text behind something like what stands before it, and cuts that off again."""
        anchors = [_ANCHOR if before == _MIDDLE else self._names.get(before, '') for _, before in texts]
        heads = dict(zip(kinds := list(set(anchors)), self._raw(kinds), strict=True))
        encoded = self._raw([anchor + text for anchor, (text, _) in zip(anchors, texts, strict=True)])
        for index, anchor in enumerate(anchors):
            head = heads[anchor]
            if encoded[index][: len(head)] == head:
                encoded[index] = encoded[index][len(head) :]
            else:  # the anchor grew together with the text
                encoded[index] = self._raw([texts[index][0]])[0]
        return encoded

    def _raw(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            return self._tokenizer(texts, add_special_tokens=False)['input_ids']
        if self._backend.truncation is not None:  # left behind by whoever called the tokenizer last
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _as_text(self, text: str, before: int) -> list[int]:
        """Encodes a text that spells control tokens, as the characters it is made of."""
        if self._backend is not None:
            recognised, self._backend.encode_special_tokens = self._backend.encode_special_tokens, True
            try:
                ids = self._behind_anchors([(text, before)])[0] if self._anchored else self._raw([text])[0]
            finally:
                self._backend.encode_special_tokens = recognised
            if not np.isin(ids, self._special).any():
                return ids
        start, end = self._first_control(text)
        if end - start < 2:
            raise DataError(f'the text holds {text[start:end]!r}, which the tokenizer knows only as a control token')
        head, tail = text[: start + 1], text[start + 1 :]
        return [id_ for part in self._batch([(head, before), (tail, _MIDDLE)]) for id_ in part]

    def _first_control(self, text: str) -> tuple[int, int]:
        """Returns where the first control token that is recognised in `text` stands, as character offsets."""
        if self._backend is None:
            spans = [(text.find(name), len(name)) for id_, name in self._names.items() if id_ in self._special]
            start, size = min(span for span in spans if span[0] >= 0)
            return start, start + size
        encoding = self._backend.encode(text, add_special_tokens=False)
        return next(span for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ in self._special)

    def _begins_differently(self) -> bool:
        """Whether a text at the beginning, or behind a control token, is encoded unlike the same text behind a line."""
        alone, behind, line = self._raw(['x', _ANCHOR + 'x', _ANCHOR])
        if behind != line + alone:
            return True
        names = [self._names[id_] for id_ in self._special if id_ in self._names]
        return any(self._raw([name + 'x'])[0][1:] != alone for name in names[:1])
