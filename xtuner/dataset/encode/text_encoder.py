"""Texts -> token ids such that no control token is recognised in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from xtuner.errors import DataError

_ANCHOR = '\n'  # encoded in front of a text that continues another, where a tokenizer treats beginnings differently
_SHORT, _MOST_KNOWN = 64, 4096  # characters of a text whose encoding is kept, and how many are kept

BOS_CONTEXT, MIDDLE = -1, -2  # what stands before a text: nothing, or more text; otherwise the id of a control token


class TextRun(NamedTuple):
    """A text with the control tokens beside it, or (`id` given) one that is a control token itself."""

    text: str
    before: int
    trained: bool
    id: int | None = None
    next: int = MIDDLE


class TextEncoder:
    """Encodes texts so that no control token is recognised in them.

    Args:
        tokenizer: A transformers tokenizer.
        controls: The template's control tokens and their ids.
    """

    def __init__(self, tokenizer: Any, controls: dict[str, int]) -> None:
        self.controls = controls
        self._tokenizer = tokenizer
        added = getattr(tokenizer, 'added_tokens_decoder', {})
        self._backend: Tokenizer | None = None
        self._space, self._added = ' ', added
        self._literal: Tokenizer | None = None  # like the backend, but that it recognises no special token; made late
        if getattr(tokenizer, 'is_fast', False):
            self._backend, self._space = _without_normalizer(tokenizer.backend_tokenizer, added)
        special = {id_ for id_, token in added.items() if token.special} | set(controls.values())
        self._special = np.array(sorted(special - {tokenizer.unk_token_id}), dtype=np.int64)
        self._names = {id_: token.content for id_, token in added.items()} | {i: t for t, i in controls.items()}
        self._strip_after = {id_ for id_, token in added.items() if token.rstrip}
        self._strip_before = {id_ for id_, token in added.items() if token.lstrip}
        self._strips = bool(self._strip_after or self._strip_before)
        self._anchored = self._begins_differently()
        self._known: dict[tuple[str, int], list[int]] = {}  # the encodings of short texts, most of them the template's

    def encode(self, runs: Sequence[TextRun]) -> list[list[int]]:
        """Encodes runs, in order, as lists of ids; what is not known from before in one batch."""
        result: list[list[int]] = [[]] * len(runs)
        wanted: list[int] = []
        texts: list[tuple[str, int]] = []
        for index, run in enumerate(runs):
            if run.id is not None:
                result[index] = [run.id]
                continue
            key = (self._stripped(run) if self._strips else run.text, run.before if self._anchored else MIDDLE)
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

    def _stripped(self, run: TextRun) -> str:
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

    def _behind_anchors(self, texts: list[tuple[str, int]], literal: Tokenizer | None = None) -> list[list[int]]:
        """Encodes each text behind something like what stands before it, and cuts that off again."""
        anchors = [_ANCHOR if before == MIDDLE else self._names.get(before, '') for _, before in texts]
        heads = dict(zip(kinds := list(set(anchors)), self._raw(kinds, literal), strict=True))
        encoded = self._raw([anchor + text for anchor, (text, _) in zip(anchors, texts, strict=True)], literal)
        for index, anchor in enumerate(anchors):
            head = heads[anchor]
            if encoded[index][: len(head)] == head:
                encoded[index] = encoded[index][len(head) :]
            else:  # the anchor grew together with the text
                encoded[index] = self._raw([texts[index][0]], literal)[0]
        return encoded

    def _raw(self, texts: list[str], literal: Tokenizer | None = None) -> list[list[int]]:
        backend = literal or self._backend
        if backend is None:
            return self._tokenizer(texts, add_special_tokens=False)['input_ids']
        if self._space != ' ':
            texts = [text.replace(' ', self._space) for text in texts]
        if backend.truncation is not None:  # left behind by whoever called the tokenizer last
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _as_text(self, text: str, before: int) -> list[int]:
        """Encodes a text that spells control tokens, as the characters it is made of."""
        ids, last = self._without_special(text, before)
        if last < 0:
            return ids
        cuts = []
        for start, end in self._controls_in(text):
            if start > last:
                break
            if end - start < 2:
                raise DataError(
                    f'the text holds {text[start:end]!r}, which the tokenizer knows only as a control token'
                )
            cuts.append(start + 1)
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        befores = [before, *[MIDDLE] * len(cuts)]
        return [id_ for part in self._batch(list(zip(parts, befores, strict=True))) for id_ in part]

    def _without_special(self, text: str, before: int) -> tuple[list[int], int]:
        """Encodes a text in which special tokens are not recognised, and says where the last control token is still.

        Others than special ones are, and so is what the vocabulary builds from merges; -1 means nowhere.
        """
        if self._backend is None:
            return [], len(text)
        if self._literal is None:
            self._literal = _twin(self._backend, self._added)
            self._literal.encode_special_tokens = True
        ids = self._behind_anchors([(text, before)], self._literal)[0] if self._anchored \
            else self._raw([text], self._literal)[0]  # fmt: skip
        if not np.isin(ids, self._special).any():
            return ids, -1
        return ids, max(self._spans(text, self._literal), default=(-1, -1))[0]

    def _controls_in(self, text: str) -> list[tuple[int, int]]:
        """Where the control tokens that are recognised in `text` stand, in order, as character offsets."""
        if self._backend is not None:
            return self._spans(text, self._backend)
        names = sorted((name for id_, name in self._names.items() if id_ in self._special), key=len)
        return [match.span() for match in re.finditer('|'.join(map(re.escape, filter(None, names))), text)]

    def _spans(self, text: str, backend: Tokenizer) -> list[tuple[int, int]]:
        encoding = backend.encode(text.replace(' ', self._space), add_special_tokens=False)
        found = np.isin(encoding.ids, self._special)
        return [span for span, control in zip(encoding.offsets, found, strict=True) if control]

    def _begins_differently(self) -> bool:
        """Whether a text at the beginning, or behind a control token, is encoded unlike the same text behind a line."""
        alone, behind, line = self._raw(['x', _ANCHOR + 'x', _ANCHOR])
        if behind != line + alone:
            return True
        names = [self._names[id_] for id_ in self._special if id_ in self._names]
        return any(self._raw([name + 'x'])[0][1:] != alone for name in names[:1])


def _without_normalizer(backend: Tokenizer, added: Mapping[int, AddedToken]) -> tuple[Tokenizer, str]:
    """Returns what encodes like `backend`, and what it wants for a space.

    Writing another character for each space is all that many tokenizers' normalisers do, and a fifth of their time goes
    there; replaced beforehand, it takes none. The twin shares the model and keeps its own settings.
    """
    if type(backend.normalizer).__name__ != 'Replace':
        return backend, ' '
    normalizer = json.loads(backend.normalizer.__getstate__())
    if normalizer['pattern'] != {'String': ' '}:
        return backend, ' '
    space = normalizer['content']
    if any(token.normalized or ' ' in token.content or space in token.content for token in added.values()):
        return backend, ' '
    twin = _twin(backend, added)
    twin.normalizer = None
    return (twin, space) if len(space) == 1 else (backend, ' ')


def _twin(backend: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """What encodes like `backend` with settings of its own: other threads encode with that one. The model is shared."""
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    twin.add_tokens([token for _, token in sorted(added.items())])
    same = all(twin.token_to_id(token.content) == id_ for id_, token in added.items())
    return twin if same else Tokenizer.from_str(backend.to_str())
