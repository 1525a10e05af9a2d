"""Incremental detokenization: complete characters only, ending at the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

REPLACEMENT_CHARACTER = '\ufffd'  # U+FFFD, decoded from an incomplete UTF-8 sequence


def strip_partial_character(text: str) -> str:
    """Removes an incomplete character from the end of a decoded answer, as left by a truncated one."""
    return text.rstrip(REPLACEMENT_CHARACTER)


class IncrementalDetokenizer:
    """Decodes token ids to text incrementally.

    Ids are decoded together with those of the previous piece of text, because tokenizers drop the space before the
    first word; the cost per id does not grow with the length of the answer.

    Args:
        tokenizer: Decodes the ids.
        stop: Stop strings, which end the answer and are not part of it.

    Attributes:
        stopped: Whether a stop string has occurred.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # ids of the last piece of text and those after it
        self._num_decoded = 0  # number of ids of the last piece of text
        self._pending = ''  # text that may be the start of a stop string

    def push(self, id_: int) -> str:
        """Adds an id; returns the new text that is final, possibly ''."""
        self._ids.append(id_)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT_CHARACTER):
            return ''
        return self._append(text)

    def end(self) -> str:
        """Returns the pending text (the start of a stop string); an incomplete character is dropped."""
        if self.stopped:
            return ''
        text = self._append(self._decode(self._ids)) + ('' if self.stopped else self._pending)
        self._pending = ''
        return text

    def _append(self, text: str) -> str:
        before = self._decode(self._ids[: self._num_decoded])
        # A special token may change how the text before it is decoded; text already returned does not change.
        new = text[len(before) :] if text.startswith(before) else self._decode(self._ids[self._num_decoded :])
        new = strip_partial_character(new)
        self._ids = self._ids[self._num_decoded :]
        self._num_decoded = len(self._ids)
        self._pending += new
        found = [at for word in self._stop if (at := self._pending.find(word)) >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)]
        num_pending = max((_overlap(self._pending, word) for word in self._stop), default=0)
        final, self._pending = (
            self._pending[: len(self._pending) - num_pending],
            self._pending[len(self._pending) - num_pending :],
        )
        return final

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ''


class TextStream:
    """Streams the text of an answer; a streamer for transformers' `generate`.

    Args:
        tokenizer: Decodes the ids.
        on_text: Called with each new piece of text.
        stop_ids: Stop tokens, which are not decoded.

    Attributes:
        ids: The token ids of the answer.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop_ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._text, self._on_text, self._stop_ids = IncrementalDetokenizer(tokenizer), on_text, frozenset(stop_ids)
        self._prompt_skipped = False

    def put(self, value: Tensor) -> None:
        """Receives the prompt once, then ids as they are generated."""
        if not self._prompt_skipped:
            self._prompt_skipped = True
            return
        for id_ in value.reshape(-1).tolist():
            if id_ not in self._stop_ids:
                self.ids.append(id_)
                self._emit(self._text.push(id_))

    def end(self) -> None:
        """Emits the pending text."""
        self._emit(self._text.end())

    def _emit(self, text: str) -> None:
        if text:
            self._on_text(text)


def _overlap(text: str, word: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
