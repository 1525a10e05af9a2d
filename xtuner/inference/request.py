"""A generation request in the scheduler, and the text deltas by which its answer is delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.inference.generate import Sampling


@dataclass(frozen=True)
class TextDelta:
    """What one round adds to an answer.

    Attributes:
        text: New text, possibly ''.
        num_tokens: Tokens generated so far, including the stop token.
        finish: Finish reason: 'stop', 'length', or 'error' if the model failed; None before the end.
        error: Error message for the client.
    """

    text: str
    num_tokens: int
    finish: str | None = None
    error: str = ''


@dataclass(eq=False)
class GenerationRequest:
    """A request for one answer, and its state.

    Attributes:
        adapter: Name of the adapter; None: the base model.
        prompt_ids: Token ids of the prompt, up to the start of the answer.
        sampling: Sampling settings and maximum length.
        stop_ids: Token ids that end the answer.
        text: Detokenizer of the answer.
        seed: Seed of the random numbers if `sampling` has none.
        cancelled: Whether the client no longer needs the answer.
        finished: Whether the answer is complete or has failed.
        num_cached: Tokens in the KV cache.
        num_tokens: Tokens generated so far, including the stop token.
        last_id: The last generated token.
        random: Random numbers for sampling.
    """

    adapter: str | None
    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    text: IncrementalDetokenizer
    seed: int = 0
    cancelled: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    num_cached: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    last_id: int = field(default=0, init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed if self.sampling.seed is None else self.sampling.seed)

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt has been prefilled and the answer is not finished."""
        return self.num_tokens > 0 and not self.finished

    def append(self, id_: int) -> TextDelta:
        """Adds a generated token and returns the new text."""
        self.num_tokens += 1
        self.last_id = id_
        delta = self._delta(id_)
        self.finished = delta.finish is not None
        return delta

    def fail(self, message: str) -> TextDelta:
        """Ends the answer with an error."""
        self.finished = True
        return TextDelta('', self.num_tokens, 'error', message)

    def _delta(self, id_: int) -> TextDelta:
        if id_ in self.stop_ids:
            return TextDelta(self.text.end(), self.num_tokens, 'stop')
        text = self.text.push(id_)
        if self.text.stopped:
            return TextDelta(text, self.num_tokens, 'stop')
        if self.num_tokens < self.sampling.max_new_tokens:
            return TextDelta(text, self.num_tokens)
        text += self.text.end()
        return TextDelta(text, self.num_tokens, 'stop' if self.text.stopped else 'length')


Events = list[tuple[GenerationRequest, TextDelta]]
