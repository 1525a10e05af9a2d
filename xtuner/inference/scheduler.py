"""The scheduler: one thread runs the model; requests join and leave the batch between any two steps.

Each round frees the slots of finished or cancelled requests, prefills waiting prompts in one pass (several short ones,
or one chunk of a long one, so that running requests are never blocked for long), and runs one decode step for each
adapter in use, which generates the next token of all its requests.

A pass that raises ends the requests that take part in it. After each failure two tokens are decoded as a probe: if it
fails too, or if slots could not be moved, all running requests end. If the decoder still fails with no request running
(a sticky device error), all waiting requests end too, and the service is unhealthy until a probe succeeds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xtuner.inference.decoder_interface import SlotDecoder
from xtuner.inference.failures import BROKEN, NotFinite, failure_message
from xtuner.inference.request import Events, GenerationRequest
from xtuner.inference.sampling import sample_tokens
from xtuner.inference.slots import SlotTable

logger = logging.getLogger('xtuner')

PREFILL_TOKENS = 512  # maximum prompt tokens per pass
STUCK_S = 120.0  # seconds after which a round counts as stuck
PROBE_S = 10.0  # seconds between probes of a failed decoder while there are no requests


class QueueFull(Exception):
    """The maximum number of requests is already waiting."""


class Scheduler:
    """Generates the answers to many requests concurrently.

    Args:
        decoder: Runs the model.
        adapters: The adapters that requests may name.
        use: Activates an adapter; called before each pass.
        deliver: Called from the thread, once per round, with the new text of all requests.
        max_waiting: Maximum number of requests that wait for a slot.

    Attributes:
        num_failures: Passes that raised and requests with non-finite logits, since the start.
        broken: Whether the decoder failed on the last probe.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        *,
        adapters: Sequence[str | None],
        use: Callable[[str | None], None],
        deliver: Callable[[Events], None],
        max_waiting: int,
    ) -> None:
        self.max_waiting = max_waiting
        self.num_failures = 0
        self.broken = False
        self._decoder, self._use, self._deliver = decoder, use, deliver
        self._adapters = tuple(adapters)
        self._slots: SlotTable[GenerationRequest] = SlotTable(adapters, self._move)
        self._waiting: deque[GenerationRequest] = deque()
        self._prefilling: GenerationRequest | None = None  # whose long prompt is being prefilled in chunks
        self._changed = threading.Condition()  # guards `_waiting` and `_stopping`; never held during a pass
        self._stopping = False
        self._round_start: float | None = None
        self._thread = threading.Thread(target=self._run, name='decoding', daemon=True)

    @property
    def num_running(self) -> int:
        """Number of requests in a slot."""
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        """Number of requests waiting for a slot."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def failure(self) -> str:
        """Why no requests are being processed; '' if the scheduler is healthy."""
        start_time = self._round_start
        if not self.is_alive:
            return 'the decoding thread has ended'
        if self.broken:
            return 'the model fails'
        seconds = 0.0 if start_time is None else time.monotonic() - start_time
        return f'decoding has been stuck for {seconds:.0f} s' if seconds > STUCK_S else ''

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread after the current round; unfinished requests are abandoned."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queues requests, all or none.

        Raises:
            QueueFull: too many requests are waiting.
        """
        with self._changed:
            self.check_capacity(len(requests))
            self._waiting.extend(requests)
            self._changed.notify()

    def check_capacity(self, num_requests: int) -> None:
        """Raises QueueFull if that many more requests cannot be queued; to be called before they are encoded."""
        free = max(self._decoder.num_slots - len(self._slots), 0)
        waiting = len(self._waiting)
        if waiting + num_requests > self.max_waiting + free:
            raise QueueFull(f'the queue is full: {max(waiting - free, 0)} answers are waiting, the maximum is '
                            f'{self.max_waiting}; try again later')  # fmt: skip

    def cancel(self, request: GenerationRequest) -> None:
        """Cancels a request; its slot is freed in the next round."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
            self._changed.notify()

    def _run(self) -> None:
        while self._wait():
            events: Events = []
            self._round_start = time.monotonic()
            try:
                self._round(events)
            except BaseException as error:  # a Rust panic is not an Exception
                self._fail_all(error, events)
            self._round_start = None
            self._deliver(events)

    def _wait(self) -> bool:
        """Waits for requests, or for the next probe of a broken decoder; returns False when stopping."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._waiting or len(self._slots), PROBE_S if self.broken else None
            )
            return not self._stopping

    def _round(self, events: Events) -> None:
        if self.broken:
            self._probe()
        self._free_slots()
        self._prefill(self._admit(), events)
        self._step(events)
        self._free_slots()

    def _free_slots(self) -> None:
        """Frees the slots of finished and cancelled requests."""
        for adapter, request in self._slots.items():
            if request.cancelled or request.finished:
                if self._prefilling is request:
                    self._prefilling = None
                self._slots.remove(adapter, request)

    def _admit(self) -> list[GenerationRequest]:
        """Assigns free slots to waiting requests; returns these."""
        admitted: list[GenerationRequest] = []
        while len(self._slots) < self._decoder.num_slots and self._prefilling is None:
            with self._changed:
                request = self._waiting[0] if self._waiting else None
            if request is None:
                break
            longest = max(len(a.prompt_ids) for a in [*admitted, request])
            if admitted and (request.adapter != admitted[0].adapter or longest * (len(admitted) + 1) > PREFILL_TOKENS):
                break
            self._slots.add(request.adapter, request)
            admitted.append(request)
            with self._changed:
                if request in self._waiting:  # otherwise it has been cancelled meanwhile
                    self._waiting.remove(request)
            if longest > PREFILL_TOKENS:
                self._prefilling = request
        return admitted

    def _prefill(self, admitted: Sequence[GenerationRequest], events: Events) -> None:
        """Runs one prefill pass if there are prompts to process."""
        requests = [self._prefilling] if self._prefilling else list(admitted)
        if not requests:
            return
        start = requests[0].num_cached
        ids = [request.prompt_ids[start : start + PREFILL_TOKENS] for request in requests]
        try:
            self._use(requests[0].adapter)
            logits = self._decoder.prefill(ids, slot=self._slots.slot(requests[0].adapter, requests[0]), start=start)
            for number, request in enumerate(requests):
                request.num_cached += len(ids[number])
            if self._prefilling and self._prefilling.num_cached < len(self._prefilling.prompt_ids):
                return
            self._prefilling = None
            self._sample(requests, logits, events)
        except BaseException as error:
            self._fail(requests, error, events)

    def _step(self, events: Events) -> None:
        """Generates the next token of every request whose prompt has been prefilled."""
        exclusive = sum(bool(self._slots.group(adapter)[1]) for adapter in self._adapters) == 1
        for adapter in self._adapters:
            slot, requests = self._slots.group(adapter)
            decoding = [number for number, request in enumerate(requests) if request.is_decoding]
            if not decoding:
                continue
            # A request that is still being prefilled may be among them: what this step writes to its slot is
            # overwritten by the next chunk of its prompt.
            ids, lengths = [a.last_id for a in requests], [a.num_cached for a in requests]
            try:
                self._use(adapter)
                logits = self._decoder.step(ids, lengths, slot=slot, exclusive=exclusive, key=adapter)
                for number in decoding:
                    requests[number].num_cached += 1
                self._sample([requests[number] for number in decoding], logits[decoding], events)
            except BaseException as error:
                self._fail([requests[number] for number in decoding], error, events)

    def _sample(self, requests: Sequence[GenerationRequest], logits: Tensor, events: Events) -> None:
        tokens = sample_tokens(logits, [a.sampling for a in requests], [a.random for a in requests])
        for request, token in zip(requests, tokens, strict=True):
            try:
                if token is None:
                    raise NotFinite
                delta = request.append(token)
            except BaseException as error:
                self._fail([request], error, events)
                continue
            if delta.text or delta.finish:
                events.append((request, delta))

    def _move(self, source: int, target: int, request: GenerationRequest) -> None:
        self._decoder.move(source, target, request.num_cached)

    # Failures. Log messages must not contain prompts or answers.

    def _fail(self, requests: Sequence[GenerationRequest], error: BaseException, events: Events) -> None:
        """Ends some of the running requests with an error; raises if the decoder also fails on a probe."""
        self._end([request for request in requests if not request.finished], error, events)
        self._probe(self._slots.slot(requests[0].adapter, requests[0]))

    def _fail_all(self, error: BaseException, events: Events) -> None:
        """Ends all running requests with an error and, if the decoder fails on a probe, the waiting ones."""
        active = [request for _, request in self._slots.items()]
        self._slots.clear()  # without moves, which may be the cause
        self._prefilling = None
        was_broken = self.broken
        try:
            self._probe()
        except BaseException as second:
            self.broken = True
            with self._changed:
                active += self._waiting
                self._waiting.clear()
            if not was_broken:
                logger.error('the decoder fails on every token (%s); /health returns 503 until a probe succeeds; if it '
                             'does not recover, restart the service', type(second).__name__)  # fmt: skip
        if active or not was_broken:
            self._end([request for request in active if not request.finished], error, events)

    def _end(self, requests: Sequence[GenerationRequest], error: BaseException, events: Events) -> None:
        self.num_failures += 1
        logger.error('decoding failed (%s); failed answers: %d', type(error).__name__, len(requests))
        logger.debug('cause of the failure', exc_info=error)
        message = BROKEN if self.broken else failure_message(error)
        events += [(request, request.fail(message)) for request in requests]

    def _probe(self, slot: int = 0) -> None:
        """Decodes two tokens in an unused slot; raises whatever the decoder raises."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # frees the remains of a failed allocation
        self._use(self._adapters[0])
        self._decoder.prefill([[0]], slot=slot)
        logits = self._decoder.step([0], [1], slot=slot)
        if not bool(logits.max().isfinite()):  # synchronizes with the device, whose errors are asynchronous
            raise NotFinite
        self.broken = False
