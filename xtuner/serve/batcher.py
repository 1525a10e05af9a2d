"""The one thread that runs the model: answers join and leave between any two steps.

In each round those that are finished or whose reader has gone free their rows, one pass reads prompts that wait (some
short ones together, or a piece of a long one, so that the answers under way never stop for long), and one step for
each adapter in use draws the next token of all its answers.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from torch import Tensor

from xtuner.model.generate import Sampling
from xtuner.model.text import AnswerText
from xtuner.serve.draw import draw_tokens
from xtuner.serve.table import Table

logger = logging.getLogger('xtuner')

READ_AT_ONCE = 512  # tokens of prompts in a pass


class QueueFull(Exception):
    """As many answers wait as may."""


@dataclass(frozen=True)
class Piece:
    """What a round added to an answer.

    Attributes:
        text: New text, perhaps ''.
        num_tokens: Tokens drawn so far, the stop token included.
        finish: 'stop' or 'length' at the end, 'error' where the model failed; None before.
    """

    text: str
    num_tokens: int
    finish: str | None = None


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
    text: AnswerText
    seed: int = 0
    cancelled: bool = field(default=False, init=False)
    num_read: int = field(default=0, init=False)  # tokens in the store
    num_tokens: int = field(default=0, init=False)
    last_id: int = field(default=0, init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed if self.sampling.seed is None else self.sampling.seed)

    def take(self, id_: int) -> Piece:
        """Adds a token."""
        self.num_tokens += 1
        self.last_id = id_
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


class Decoder(Protocol):
    """What the thread needs of `xtuner.model.batching.BatchDecoder`."""

    num_rows: int

    def prefill(self, ids: Sequence[Sequence[int]], *, row: int, start: int = 0) -> Tensor:
        """Reads prompts."""

    def step(
        self, ids: Sequence[int], lengths: Sequence[int], *, row: int, alone: bool = False, key: Hashable = None
    ) -> Tensor:
        """Reads one more token of each."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row."""


class Batcher:
    """Draws many answers at once.

    Args:
        decoder: Runs the model.
        adapters: Those that answers may name.
        use: Called before a pass with the adapter that it is for.
        deliver: Called from the thread, once a round, with what it drew.
        most_waiting: Answers that may wait for a row.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        adapters: Sequence[str | None],
        use: Callable[[str | None], None],
        deliver: Callable[[Events], None],
        most_waiting: int,
    ) -> None:
        self.most_waiting = most_waiting
        self.failures = 0  # rounds in a row that raised
        self._decoder, self._use, self._deliver = decoder, use, deliver
        self._adapters = tuple(adapters)
        self._table: Table[Answer] = Table(adapters, self._move)
        self._waiting: deque[Answer] = deque()
        self._reading: Answer | None = None  # whose long prompt is being read piece by piece
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name='decoding', daemon=True)

    @property
    def num_running(self) -> int:
        """Answers that hold a row."""
        return len(self._table)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for one."""
        return len(self._waiting)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the round under way; what is unfinished stays so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queues answers, all or none.

        Raises:
            QueueFull: they do not fit behind those that wait.
        """
        with self._changed:
            self.check_room(len(answers))
            self._waiting.extend(answers)
            self._changed.notify()

    def check_room(self, num_answers: int) -> None:
        """Raises QueueFull where so many answers would not fit now: asked before any work is put into them."""
        free = self._decoder.num_rows - len(self._table)
        if len(self._waiting) + num_answers > self.most_waiting + max(free, 0):
            raise QueueFull(f'{len(self._waiting)} answers wait already and at most {self.most_waiting} may; '
                            'try again later')  # fmt: skip

    def cancel(self, answer: Answer) -> None:
        """Gives an answer up; its row is free from the next round on."""
        with self._changed:
            answer.cancelled = True
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or len(self._table))
                if self._stopping:
                    return
                joining = self._leave_and_join()
            events: Events = []
            try:
                self._read(joining, events)
                self._step(events)
                self.failures = 0
            except Exception as error:  # of any library below: the answers under way are lost, the service is not
                self._fail(error, events)
            self._deliver(events)

    def _leave_and_join(self) -> list[Answer]:
        """Frees rows that nobody wants any more and gives them to answers that wait; returns these."""
        for _, answer in self._table.items():
            if answer.cancelled:
                self._leave(answer)
        joining: list[Answer] = []
        while self._waiting and len(self._table) < self._decoder.num_rows and self._reading is None:
            answer = self._waiting[0]
            longest = max(len(a.prompt_ids) for a in [*joining, answer])
            if joining and (answer.adapter != joining[0].adapter or longest * (len(joining) + 1) > READ_AT_ONCE):
                break
            joining.append(self._waiting.popleft())
            self._table.add(answer.adapter, answer)
            if longest > READ_AT_ONCE:
                self._reading = answer
                break
        return joining

    def _read(self, joining: Sequence[Answer], events: Events) -> None:
        """One pass over prompts, if any are to be read."""
        answers = [self._reading] if self._reading else list(joining)
        if not answers:
            return
        start = answers[0].num_read
        ids = [answer.prompt_ids[start : start + READ_AT_ONCE] for answer in answers]
        self._use(answers[0].adapter)
        logits = self._decoder.prefill(ids, row=self._table.row(answers[0].adapter, answers[0]), start=start)
        done = []
        for row, answer in enumerate(answers):
            answer.num_read += len(ids[row])
            if answer.num_read == len(answer.prompt_ids):
                done.append(row)
        if len(done) < len(answers):  # more of a long prompt is to come
            return
        self._reading = None
        self._draw(answers, logits, events)

    def _step(self, events: Events) -> None:
        """The next token of every answer whose prompt is read."""
        for adapter in self._adapters:  # each looked up when it is its turn: rows move when an answer ends
            row, answers = self._table.group(adapter)
            drawing = [number for number, answer in enumerate(answers) if answer.num_tokens]
            if not drawing:
                continue
            self._use(adapter)
            # One whose prompt is still being read stands in between: what is written for it here, the next piece of
            # its prompt writes over.
            alone = len(answers) == len(self._table)
            ids, lengths = [a.last_id for a in answers], [a.num_read for a in answers]
            logits = self._decoder.step(ids, lengths, row=row, alone=alone, key=adapter)
            for number in drawing:
                answers[number].num_read += 1
            self._draw([answers[number] for number in drawing], logits[drawing], events)

    def _draw(self, answers: Sequence[Answer], logits: Tensor, events: Events) -> None:
        tokens = draw_tokens(logits, [a.sampling for a in answers], [a.random for a in answers])
        for answer, token in zip(answers, tokens, strict=True):
            piece = answer.take(token)
            if piece.finish:
                self._leave(answer)
            if piece.text or piece.finish:
                events.append((answer, piece))

    def _leave(self, answer: Answer) -> None:
        self._table.remove(answer.adapter, answer)
        if self._reading is answer:
            self._reading = None

    def _move(self, source: int, target: int, answer: Answer) -> None:
        self._decoder.move(source, target, answer.num_read)

    def _fail(self, error: Exception, events: Events) -> None:
        """Ends every answer that holds a row; says so without a word of what was asked."""
        self.failures += 1
        logger.error('decoding failed (%s); %d answers are lost', type(error).__name__, len(self._table))
        logger.debug('what failed', exc_info=error)
        for _, answer in self._table.items():
            self._leave(answer)
            events.append((answer, Piece('', answer.num_tokens, 'error')))
