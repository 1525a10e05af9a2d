"""Exceptions in the decoding thread end answers with an error, never the thread; /health reports the failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from xtuner.inference import scheduler as scheduler_module
from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.inference.generate import Sampling
from xtuner.inference.request import Events, GenerationRequest, TextDelta
from xtuner.inference.scheduler import Scheduler

WORDS = 8


class Panic(BaseException):
    """Raised by Rust libraries."""


class Stub:
    """A decoder that generates token 3 until a test makes a method fail."""

    num_slots = 3

    def __init__(self) -> None:
        self.fail: dict[str, Callable[..., None]] = {}
        self.not_finite: set[int] = set()  # prompts that begin with these give NaN
        self.rows: dict[int, int] = {}  # first prompt id, by row

    def _check(self, name: str, *args: Any) -> None:
        self.fail.get(name, lambda *_: None)(*args)

    def _logits(self, rows: Sequence[int]) -> torch.Tensor:
        logits = torch.zeros(len(rows), WORDS)
        logits[:, 3] = 1.0
        for number, slot in enumerate(rows):
            if self.rows.get(slot) in self.not_finite:
                logits[number] = float('nan')
        return logits

    def prefill(self, ids: Sequence[Sequence[int]], *, slot: int, start: int = 0) -> torch.Tensor:
        self._check('prefill', ids)
        self.rows |= {slot + n: one[0] for n, one in enumerate(ids)}
        return self._logits(range(slot, slot + len(ids)))

    def step(self, ids: Sequence[int], lengths: Sequence[int], *, slot: int, **_: Any) -> torch.Tensor:
        time.sleep(0.001)
        self._check('step', slot)
        return self._logits(range(slot, slot + len(ids)))

    def move(self, source: int, target: int, length: int) -> None:
        self._check('move')
        self.rows[target] = self.rows[source]


class Numbers:
    """A tokenizer that a test can make fail."""

    fail: Callable[[], None] | None = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        if self.fail and ids:
            self.fail()
        return ' '.join(map(str, ids))


class Client:
    """Submits requests to a scheduler and collects all deltas."""

    def __init__(self, decoder: Stub, **options: Any) -> None:
        self.pieces: dict[GenerationRequest, list[TextDelta]] = {}
        self.scheduler = Scheduler(decoder, adapters=[None, 'a'], deliver=self._take,
                               **{'use': lambda _: None, 'max_waiting': 8} | options)  # fmt: skip
        self._came = threading.Condition()

    def _take(self, events: Events) -> None:
        with self._came:
            for answer, piece in events:
                self.pieces.setdefault(answer, []).append(piece)
            self._came.notify_all()

    def ask(
        self, first: int = 1, *, adapter: str | None = None, num_tokens: int = 10**6, **options: Any
    ) -> GenerationRequest:
        answer = GenerationRequest(adapter, [first, 2], Sampling(num_tokens, 0.0), frozenset(),
                        IncrementalDetokenizer(options.pop('tokenizer', Numbers())))  # fmt: skip
        self.scheduler.submit([answer])
        return answer

    def begun(self, *answers: GenerationRequest) -> None:
        with self._came:
            assert self._came.wait_for(lambda: all(a in self.pieces for a in answers), 5), 'an answer does not begin'

    def end(self, answer: GenerationRequest) -> TextDelta:
        with self._came:
            ended = self._came.wait_for(lambda: any(p.finish for p in self.pieces.get(answer, [])), 5)
            assert ended, 'an answer never ends'
            (piece,) = [p for p in self.pieces[answer] if p.finish]
        return piece


@contextmanager
def asking(decoder: Stub, **options: Any) -> Iterator[Client]:
    client = Client(decoder, **options)
    client.scheduler.start()
    try:
        yield client
        assert client.scheduler.is_alive, 'the thread is dead'
    finally:
        client.scheduler.stop()


def once(error: BaseException) -> Callable[..., None]:
    """Raises the first time."""
    errors = [error]

    def fail(*_: Any) -> None:
        if errors:
            raise errors.pop()

    return fail


def always(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize('error', [RuntimeError('SECRET'), Panic('SECRET'), MemoryError()])
@pytest.mark.parametrize('where', ['prefill', 'step', 'move'])
def test_one_failure_ends_answers_and_the_next_ones_are_drawn(where: str, error: BaseException) -> None:
    decoder = Stub()
    with asking(decoder) as client:
        first = client.ask(1)
        client.begun(first)
        behind = client.ask(4, adapter='a')
        client.begun(behind)
        fail = once(error)
        decoder.fail[where] = (
            (lambda slot: fail() if slot == 0 else None) if where == 'step' else fail
        )  # that of `first`
        if where == 'prefill':
            lost, kept = [client.ask(5)], [first, behind]
        elif where == 'step':
            lost, kept = [first], [behind]
        else:
            client.scheduler.cancel(first)  # `behind` would move into its row
            lost, kept = [behind], []
        for answer in lost:
            piece = client.end(answer)
            assert piece.finish == 'error' and 'SECRET' not in piece.error
            assert ('out of memory' in piece.error) == isinstance(error, MemoryError)
        assert client.end(client.ask(6, num_tokens=3)).finish == 'length'
        assert not client.scheduler.failure
        for answer in kept:
            assert not answer.finished, 'it took no part in the pass that failed'
            client.scheduler.cancel(answer)


def test_rows_that_cannot_be_moved_are_given_up_without_a_move() -> None:
    decoder = Stub()
    with asking(decoder) as client:
        answers = [client.ask(1), client.ask(4), client.ask(5, adapter='a')]
        client.begun(*answers)
        decoder.fail['move'] = always(RuntimeError('no copy'))
        client.scheduler.cancel(answers[0])
        assert [client.end(answer).finish for answer in answers[1:]] == ['error'] * 2
        assert client.end(client.ask(6, num_tokens=3)).finish == 'length'
        assert client.scheduler.num_failures == 1 and not client.scheduler.failure


def test_a_row_without_finite_logits_ends_alone() -> None:
    decoder = Stub()
    decoder.not_finite = {5}
    with asking(decoder) as client:
        good, bad = client.ask(1, num_tokens=20), client.ask(5, num_tokens=20)
        assert 'NaN' in client.end(bad).error
        assert client.end(good).finish == 'length'
        assert not client.scheduler.failure


def test_text_that_cannot_be_decoded_ends_its_answer_alone() -> None:
    with asking(Stub()) as client:
        tokenizer = Numbers()
        tokenizer.fail = always(Panic())
        good, bad = client.ask(1, num_tokens=20), client.ask(5, tokenizer=tokenizer)
        assert client.end(bad).finish == 'error'
        assert client.end(good).finish == 'length'


def test_a_decoder_that_cannot_go_on_ends_all_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky device error: every call raises. Waiting and later requests get the error too."""
    monkeypatch.setattr(scheduler_module, 'PROBE_S', 0.05)
    decoder = Stub()
    with asking(decoder) as client:
        running = [client.ask(n) for n in (1, 4, 5)]
        client.begun(*running)
        waiting = [client.ask(6), client.ask(7, adapter='a')]
        decoder.fail = {name: always(RuntimeError('illegal address')) for name in ('prefill', 'step', 'move')}
        for answer in [*running, *waiting]:
            assert client.end(answer).finish == 'error'
        assert client.scheduler.failure == 'the model fails'
        assert 'restarted' in client.end(client.ask(8)).error
        assert client.scheduler.num_running == client.scheduler.num_waiting == 0
        decoder.fail.clear()
        until = time.monotonic() + 5
        while client.scheduler.failure and time.monotonic() < until:
            time.sleep(0.01)
        assert not client.scheduler.failure, 'without any request'
        assert client.end(client.ask(8, num_tokens=3)).finish == 'length'


