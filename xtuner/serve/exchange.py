"""Delivers the answers of a request to its client, as one response or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from xtuner.inference.request import Events, GenerationRequest, TextDelta
from xtuner.inference.scheduler import QueueFull, Scheduler
from xtuner.serve.problems import APIError
from xtuner.serve.responses import DONE, Pieces, ResponseBuilder, event, json_response

logger = logging.getLogger('xtuner')


class ResponseRouter:
    """Passes generated text from the decoding thread to the request handlers in the event loop."""

    def __init__(self) -> None:
        self.scheduler: Scheduler
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[GenerationRequest, asyncio.Queue[TextDelta]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def open(self) -> None:
        """Connects the router to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def check_capacity(self, num_answers: int) -> None:
        """Raises APIError if the queue has no room for the answers, or the decoding thread has exited."""
        if not self.scheduler.is_alive:
            raise APIError(503, 'the decoding thread has exited; the service must be restarted', code='model_error')
        try:
            self.scheduler.check_capacity(num_answers)
        except QueueFull as error:
            raise _queue_full(error) from None

    def queue(self, answer: GenerationRequest) -> asyncio.Queue[TextDelta]:
        """Creates the queue that receives the pieces of an answer."""
        self._queues[answer] = asyncio.Queue()
        return self._queues[answer]

    def forget(self, answer: GenerationRequest) -> None:
        """Removes an answer, and cancels it if it is unfinished."""
        self._queues.pop(answer, None)
        self.scheduler.cancel(answer)

    def deliver_from_thread(self, events: Events) -> None:
        """Callback of the scheduler, called in the decoding thread."""
        if events and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Events) -> None:
        for answer, piece in events:
            if answer in self._queues:
                self._queues[answer].put_nowait(piece)


class RequestHandler:
    """The answers of one request."""

    def __init__(self, post: ResponseRouter, answers: Sequence[GenerationRequest], head: ResponseBuilder) -> None:
        self.head = head
        self._post, self._answers = post, answers
        self._queues = [post.queue(answer) for answer in answers]
        self._start_time = time.perf_counter()

    def submit(self) -> None:
        """Submits the answers to the scheduler; raises APIError if the queue is full."""
        try:
            self._post.scheduler.submit(self._answers)
        except QueueFull as error:
            self.close('429')
            raise _queue_full(error) from None

    async def pieces(self, number: int) -> AsyncIterator[tuple[str, str | None]]:
        """Yields text and finish reason of one answer as they arrive; raises APIError if the model failed."""
        choice, queue = self.head.choices[number], self._queues[number]
        while choice.finish is None:
            piece = await queue.get()
            text = piece.text
            while not queue.empty():  # a slow client receives all text since its last read at once
                piece = queue.get_nowait()
                text += piece.text
            if piece.finish == 'error':
                raise APIError(503 if self._post.scheduler.broken else 500, piece.error, code='model_error')
            choice.text += text
            choice.num_tokens, choice.finish = piece.num_tokens, piece.finish
            yield text, piece.finish

    async def whole(self, http: HTTPRequest) -> Response:
        """The complete response; cancelled when the client disconnects."""

        async def collect() -> None:
            """Receives all pieces."""
            for number in range(len(self._answers)):
                async for _ in self.pieces(number):
                    pass

        async def disconnect() -> None:
            """Returns when the client has disconnected."""
            while (await http.receive())['type'] != 'http.disconnect':
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(disconnect())]
        status = 'cancelled'
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                return Response(status_code=499)  # not received by the client
            status = '500'
            tasks[0].result()
            status = '200'
            return json_response(self.head.whole())
        finally:
            for task in tasks:
                task.cancel()
            self.close(status)

    async def stream(self) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        for chunk in self.head.first_chunks():
            yield event(chunk)
        for number in range(len(self._answers)):
            write = Pieces(self.head, number)
            try:
                async for text, finish in self.pieces(number):
                    yield write(text, finish)
            except APIError as error:  # the status 200 has already been sent
                yield event(error.body())
                return
        for chunk in self.head.last_chunks():
            yield event(chunk)
        yield DONE

    def close(self, status: str | None = None) -> None:
        """Cancels unfinished answers and logs the request in one line."""
        for answer in self._answers:
            self._post.forget(answer)
        head = self.head
        if status is None:
            status = '200' if all(choice.finish for choice in head.choices) else 'cancelled'
        logger.info(
            '%s %s · %s · %d prompt tokens, %d generated · %.2f s',
            'chat' if head.chat else 'completion', status, head.model, head.num_prompt_tokens,
            sum(answer.num_tokens for answer in self._answers),
            time.perf_counter() - self._start_time,
        )  # fmt: skip


class Stream(StreamingResponse):
    """A stream that always closes its answers: complete, client disconnected, or never started."""

    def __init__(self, exchange: RequestHandler) -> None:
        super().__init__(exchange.stream(), media_type='text/event-stream', headers={'Cache-Control': 'no-store'})
        self._exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def _queue_full(error: QueueFull) -> APIError:
    return APIError(429, str(error), code='rate_limit_exceeded', headers={'Retry-After': '1'})
