"""The HTTP service: routes of OpenAI's API, from a request to its answers and the response.

Prompts and answers are never logged; a log line contains the endpoint, status, model and counts.
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
from xtuner.inference.decoder_interface import SlotDecoder
from xtuner.inference.detokenizer import IncrementalDetokenizer
from xtuner.inference.generate import Sampling
from xtuner.inference.request import GenerationRequest
from xtuner.inference.scheduler import Scheduler
from xtuner.serve.encoding import Encoding
from xtuner.serve.exchange import RequestHandler, ResponseRouter, Stream
from xtuner.serve.guard import CheckFraming, Guard, Refusal, read_body
from xtuner.serve.models import Loaded, ServedModel
from xtuner.serve.problems import APIError, invalid
from xtuner.serve.protocol import Request, chat_request, completion_request, parse_body
from xtuner.serve.responses import Choice, ResponseBuilder, json_response, to_json

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class Limits:
    """Limits per request and in total.

    Attributes:
        max_length: Maximum tokens of prompt and answer together.
        body_bytes: Maximum size of a request body.
        body_s: Seconds within which the body must arrive.
        streams: Answers generated concurrently, each in a slot of the KV cache.
        waiting: Maximum number of queued answers.
    """

    max_length: int
    body_bytes: int = 2**20
    body_s: float = 30.0
    streams: int = 16
    waiting: int = 64


class Service:
    """The routes of the service for one base model and its adapters.

    Args:
        loaded: The model and the names under which it is served.
        decoder: Runs the model.
        limits: Limits of requests.
        sampling: Default sampling settings; with a seed, answers are reproducible in order of arrival.
        guard: Checks host names and API keys.
    """

    def __init__(
        self, loaded: Loaded, decoder: SlotDecoder, *, limits: Limits, sampling: Sampling, guard: Guard
    ) -> None:
        self._limits, self._sampling, self._guard = limits, sampling, guard
        self._models = {model.name: model for model in loaded.served}
        self._seeds = Random(sampling.seed)
        self._started = int(time.time())
        self.post = ResponseRouter()
        self._encoding = Encoding()
        self.scheduler = Scheduler(
            decoder,
            adapters=[model.adapter for model in loaded.served],
            use=loaded.use,
            deliver=self.post.deliver_from_thread,
            max_waiting=limits.waiting,
        )
        self.post.scheduler = self.scheduler

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and stops the decoding thread."""
        endpoints: list[tuple[str, Callable[[HTTPRequest], Any], list[str]]] = [
            ('/v1/chat/completions', self._guarded(self._chat), ['POST']),
            ('/v1/completions', self._guarded(self._complete), ['POST']),
            ('/v1/models', self._guarded(self._list_models), ['GET']),
            ('/health', self._health, ['GET', 'OPTIONS']),  # OPTIONS: the default health check of HAProxy
        ]
        # Also with a trailing slash: Starlette would redirect to a URL that is wrong behind a TLS proxy.
        routes = [
            Route(path + end, handler, methods=methods) for path, handler, methods in endpoints for end in ('', '/')
        ]
        routes.append(Route('/v1/models/{name:path}', self._guarded(self._show_model), methods=['GET']))
        handlers: dict[Any, Any] = {
            APIError: _api_error, HTTPException: _http_error, ClientDisconnect: _disconnected, Exception: _unexpected
        }  # fmt: skip
        app = Starlette(
            routes=routes, middleware=[Middleware(CheckFraming)], exception_handlers=handlers, lifespan=self._lifespan
        )
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.post.open()
        self.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.scheduler.stop)

    # Answers

    async def _chat(self, http: HTTPRequest) -> Response:
        request = chat_request(parse_body(await self._body(http)), self._sampling)
        return await self._respond(http, request, chat=True)

    async def _complete(self, http: HTTPRequest) -> Response:
        request = completion_request(parse_body(await self._body(http)), self._sampling)
        return await self._respond(http, request, chat=False)

    async def _respond(self, http: HTTPRequest, request: Request, *, chat: bool) -> Response:
        model = self._model(request.model)
        self.post.check_capacity(len(request.prompts))
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

    def _answer(self, model: ServedModel, ids: Sequence[int], request: Request) -> GenerationRequest:
        available = self._limits.max_length - len(ids)
        max_new_tokens = request.max_tokens or min(self._sampling.max_new_tokens, available)
        if available < 1 or max_new_tokens > available:
            requested = f' and `max_tokens` is {max_new_tokens}' if request.max_tokens else ''
            raise invalid(
                'messages', f"This model's maximum context length is {self._limits.max_length} tokens; the prompt has "
                f'{len(ids)}{requested}. Shorten the prompt or reduce `max_tokens`.', 'context_length_exceeded',
            )  # fmt: skip
        sampling = replace(request.sampling, max_new_tokens=max_new_tokens)
        text = IncrementalDetokenizer(model.tokenizer, request.stop)
        return GenerationRequest(model.adapter, ids, sampling, model.stop_ids, text, seed=self._seeds.getrandbits(64))

    def _encode(self, model: ServedModel, request: Request, chat: bool) -> list[list[int]]:
        try:
            if chat:
                pieces = model.render_chat(request.prompts[0])  # may be slow; not serialised
                with self._encoding.tokenizing:
                    return [model.encode_chat(pieces)]
            with self._encoding.tokenizing:
                return [self._ids(model, prompt) if isinstance(prompt, list) else model.encode_text(prompt)
                        for prompt in request.prompts]  # fmt: skip
        except TemplateBusyError as error:
            raise APIError(503, str(error), code='overloaded', headers={'Retry-After': '5'}) from None
        except XTunerError as error:  # an invalid message, or a chat template that exceeds its limits
            raise invalid('messages' if chat else 'prompt', str(error)) from None

    def _ids(self, model: ServedModel, ids: list[int]) -> list[int]:
        vocabulary_size = len(model.tokenizer)
        if not all(0 <= id_ < vocabulary_size for id_ in ids):
            raise invalid('prompt', f'`prompt` contains a token id outside 0 to {vocabulary_size - 1}')
        return ids

    # Other endpoints

    async def _list_models(self, _: HTTPRequest) -> Response:
        return json_response({'object': 'list', 'data': [self._card(name) for name in self._models]})

    async def _show_model(self, http: HTTPRequest) -> Response:
        return json_response(self._card(self._model(http.path_params['name']).name))

    async def _health(self, _: HTTPRequest) -> Response:
        failure = self.scheduler.failure or self._encoding.failure
        content = {
            'status': 'failing' if failure else 'ok',
            'running': self.scheduler.num_running,
            'waiting': self.scheduler.num_waiting,
        }
        return json_response(content | {'error': failure} if failure else content, 503 if failure else 200)

    def _card(self, name: str) -> dict[str, Any]:
        return {'id': name, 'object': 'model', 'created': self._started, 'owned_by': 'xtuner'}

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            names = ', '.join(self._models)
            raise APIError(404, f'The model {name[:64]!r} does not exist; this service has {names}', param='model',
                          code='model_not_found')  # fmt: skip
        return self._models[name]

    async def _body(self, http: HTTPRequest) -> bytes:
        return await read_body(http, max_bytes=self._limits.body_bytes, timeout_s=self._limits.body_s)

    def _guarded(self, handler: Callable[[HTTPRequest], Awaitable[Response]]) -> Callable[[HTTPRequest], Any]:
        async def guarded(http: HTTPRequest) -> Response:
            """Checks access, then handles the request."""
            self._guard.check(http)
            return await handler(http)

        return guarded


async def _api_error(_: HTTPRequest, error: APIError) -> Response:
    if error.unread:
        return Refusal(to_json(error.body()), error.status, error.headers, media_type='application/json')
    return json_response(error.body(), error.status, error.headers)


async def _http_error(http: HTTPRequest, error: HTTPException) -> Response:
    messages = {404: f'no endpoint {http.url.path[:64]!r}', 405: f'{http.method} is not allowed for this endpoint'}
    message = messages.get(error.status_code, str(error.detail))
    return json_response(APIError(error.status_code, message).body(), error.status_code, dict(error.headers or {}))


async def _disconnected(_: HTTPRequest, __: Exception) -> Response:
    return Response(status_code=499)  # not received by the client


async def _unexpected(http: HTTPRequest, error: Exception) -> Response:
    frame = traceback.extract_tb(error.__traceback__)[-1]  # only the location: the message may contain the prompt
    logger.error('%s: unexpected %s at %s:%d', http.url.path, type(error).__name__, frame.filename, frame.lineno)
    return json_response(APIError(500, 'internal error of the service').body(), 500)
