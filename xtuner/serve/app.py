"""The HTTP service: from a request to answers and back, in OpenAI's form.

What is asked and answered is never logged; a line of the log names the way, the status, the model and counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from xtuner.errors import DataError
from xtuner.model.generate import Sampling
from xtuner.serve.batcher import Answer, Batcher, Decoder, Events, Piece, QueueFull
from xtuner.serve.models import Loaded, ServedModel
from xtuner.serve.problems import Problem, wrong
from xtuner.serve.protocol import Request, chat_request, completion_request, parse_body
from xtuner.serve.responses import DONE, Choice, Head, event, to_json
from xtuner.serve.text import AnswerText

logger = logging.getLogger('xtuner')

_LOOPBACK = ('localhost', '127.0.0.1', '[::1]')


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        max_length: Tokens of prompt and answer together.
        body_bytes: Size of a request.
        body_s: Seconds in which it must have come.
        waiting: Answers that may wait for a row.
    """

    max_length: int
    body_bytes: int = 2**20
    body_s: float = 30.0
    waiting: int = 64


class Service:
    """The service's routes over one model.

    Args:
        loaded: The model and its names.
        decoder: Runs it.
        limits: What a client may take.
        sampling: What holds where a request says nothing; its seed makes all answers repeatable, in order of arrival.
        api_key: What clients must show; '' for nothing.
        only_loopback: Refuse requests that name another host than this machine, as a page of a web site would that
            makes its reader's browser call here.
    """

    def __init__(
        self,
        loaded: Loaded,
        decoder: Decoder,
        *,
        limits: Limits,
        sampling: Sampling,
        api_key: str = '',
        only_loopback: bool = False,
    ) -> None:
        self._limits, self._sampling, self._only_loopback = limits, sampling, only_loopback
        self._models = {model.name: model for model in loaded.served}
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self._seeds = Random(sampling.seed)
        self._started = int(time.time())
        self._queues: dict[Answer, asyncio.Queue[Piece]] = {}
        self._encoding = asyncio.Lock()  # tokenizers are not made for several threads
        self.batcher = Batcher(
            decoder,
            adapters=[model.adapter for model in loaded.served],
            use=loaded.use,
            deliver=self._deliver_from_thread,
            most_waiting=limits.waiting,
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def app(self) -> Starlette:
        """The ASGI application; the decoding thread lives as long as it is served."""
        routes = [
            Route('/v1/chat/completions', self._guarded(self._chat), methods=['POST']),
            Route('/v1/completions', self._guarded(self._complete), methods=['POST']),
            Route('/v1/models', self._guarded(self._list_models), methods=['GET']),
            Route('/v1/models/{name:path}', self._guarded(self._show_model), methods=['GET']),
            Route('/health', self._health, methods=['GET']),
        ]
        handlers: dict[Any, Any] = {
            Problem: _problem, HTTPException: _http_problem, ClientDisconnect: _gone, Exception: _bug
        }  # fmt: skip
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.batcher.stop)

    # Answers

    async def _chat(self, http: HTTPRequest) -> Response:
        request = chat_request(parse_body(await self._body(http)), self._sampling)
        return await self._respond(http, request, chat=True)

    async def _complete(self, http: HTTPRequest) -> Response:
        request = completion_request(parse_body(await self._body(http)), self._sampling)
        return await self._respond(http, request, chat=False)

    async def _respond(self, http: HTTPRequest, request: Request, *, chat: bool) -> Response:
        model = self._model(request.model)
        async with self._encoding:
            prompts = await asyncio.to_thread(self._encode, model, request, chat)
        answers = [self._answer(model, ids, request) for ids in prompts]
        kind = 'chatcmpl' if chat else 'cmpl'
        head = Head(
            chat, f'{kind}-{uuid.uuid4().hex}', int(time.time()), model.name, sum(map(len, prompts)),
            request.include_usage, [Choice() for _ in answers],
        )  # fmt: skip
        exchange = _Exchange(self, answers, head)
        exchange.submit()
        if request.stream:
            return _Stream(exchange)
        return await exchange.whole(http)

    def _answer(self, model: ServedModel, ids: Sequence[int], request: Request) -> Answer:
        room = self._limits.max_length - len(ids)
        wanted = request.max_tokens or min(self._sampling.max_new_tokens, room)
        if room < 1 or wanted > room:
            asked = f' and {wanted} of the answer' if request.max_tokens else ''
            raise wrong(
                'messages', f"This model's maximum context length is {self._limits.max_length} tokens; the prompt has "
                f'{len(ids)}{asked}. Shorten the prompt or `max_tokens`.', 'context_length_exceeded',
            )  # fmt: skip
        sampling = replace(request.sampling, max_new_tokens=wanted)
        text = AnswerText(model.tokenizer, request.stop)
        return Answer(model.adapter, ids, sampling, model.stop_ids, text, seed=self._seeds.getrandbits(64))

    def _encode(self, model: ServedModel, request: Request, chat: bool) -> list[list[int]]:
        try:
            if chat:
                return [model.encode_chat(request.prompts[0])]
            return [self._ids(model, one) if isinstance(one, list) else model.encode_text(one)
                    for one in request.prompts]  # fmt: skip
        except DataError as error:
            raise wrong('messages' if chat else 'prompt', str(error)) from None

    def _ids(self, model: ServedModel, ids: list[int]) -> list[int]:
        most = len(model.tokenizer)
        if not all(0 <= id_ < most for id_ in ids):
            raise wrong('prompt', f'`prompt` holds a token id that is none of 0 to {most - 1}')
        return ids

    def queue(self, answer: Answer) -> asyncio.Queue[Piece]:
        """Where the pieces of an answer come from now on."""
        self._queues[answer] = asyncio.Queue()
        return self._queues[answer]

    def forget(self, answer: Answer) -> None:
        """Ends an answer, finished or not."""
        self._queues.pop(answer, None)
        self.batcher.cancel(answer)

    def _deliver_from_thread(self, events: Events) -> None:
        if events and self._loop is not None:
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Events) -> None:
        for answer, piece in events:
            if answer in self._queues:
                self._queues[answer].put_nowait(piece)

    # Everything else

    async def _list_models(self, _: HTTPRequest) -> Response:
        return _json({'object': 'list', 'data': [self._card(name) for name in self._models]})

    async def _show_model(self, http: HTTPRequest) -> Response:
        return _json(self._card(self._model(http.path_params['name']).name))

    async def _health(self, _: HTTPRequest) -> Response:
        failing = self.batcher.failures > 0
        content = {
            'status': 'failing' if failing else 'ok',
            'running': self.batcher.num_running,
            'waiting': self.batcher.num_waiting,
        }
        return _json(content, 503 if failing else 200)

    def _card(self, name: str) -> dict[str, Any]:
        return {'id': name, 'object': 'model', 'created': self._started, 'owned_by': 'xtuner'}

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ', '.join(self._models)
            raise Problem(404, f'The model {name[:64]!r} does not exist; this service has {known}', param='model',
                          code='model_not_found')  # fmt: skip
        return self._models[name]

    async def _body(self, http: HTTPRequest) -> bytes:
        kind = http.headers.get('content-type', '').split(';')[0].strip().lower()
        if kind != 'application/json':  # a form of a web page could send any other without asking
            raise Problem(415, 'the header `Content-Type` must be application/json')
        most = self._limits.body_bytes
        too_long = Problem(413, f'the request is longer than {most} bytes', code='request_too_large')
        if (announced := http.headers.get('content-length', '')).isdigit() and int(announced) > most:
            raise too_long
        body = bytearray()

        async def read() -> None:
            async for part in http.stream():
                body.extend(part)
                if len(body) > most:
                    raise too_long

        try:
            await asyncio.wait_for(read(), self._limits.body_s)
        except asyncio.TimeoutError:
            raise Problem(408, f'the request had not come whole after {self._limits.body_s:g} s',
                          headers={'Connection': 'close'}) from None  # fmt: skip
        return bytes(body)

    def _guarded(self, handler: Callable[[HTTPRequest], Awaitable[Response]]) -> Callable[[HTTPRequest], Any]:
        async def guarded(http: HTTPRequest) -> Response:
            self._check_host(http)
            self._check_key(http)
            return await handler(http)

        return guarded

    def _check_host(self, http: HTTPRequest) -> None:
        host = http.headers.get('host', '')
        name = host if host.endswith(']') else host.rpartition(':')[0] or host
        if self._only_loopback and name.lower() not in _LOOPBACK:
            raise Problem(403, 'without an API key, this service is called as localhost or 127.0.0.1 only')

    def _check_key(self, http: HTTPRequest) -> None:
        if self._key is None:
            return
        scheme, _, key = http.headers.get('authorization', '').partition(' ')
        shown = hashlib.sha256(key.strip().encode('latin-1')).digest()
        if not hmac.compare_digest(shown, self._key) or scheme.lower() != 'bearer':
            raise Problem(401, 'the API key is missing or wrong; send it as `Authorization: Bearer KEY`',
                          code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'})  # fmt: skip


class _Exchange:
    """One request's answers on their way to the client."""

    def __init__(self, service: Service, answers: Sequence[Answer], head: Head) -> None:
        self.head = head
        self._service, self._answers = service, answers
        self._queues = [service.queue(answer) for answer in answers]
        self._began = time.perf_counter()

    def submit(self) -> None:
        """Queues the answers; raises Problem where the queue is full."""
        try:
            self._service.batcher.submit(self._answers)
        except QueueFull as error:
            self.close('429')
            raise Problem(429, str(error), code='rate_limit_exceeded', headers={'Retry-After': '1'}) from None

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
                raise Problem(500, 'the model failed on this answer; try again', code='model_error')
            choice.text += text
            choice.num_tokens, choice.finish = piece.num_tokens, piece.finish
            yield text, piece.finish

    async def whole(self, http: HTTPRequest) -> Response:
        """The response in one piece; given up when the client goes."""

        async def collect() -> None:
            for number in range(len(self._answers)):
                async for _ in self.pieces(number):
                    pass

        async def disconnect() -> None:
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
            return _json(self.head.whole())
        finally:
            for task in tasks:
                task.cancel()
            self.close(status)

    async def stream(self) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        for chunk in self.head.first_chunks():
            yield event(chunk)
        for number in range(len(self._answers)):
            try:
                async for text, finish in self.pieces(number):
                    yield b''.join(map(event, self.head.chunk(number, text, finish)))
            except Problem as problem:  # the status has gone out as 200 long ago
                yield event(problem.body())
                return
        for chunk in self.head.last_chunks():
            yield event(chunk)
        yield DONE

    def close(self, status: str | None = None) -> None:
        """Ends what is unfinished; says in one line of the log how it went."""
        for answer in self._answers:
            self._service.forget(answer)
        head = self.head
        if status is None:
            status = '200' if all(choice.finish for choice in head.choices) else 'cancelled'
        logger.info(
            '%s %s · %s · %d tokens read, %d drawn · %.2f s', 'chat' if head.chat else 'completion', status, head.model,
            head.num_prompt_tokens, sum(answer.num_tokens for answer in self._answers),
            time.perf_counter() - self._began,
        )  # fmt: skip


class _Stream(StreamingResponse):
    """A stream that ends its answers however it ends itself: read out, left by the client, or never begun."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__(exchange.stream(), media_type='text/event-stream', headers={'Cache-Control': 'no-store'})
        self._exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, media_type='application/json')


async def _problem(_: HTTPRequest, problem: Problem) -> Response:
    return _json(problem.body(), problem.status, problem.headers)


async def _http_problem(http: HTTPRequest, error: HTTPException) -> Response:
    what = {404: f'there is nothing at {http.url.path[:64]!r}', 405: f'{http.method} is not a method of this address'}
    message = what.get(error.status_code, str(error.detail))
    return _json(Problem(error.status_code, message).body(), error.status_code, dict(error.headers or {}))


async def _gone(_: HTTPRequest, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(http: HTTPRequest, error: Exception) -> Response:
    frame = traceback.extract_tb(error.__traceback__)[-1]  # the place alone: a message might hold what was asked
    logger.error('%s: unexpected %s at %s:%d', http.url.path, type(error).__name__, frame.filename, frame.lineno)
    return _json(Problem(500, 'an error of the service itself').body(), 500)