def test_an_adapter_that_cannot_be_used_ends_its_answers_alone() -> None:
    def use(adapter: str | None) -> None:
        if adapter:
            raise RuntimeError('no such adapter')

    with asking(Stub(), use=use) as client:
        good, bad = client.ask(1, num_tokens=20), client.ask(5, adapter='a')
        assert client.end(bad).finish == 'error'
        assert client.end(good).finish == 'length'


def test_a_slow_copy_of_rows_does_not_hold_the_lock() -> None:
    """`cancel` and `submit` are called in the event loop and must not wait for a copy on the device."""
    decoder, going_on = Stub(), threading.Event()
    began = threading.Event()

    def wait(*_: Any) -> None:
        began.set()
        assert going_on.wait(5)

    with asking(decoder) as client:
        first, second = client.ask(1), client.ask(4)
        client.begun(first, second)
        decoder.fail['move'] = wait
        client.scheduler.cancel(first)
        assert began.wait(5)
        before = time.monotonic()
        client.scheduler.cancel(second)
        client.scheduler.cancel(client.ask(5))
        assert time.monotonic() - before < 1
        going_on.set()


def test_a_round_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, 'STUCK_S', 0.1)
    decoder, going_on = Stub(), threading.Event()
    decoder.fail['step'] = lambda *_: going_on.wait(10) and None
    with asking(decoder) as client:
        answer = client.ask(1, num_tokens=3)
        time.sleep(0.3)
        assert 'stuck' in client.scheduler.failure
        going_on.set()
        assert client.end(answer).finish == 'length'
        assert not client.scheduler.failure


# Over HTTP
