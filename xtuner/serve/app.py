"""The HTTP service: from a request to answers and back, in OpenAI's form.

What is asked and answered is never logged; a line of the log names the way, the status, the model and counts.
"""

from __future__ import annotations

import asyncio
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
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from xtuner.dataset.templates.rendering import TemplateBusyError
from xtuner.errors import XTunerError
from xtuner.inference.answer import Answer
from xtuner.inference.decoder_interface import Decoder
from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.inference.generate import Sampling
from xtuner.inference.scheduler import Scheduler
from xtuner.serve.encoding import Encoding
from xtuner.serve.exchange import RequestHandler, ResponseRouter, Stream
from xtuner.serve.guard import CheckFraming, Guard, Refusal, read_body
from xtuner.serve.models import Loaded, ServedModel
from xtuner.serve.problems import APIError, wrong
from xtuner.serve.protocol import Request, chat_request, completion_request, parse_body
from xtuner.serve.responses import Choice, ResponseBuilder, json_response, to_json

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        max_length: Tokens of prompt and answer together.
        body_bytes: Size of a request.
        body_s: Seconds in which it must have come.
        streams: Answers drawn at a time, each in a row of the store.
        waiting: Answers that may wait for a row.
    """

    max_length: int
    body_bytes: int = 2**20
    body_s: float = 30.0
    streams: int = 16
    waiting: int = 64


class Service:
    """The service's routes over one model.

    Args:
        loaded: The model and its names.
        decoder: Runs it.
        limits: What a client may take.
        sampling: What holds where a request says nothing; its seed makes all answers repeatable, in order of arrival.
        guard: Which requests pass.
    """

    def __init__(self, loaded: Loaded, decoder: Decoder, *, limits: Limits, sampling: Sampling, guard: Guard) -> None:
        self._limits, self._sampling, self._guard = limits, sampling, guard
        self._models = {model.name: model for model in loaded.served}
        self._seeds = Random(sampling.seed)
        self._started = int(time.time())
        self.post = ResponseRouter()
        self._encoding = Encoding()
        self.batcher = Scheduler(
            decoder,
            adapters=[model.adapter for model in loaded.served],
            use=loaded.use,
            deliver=self.post.deliver_from_thread,
            most_waiting=limits.waiting,
        )
        self.post.batcher = self.batcher

    def app(self) -> Starlette:
        """The ASGI application; the decoding thread lives as long as it is served."""
        ways: list[tuple[str, Callable[[HTTPRequest], Any], list[str]]] = [
            ('/v1/chat/completions', self._guarded(self._chat), ['POST']),
            ('/v1/completions', self._guarded(self._complete), ['POST']),
            ('/v1/models', self._guarded(self._list_models), ['GET']),
            ('/health', self._health, ['GET', 'OPTIONS']),  # OPTIONS: HAProxy's check unless told otherwise
        ]
        # With a slash at the end too: Starlette would redirect, to an address that is wrong behind a proxy with TLS.
        routes = [Route(path + end, handler, methods=methods) for path, handler, methods in ways for end in ('', '/')]
        routes.append(Route('/v1/models/{name:path}', self._guarded(self._show_model), methods=['GET']))
        handlers: dict[Any, Any] = {
            APIError: _problem, HTTPException: _http_problem, ClientDisconnect: _gone, Exception: _bug
        }  # fmt: skip
        app = Starlette(
            routes=routes, middleware=[Middleware(CheckFraming)], exception_handlers=handlers, lifespan=self._lifespan
        )
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.post.open()
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
        self.post.check_room(len(request.prompts))
        prompts = await self._encoding.run(lambda: self._encode(model, request, chat))
        answers = [self._answer(model, ids, request) for ids in prompts]
        kind = 'chatcmpl' if chat else 'cmpl'
        head = ResponseBuilder(
            chat, f'{kind}-{uuid.uuid4().hex}', int(time.time()), model.name, sum(map(len, prompts)),
            request.include_usage, [Choice() for _ in answers],
        )  # fmt: skip
        exchange = RequestHandler(self.post, answers, head)
        exchange.submit()
        if request.stream:
            return Stream(exchange)
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
        text = IncrementalDetokenizer(model.tokenizer, request.stop)
        return Answer(model.adapter, ids, sampling, model.stop_ids, text, seed=self._seeds.getrandbits(64))

    def _encode(self, model: ServedModel, request: Request, chat: bool) -> list[list[int]]:
        try:
            if chat:
                pieces = model.render_chat(request.prompts[0])  # may take long: others render meanwhile
                with self._encoding.tokenizing:
                    return [model.encode_chat(pieces)]
            with self._encoding.tokenizing:
                return [self._ids(model, one) if isinstance(one, list) else model.encode_text(one)
                        for one in request.prompts]  # fmt: skip
        except TemplateBusyError as error:
            raise APIError(503, str(error), code='overloaded', headers={'Retry-After': '5'}) from None
        except XTunerError as error:  # a wrong message, or a rendering of the chat template over its bounds
            raise wrong('messages' if chat else 'prompt', str(error)) from None

    def _ids(self, model: ServedModel, ids: list[int]) -> list[int]:
        most = len(model.tokenizer)
        if not all(0 <= id_ < most for id_ in ids):
            raise wrong('prompt', f'`prompt` holds a token id that is none of 0 to {most - 1}')
        return ids

    # Everything else

    async def _list_models(self, _: HTTPRequest) -> Response:
        return json_response({'object': 'list', 'data': [self._card(name) for name in self._models]})

    async def _show_model(self, http: HTTPRequest) -> Response:
        return json_response(self._card(self._model(http.path_params['name']).name))

    async def _health(self, _: HTTPRequest) -> Response:
        trouble = self.batcher.trouble or self._encoding.trouble
        content = {
            'status': 'failing' if trouble else 'ok',
            'running': self.batcher.num_running,
            'waiting': self.batcher.num_waiting,
        }
        return json_response(content | {'error': trouble} if trouble else content, 503 if trouble else 200)

    def _card(self, name: str) -> dict[str, Any]:
        return {'id': name, 'object': 'model', 'created': self._started, 'owned_by': 'xtuner'}

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ', '.join(self._models)
            raise APIError(404, f'The model {name[:64]!r} does not exist; this service has {known}', param='model',
                          code='model_not_found')  # fmt: skip
        return self._models[name]

    async def _body(self, http: HTTPRequest) -> bytes:
        return await read_body(http, most=self._limits.body_bytes, seconds=self._limits.body_s)

    def _guarded(self, handler: Callable[[HTTPRequest], Awaitable[Response]]) -> Callable[[HTTPRequest], Any]:
        async def guarded(http: HTTPRequest) -> Response:
            """Asks who comes, then answers."""
            self._guard.check(http)
            return await handler(http)

        return guarded


async def _problem(_: HTTPRequest, problem: APIError) -> Response:
    if problem.unread:
        return Refusal(to_json(problem.body()), problem.status, problem.headers, media_type='application/json')
    return json_response(problem.body(), problem.status, problem.headers)


async def _http_problem(http: HTTPRequest, error: HTTPException) -> Response:
    what = {404: f'there is nothing at {http.url.path[:64]!r}', 405: f'{http.method} is not a method of this address'}
    message = what.get(error.status_code, str(error.detail))
    return json_response(APIError(error.status_code, message).body(), error.status_code, dict(error.headers or {}))


async def _gone(_: HTTPRequest, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(http: HTTPRequest, error: Exception) -> Response:
    frame = traceback.extract_tb(error.__traceback__)[-1]  # the place alone: a message might hold what was asked
    logger.error('%s: unexpected %s at %s:%d', http.url.path, type(error).__name__, frame.filename, frame.lineno)
    return json_response(APIError(500, 'an error of the service itself').body(), 500)
