"""The text of an answer as its ids come: no half characters, and an end at the first stop word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

REPLACEMENT_CHARACTER = (
    '\ufffd'  # what a tokenizer decodes from the first bytes of a character whose last are still to come
)


def strip_partial_character(text: str) -> str:
    """A decoded answer without the character at its end whose last bytes never came, as where it was cut."""
    return text.rstrip(REPLACEMENT_CHARACTER)


class IncrementalDetokenizer:
    """Turns ids into text, each id once.

    An id is decoded beside those of the piece before it, never alone, for tokenizers drop the space in front of a first
    word; so the cost of an id does not grow with the answer.

    Args:
        tokenizer: Decodes the ids.
        stop: Words that end the answer and are not part of it.

    Attributes:
        stopped: Whether a stop word has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # of the last piece and of what came after it
        self._num_decoded = 0  # ids of the last piece
        self._pending = ''  # text that may be the beginning of a stop word

    def push(self, id_: int) -> str:
        """Takes the next id; returns the text that is certain now, perhaps ''."""
        self._ids.append(id_)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT_CHARACTER):
            return ''
        return self._show(text)

    def end(self) -> str:
        """Returns what was held back: the beginning of a stop word. An unfinished character is left out."""
        if self.stopped:
            return ''
        text = self._show(self._decode(self._ids)) + ('' if self.stopped else self._pending)
        self._pending = ''
        return text

    def _show(self, text: str) -> str:
        before = self._decode(self._ids[: self._num_decoded])
        # A special token may change how the text in front of it is written; what is shown stays as it is.
        new = text[len(before) :] if text.startswith(before) else self._decode(self._ids[self._num_decoded :])
        new = strip_partial_character(new)
        self._ids = self._ids[self._num_decoded :]
        self._num_decoded = len(self._ids)
        self._pending += new
        found = [at for word in self._stop if (at := self._pending.find(word)) >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)]
        keep = max((_overlap(self._pending, word) for word in self._stop), default=0)
        shown, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ''


class TextStream:
    """Shows an answer as it comes: a streamer as transformers' `generate` takes one.

    Args:
        tokenizer: Decodes the ids.
        on_text: Called with each new piece of text.
        stop_ids: Not shown.

    Attributes:
        ids: What was shown.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop_ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._text, self._on_text, self._stop_ids = IncrementalDetokenizer(tokenizer), on_text, frozenset(stop_ids)
        self._prompt_skipped = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt once, then ids as they are drawn."""
        if not self._prompt_skipped:
            self._prompt_skipped = True
            return
        for id_ in value.reshape(-1).tolist():
            if id_ not in self._stop_ids:
                self.ids.append(id_)
                self._show(self._text.push(id_))

    def end(self) -> None:
        """Shows what was held back."""
        self._show(self._text.end())

    def _show(self, text: str) -> None:
        if text:
            self._on_text(text)


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` begin `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
