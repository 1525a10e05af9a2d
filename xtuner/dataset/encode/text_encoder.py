"""Encodes text as token ids without recognising control tokens in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from xtuner.errors import DataError

_ANCHOR = '\n'  # prefix for text that continues other text, if the tokenizer treats the start of a text differently
_SHORT, _MAX_CACHED = 64, 4096  # maximum characters of a cached text, and maximum number of cached texts

BOS_CONTEXT, MIDDLE = -1, -2  # what precedes a text: nothing or other text; otherwise a control token's id


class TextRun(NamedTuple):
    """A text with the control tokens next to it, or (if `id` is given) a control token itself."""

    text: str
    before: int
    trained: bool
    id: int | None = None
    next: int = MIDDLE


class TextEncoder:
    """Encodes texts without recognising control tokens in them.

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
        self._literal: Tokenizer | None = None  # the backend without special tokens, built on first use
        if getattr(tokenizer, 'is_fast', False):
            self._backend, self._space = _without_normalizer(tokenizer.backend_tokenizer, added)
        special = {id_ for id_, token in added.items() if token.special} | set(controls.values())
        self._special = np.array(sorted(special - {tokenizer.unk_token_id}), dtype=np.int64)
        self._names = {id_: token.content for id_, token in added.items()} | {i: t for t, i in controls.items()}
        self._strip_after = {id_ for id_, token in added.items() if token.rstrip}
        self._strip_before = {id_ for id_, token in added.items() if token.lstrip}
        self._strips = bool(self._strip_after or self._strip_before)
        self._anchored = self._begins_differently()
        self._cache: dict[tuple[str, int], list[int]] = {}  # ids of short texts, mostly the template's

    def encode(self, runs: Sequence[TextRun]) -> list[list[int]]:
        """Encodes runs in order as lists of ids; everything that is not cached goes into one batch."""
        result: list[list[int]] = [[]] * len(runs)
        uncached: list[int] = []
        texts: list[tuple[str, int]] = []
        for index, run in enumerate(runs):
            if run.id is not None:
                result[index] = [run.id]
                continue
            key = (self._stripped(run) if self._strips else run.text, run.before if self._anchored else MIDDLE)
            cached = self._cache.get(key) if len(run.text) < _SHORT else None
            if cached is not None:
                result[index] = cached
            else:
                uncached.append(index)
                texts.append(key)
        for index, key, ids in zip(uncached, texts, self._batch(texts), strict=True):
            result[index] = ids
            if len(key[0]) < _SHORT and len(self._cache) < _MAX_CACHED:
                self._cache[key] = ids
        return result

    def _stripped(self, run: TextRun) -> str:
        text = run.text.lstrip() if run.before in self._strip_after else run.text
        return text.rstrip() if run.next in self._strip_before else text

    def _batch(self, texts: list[tuple[str, int]]) -> list[list[int]]:
        """Encodes texts, each with what precedes it; the result contains no control token's id."""
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
        """Encodes each text after an anchor that stands for what precedes it, and removes the anchor's ids."""
        anchors = [_ANCHOR if before == MIDDLE else self._names.get(before, '') for _, before in texts]
        heads = dict(zip(kinds := list(set(anchors)), self._raw(kinds, literal), strict=True))
        encoded = self._raw([anchor + text for anchor, (text, _) in zip(anchors, texts, strict=True)], literal)
        for index, anchor in enumerate(anchors):
            head = heads[anchor]
            if encoded[index][: len(head)] == head:
                encoded[index] = encoded[index][len(head) :]
            else:  # the anchor was merged into the text
                encoded[index] = self._raw([texts[index][0]], literal)[0]
        return encoded

    def _raw(self, texts: list[str], literal: Tokenizer | None = None) -> list[list[int]]:
        backend = literal or self._backend
        if backend is None:
            return self._tokenizer(texts, add_special_tokens=False)['input_ids']
        if self._space != ' ':
            texts = [text.replace(' ', self._space) for text in texts]
        if backend.truncation is not None:  # set by an earlier caller of the tokenizer
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _as_text(self, text: str, before: int) -> list[int]:
        """Encodes a text that contains the spelling of control tokens as ordinary characters."""
        ids, last = self._without_special(text, before)
        if last < 0:
            return ids
        cuts = []
        for start, end in self._controls_in(text):
            if start > last:
                break
            if end - start < 2:
                raise DataError(
                    f'the text contains {text[start:end]!r}, which the tokenizer can encode only as a control token'
                )
            cuts.append(start + 1)
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        befores = [before, *[MIDDLE] * len(cuts)]
        return [id_ for part in self._batch(list(zip(parts, befores, strict=True))) for id_ in part]

    def _without_special(self, text: str, before: int) -> tuple[list[int], int]:
        """Encodes a text without special tokens; returns the ids and where the last remaining control token begins.

        Added tokens that are not special, and control tokens that merges produce, can remain; -1 means none does.
        """
        if self._backend is None:
            return [], len(text)
        if self._literal is None:
            self._literal = _copy_with_shared_model(self._backend, self._added)
            self._literal.encode_special_tokens = True
        ids = self._behind_anchors([(text, before)], self._literal)[0] if self._anchored \
            else self._raw([text], self._literal)[0]  # fmt: skip
        if not np.isin(ids, self._special).any():
            return ids, -1
        return ids, max(self._spans(text, self._literal), default=(-1, -1))[0]

    def _controls_in(self, text: str) -> list[tuple[int, int]]:
        """Returns the character offsets of the control tokens recognised in `text`, in order."""
        if self._backend is not None:
            return self._spans(text, self._backend)
        names = sorted((name for id_, name in self._names.items() if id_ in self._special), key=len)
        return [match.span() for match in re.finditer('|'.join(map(re.escape, filter(None, names))), text)]

    def _spans(self, text: str, backend: Tokenizer) -> list[tuple[int, int]]:
        encoding = backend.encode(text.replace(' ', self._space), add_special_tokens=False)
        is_control = np.isin(encoding.ids, self._special)
        return [span for span, control in zip(encoding.offsets, is_control, strict=True) if control]

    def _begins_differently(self) -> bool:
        """Whether text at the start or after a control token is encoded differently from text after a line break."""
        alone, behind, line = self._raw(['x', _ANCHOR + 'x', _ANCHOR])
        if behind != line + alone:
            return True
        names = [self._names[id_] for id_ in self._special if id_ in self._names]
        return any(self._raw([name + 'x'])[0][1:] != alone for name in names[:1])


def _without_normalizer(backend: Tokenizer, added: Mapping[int, AddedToken]) -> tuple[Tokenizer, str]:
    """Returns a tokenizer that encodes like `backend`, and the character that it uses for a space.

    Many tokenizers' normalizers only replace each space by another character, at a fifth of the encoding time;
    replacing spaces beforehand costs nothing. The copy shares the model and has its own settings.
    """
    if type(backend.normalizer).__name__ != 'Replace':
        return backend, ' '
    normalizer = json.loads(backend.normalizer.__getstate__())
    if normalizer['pattern'] != {'String': ' '}:
        return backend, ' '
    space = normalizer['content']
    if any(token.normalized or ' ' in token.content or space in token.content for token in added.values()):
        return backend, ' '
    twin = _copy_with_shared_model(backend, added)
    twin.normalizer = None
    return (twin, space) if len(space) == 1 else (backend, ' ')


def _copy_with_shared_model(backend: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """Returns a tokenizer equal to `backend` with its own settings and a shared model; other threads use `backend`."""
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    twin.add_tokens([token for _, token in sorted(added.items())])
    same = all(twin.token_to_id(token.content) == id_ for id_, token in added.items())
    return twin if same else Tokenizer.from_str(backend.to_str())
