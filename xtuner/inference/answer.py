"""An answer as the decoding thread draws it, and the pieces in which it goes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.inference.generate import Sampling


@dataclass(frozen=True)
class Piece:
    """What a round added to an answer.

    Attributes:
        text: New text, perhaps ''.
        num_tokens: Tokens drawn so far, the stop token included.
        finish: 'stop' or 'length' at the end, 'error' where the model failed; None before.
        error: What the client reads where it failed.
    """

    text: str
    num_tokens: int
    finish: str | None = None
    error: str = ''


@dataclass(eq=False)
class Answer:
    """An answer asked for.

    Attributes:
        adapter: Which adapter draws it; None for the base.
        prompt_ids: Token ids that end where the answer begins.
        sampling: How it is drawn and how long it may be.
        stop_ids: Ids that end it.
        text: Its text.
        seed: Of the numbers it is drawn with, where `sampling` has none.
    """

    adapter: str | None
    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    text: IncrementalDetokenizer
    seed: int = 0
    cancelled: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    num_read: int = field(default=0, init=False)  # tokens in the store
    num_tokens: int = field(default=0, init=False)
    last_id: int = field(default=0, init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed if self.sampling.seed is None else self.sampling.seed)

    @property
    def is_drawn(self) -> bool:
        """Whether its prompt is read and its end has not come."""
        return self.num_tokens > 0 and not self.finished

    def take(self, id_: int) -> Piece:
        """Adds a token."""
        self.num_tokens += 1
        self.last_id = id_
        piece = self._piece(id_)
        self.finished = piece.finish is not None
        return piece

    def fail(self, message: str) -> Piece:
        """Ends it with an error."""
        self.finished = True
        return Piece('', self.num_tokens, 'error', message)

    def _piece(self, id_: int) -> Piece:
        if id_ in self.stop_ids:
            return Piece(self.text.end(), self.num_tokens, 'stop')
        text = self.text.push(id_)
        if self.text.stopped:
            return Piece(text, self.num_tokens, 'stop')
        if self.num_tokens < self.sampling.max_new_tokens:
            return Piece(text, self.num_tokens)
        text += self.text.end()
        return Piece(text, self.num_tokens, 'stop' if self.text.stopped else 'length')


Events = list[tuple[Answer, Piece]]
