"""One request's answers on their way to the client, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from xtuner.inference.answer import Answer, Events, Piece
from xtuner.inference.scheduler import QueueFull, Scheduler
from xtuner.serve.problems import APIError
from xtuner.serve.responses import DONE, Pieces, ResponseBuilder, event, json_response

logger = logging.getLogger('xtuner')


class ResponseRouter:
    """Brings what the decoding thread draws to whoever waits for it in the event loop."""

    def __init__(self) -> None:
        self.batcher: Scheduler
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[Answer, asyncio.Queue[Piece]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def open(self) -> None:
        """From now on pieces go to the running loop."""
        self._loop = asyncio.get_running_loop()

    def check_room(self, num_answers: int) -> None:
        """Raises Problem where so many answers would not fit into the queue, or none will ever be drawn."""
        if not self.batcher.is_alive:
            raise APIError(503, 'the decoding thread has ended; the service must be restarted', code='model_error')
        try:
            self.batcher.check_room(num_answers)
        except QueueFull as error:
            raise _full(error) from None

    def queue(self, answer: Answer) -> asyncio.Queue[Piece]:
        """Where the pieces of an answer come from now on."""
        self._queues[answer] = asyncio.Queue()
        return self._queues[answer]

    def forget(self, answer: Answer) -> None:
        """Ends an answer, finished or not."""
        self._queues.pop(answer, None)
        self.batcher.cancel(answer)

    def deliver_from_thread(self, events: Events) -> None:
        """Called by the batcher."""
        if events and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Events) -> None:
        for answer, piece in events:
            if answer in self._queues:
                self._queues[answer].put_nowait(piece)


class RequestHandler:
    """One request's answers."""

    def __init__(self, post: ResponseRouter, answers: Sequence[Answer], head: ResponseBuilder) -> None:
        self.head = head
        self._post, self._answers = post, answers
        self._queues = [post.queue(answer) for answer in answers]
        self._began = time.perf_counter()

    def submit(self) -> None:
        """Queues the answers; raises Problem where the queue is full."""
        try:
            self._post.batcher.submit(self._answers)
        except QueueFull as error:
            self.close('429')
            raise _full(error) from None

    async def pieces(self, number: int) -> AsyncIterator[tuple[str, str | None]]:
        """Text and end of one answer, as they come; raises Problem where the model failed."""
        choice, queue = self.head.choices[number], self._queues[number]
        while choice.finish is None:
            piece = await queue.get()
            text = piece.text
            while not queue.empty():  # a slow client gets in one piece what came meanwhile
                piece = queue.get_nowait()
                text += piece.text
            if piece.finish == 'error':
                raise APIError(503 if self._post.batcher.broken else 500, piece.error, code='model_error')
            choice.text += text
            choice.num_tokens, choice.finish = piece.num_tokens, piece.finish
            yield text, piece.finish

    async def whole(self, http: HTTPRequest) -> Response:
        """The response in one piece; given up when the client goes."""

        async def collect() -> None:
            """Takes all pieces in."""
            for number in range(len(self._answers)):
                async for _ in self.pieces(number):
                    pass

        async def disconnect() -> None:
            """Returns when the client has gone."""
            while (await http.receive())['type'] != 'http.disconnect':
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(disconnect())]
        status = 'cancelled'
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                return Response(status_code=499)  # nobody reads it
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
            except APIError as problem:  # the status has gone out as 200 long ago
                yield event(problem.body())
                return
        for chunk in self.head.last_chunks():
            yield event(chunk)
        yield DONE

    def close(self, status: str | None = None) -> None:
        """Ends what is unfinished; says in one line of the log how it went."""
        for answer in self._answers:
            self._post.forget(answer)
        head = self.head
        if status is None:
            status = '200' if all(choice.finish for choice in head.choices) else 'cancelled'
        logger.info(
            '%s %s · %s · %d tokens read, %d drawn · %.2f s', 'chat' if head.chat else 'completion', status, head.model,
            head.num_prompt_tokens, sum(answer.num_tokens for answer in self._answers),
            time.perf_counter() - self._began,
        )  # fmt: skip


class Stream(StreamingResponse):
    """A stream that ends its answers however it ends itself: read out, left by the client, or never begun."""

    def __init__(self, exchange: RequestHandler) -> None:
        super().__init__(exchange.stream(), media_type='text/event-stream', headers={'Cache-Control': 'no-store'})
        self._exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def _full(error: QueueFull) -> APIError:
    return APIError(429, str(error), code='rate_limit_exceeded', headers={'Retry-After': '1'})
