"""The one thread that runs the model: answers join and leave between any two steps.

In each round those that are finished or whose reader has gone free their rows, one pass reads prompts that wait (some
short ones together, or a piece of a long one, so that the answers under way never stop for long), and one step for
each adapter in use draws the next token of all its answers.

A pass that raises ends the answers that took part in it. After each failure a token is decoded as a probe: where that
fails too, or where rows could not be moved, all answers in the table end. Where the decoder still fails with an empty
table (a sticky device error), so do all that wait, and the service is unhealthy until a probe succeeds again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xtuner.inference.answer import Answer, Events
from xtuner.inference.decoder_interface import Decoder
from xtuner.inference.failures import BROKEN, NotFinite, failure_message
from xtuner.inference.sampling import sample_tokens
from xtuner.inference.slots import SlotTable

logger = logging.getLogger('xtuner')

READ_AT_ONCE = 512  # tokens of prompts in a pass
STUCK_S = 120.0  # seconds after which a round counts as stuck
PROBE_S = 10.0  # seconds between two probes of a decoder that failed, while nobody asks


class QueueFull(Exception):
    """As many answers wait as may."""


class Scheduler:
    """Draws many answers at once.

    Args:
        decoder: Runs the model.
        adapters: Those that answers may name.
        use: Called before a pass with the adapter that it is for.
        deliver: Called from the thread, once a round, with what it drew.
        most_waiting: Answers that may wait for a row.

    Attributes:
        num_failures: Passes that raised and answers without finite logits, since the start.
        broken: Whether the decoder failed on the last probe.
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
        self.num_failures = 0
        self.broken = False
        self._decoder, self._use, self._deliver = decoder, use, deliver
        self._adapters = tuple(adapters)
        self._table: SlotTable[Answer] = SlotTable(adapters, self._move)
        self._waiting: deque[Answer] = deque()
        self._reading: Answer | None = None  # whose long prompt is being read piece by piece
        self._changed = threading.Condition()  # guards `_waiting` and `_stopping`; never held during a pass or a copy
        self._stopping = False
        self._round_began: float | None = None
        self._thread = threading.Thread(target=self._run, name='decoding', daemon=True)

    @property
    def num_running(self) -> int:
        """Answers that hold a row."""
        return len(self._table)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for one."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def trouble(self) -> str:
        """Why no answer is drawn now; '' where all is well."""
        began = self._round_began
        if not self.is_alive:
            return 'the decoding thread has ended'
        if self.broken:
            return 'the model fails'
        seconds = 0.0 if began is None else time.monotonic() - began
        return f'decoding is stuck for {seconds:.0f} s' if seconds > STUCK_S else ''

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
        free = max(self._decoder.num_rows - len(self._table), 0)
        waiting = len(self._waiting)
        if waiting + num_answers > self.most_waiting + free:
            raise QueueFull(f'{max(waiting - free, 0)} answers wait already and at most {self.most_waiting} may; '
                            'try again later')  # fmt: skip

    def cancel(self, answer: Answer) -> None:
        """Gives an answer up; its row is free from the next round on."""
        with self._changed:
            answer.cancelled = True
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            events: Events = []
            self._round_began = time.monotonic()
            try:
                self._round(events)
            except BaseException as error:  # a panic of a library in Rust is no Exception
                self._fail_all(error, events)
            self._round_began = None
            self._deliver(events)

    def _wait(self) -> bool:
        """Waits for work, or until a broken decoder is to be probed; returns False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._waiting or len(self._table), PROBE_S if self.broken else None
            )
            return not self._stopping

    def _round(self, events: Events) -> None:
        if self.broken:
            self._probe()
        self._free_rows()
        self._read(self._join(), events)
        self._step(events)
        self._free_rows()

    def _free_rows(self) -> None:
        """Frees the rows of answers that are finished or that nobody wants any more."""
        for adapter, answer in self._table.items():
            if answer.cancelled or answer.finished:
                if self._reading is answer:
                    self._reading = None
                self._table.remove(adapter, answer)

    def _join(self) -> list[Answer]:
        """Gives free rows to answers that wait; returns these."""
        joining: list[Answer] = []
        while len(self._table) < self._decoder.num_rows and self._reading is None:
            with self._changed:
                answer = self._waiting[0] if self._waiting else None
            if answer is None:
                break
            longest = max(len(a.prompt_ids) for a in [*joining, answer])
            if joining and (answer.adapter != joining[0].adapter or longest * (len(joining) + 1) > READ_AT_ONCE):
                break
            self._table.add(answer.adapter, answer)
            joining.append(answer)
            with self._changed:
                if answer in self._waiting:  # else it was cancelled meanwhile
                    self._waiting.remove(answer)
            if longest > READ_AT_ONCE:
                self._reading = answer
        return joining

    def _read(self, joining: Sequence[Answer], events: Events) -> None:
        """One pass over prompts, if any are to be read."""
        answers = [self._reading] if self._reading else list(joining)
        if not answers:
            return
        start = answers[0].num_read
        ids = [answer.prompt_ids[start : start + READ_AT_ONCE] for answer in answers]
        try:
            self._use(answers[0].adapter)
            logits = self._decoder.prefill(ids, row=self._table.row(answers[0].adapter, answers[0]), start=start)
            for row, answer in enumerate(answers):
                answer.num_read += len(ids[row])
            if self._reading and self._reading.num_read < len(self._reading.prompt_ids):
                return
            self._reading = None
            self._draw(answers, logits, events)
        except BaseException as error:
            self._fail(answers, error, events)

    def _step(self, events: Events) -> None:
        """The next token of every answer whose prompt is read."""
        alone = sum(bool(self._table.group(adapter)[1]) for adapter in self._adapters) == 1
        for adapter in self._adapters:
            row, answers = self._table.group(adapter)
            drawing = [number for number, answer in enumerate(answers) if answer.is_drawn]
            if not drawing:
                continue
            # One whose prompt is still being read stands in between: what is written for it here, the next piece of
            # its prompt writes over.
            ids, lengths = [a.last_id for a in answers], [a.num_read for a in answers]
            try:
                self._use(adapter)
                logits = self._decoder.step(ids, lengths, row=row, alone=alone, key=adapter)
                for number in drawing:
                    answers[number].num_read += 1
                self._draw([answers[number] for number in drawing], logits[drawing], events)
            except BaseException as error:
                self._fail([answers[number] for number in drawing], error, events)

    def _draw(self, answers: Sequence[Answer], logits: Tensor, events: Events) -> None:
        tokens = sample_tokens(logits, [a.sampling for a in answers], [a.random for a in answers])
        for answer, token in zip(answers, tokens, strict=True):
            try:
                if token is None:
                    raise NotFinite
                piece = answer.take(token)
            except BaseException as error:
                self._fail([answer], error, events)
                continue
            if piece.text or piece.finish:
                events.append((answer, piece))

    def _move(self, source: int, target: int, answer: Answer) -> None:
        self._decoder.move(source, target, answer.num_read)

    # Failures. What is logged holds no word of what was asked.

    def _fail(self, answers: Sequence[Answer], error: BaseException, events: Events) -> None:
        """Ends some answers of the table; raises where the decoder fails on a probe too."""
        self._end([answer for answer in answers if not answer.finished], error, events)
        self._probe(self._table.row(answers[0].adapter, answers[0]))

    def _fail_all(self, error: BaseException, events: Events) -> None:
        """Ends all answers of the table and, where the decoder fails on a probe, those that wait."""
        held = [answer for _, answer in self._table.items()]
        self._table.clear()  # without moves: they may be what fails
        self._reading = None
        was_broken = self.broken
        try:
            self._probe()
        except BaseException as second:
            self.broken = True
            with self._changed:
                held += self._waiting
                self._waiting.clear()
            if not was_broken:
                logger.error('the decoder fails on every token (%s); /health is 503 until a probe succeeds, or restart '
                             'the service', type(second).__name__)  # fmt: skip
        if held or not was_broken:
            self._end([answer for answer in held if not answer.finished], error, events)

    def _end(self, answers: Sequence[Answer], error: BaseException, events: Events) -> None:
        self.num_failures += 1
        logger.error('decoding failed (%s); answers lost: %d', type(error).__name__, len(answers))
        logger.debug('what failed', exc_info=error)
        message = BROKEN if self.broken else failure_message(error)
        events += [(answer, answer.fail(message)) for answer in answers]

    def _probe(self, row: int = 0) -> None:
        """Decodes two tokens in a row that nobody needs; raises whatever the decoder raises."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what an allocation that failed left behind in pieces
        self._use(self._adapters[0])
        self._decoder.prefill([[0]], row=row)
        logits = self._decoder.step([0], [1], row=row)
        if not bool(logits.max().isfinite()):  # waits for the device, whose errors come late
            raise NotFinite
        self.broken = False
