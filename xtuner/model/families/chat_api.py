"""`chat` and `stream_chat`, with the interface shown on InternLM's model cards."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from transformers.generation.streamers import BaseStreamer

from xtuner.dataset.conversation import Message
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.templates.builtin import Template, get_template
from xtuner.inference.detokenizer import REPLACEMENT_CHARACTER, strip_partial_character
from xtuner.inference.generate import Sampling, generate

Turns = Sequence[tuple[str, str]]


class ChatMixin:
    """Adds the chat interface of the model card to a causal language model."""

    chat_template_name: str

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: Turns = (),
        streamer: Any = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = '',
        *,
        template: str | Template | None = None,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answers one query.

        Args:
            tokenizer: The model's tokenizer.
            query: The user's message.
            history: Earlier turns, each a query and its answer.
            streamer: A transformers streamer that receives the ids as they are generated.
            max_new_tokens: Maximum tokens of the answer.
            do_sample: False decodes greedily.
            temperature: Sampling temperature.
            top_p: Samples from the smallest set of tokens with this share of the probability.
            meta_instruction: System text; '' for none.
            template: Prompt template; None uses the one that the family is trained with.

        Returns:
            The answer and the history with this turn added.
        """
        sampling = Sampling(max_new_tokens, temperature if do_sample else 0, top_p)
        prompt_template = get_template(template or self.chat_template_name, tokenizer)
        prompt = chat_prompt(tokenizer, query, history, meta_instruction, prompt_template)
        stop_ids = prompt_template.stop_ids(tokenizer)
        ids = generate(self, prompt, stop_ids=stop_ids, sampling=sampling, streamer=streamer)
        response = strip_partial_character(tokenizer.decode(_until(ids, stop_ids), skip_special_tokens=True))
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Turns = (),
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = '',
        *,
        template: str | Template | None = None,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Same as `chat`, but yields the answer so far, and the history with it, whenever it grows.

        Closing the iterator stops the generation at its next token.
        """
        sampling = Sampling(max_new_tokens, temperature if do_sample else 0, top_p)
        prompt_template = get_template(template or self.chat_template_name, tokenizer)
        prompt = chat_prompt(tokenizer, query, history, meta_instruction, prompt_template)
        # Closed explicitly, since not every Python closes an inner generator together with the outer one.
        with closing(_stream(self, tokenizer, prompt, prompt_template.stop_ids(tokenizer), sampling)) as responses:
            for response in responses:
                yield response, [*history, (query, response)]


def chat_prompt(
    tokenizer: Any, query: str, history: Turns = (), meta_instruction: str = '', template: Template | None = None
) -> list[int]:
    """Encodes a prompt up to the start of the answer.

    Args:
        tokenizer: The model's tokenizer.
        query: The user's message.
        history: Earlier turns, each a query and its answer.
        meta_instruction: System text; '' for none.
        template: Prompt template; None uses the tokenizer's own.
    """
    messages = [Message('system', meta_instruction)] if meta_instruction else []
    for asked, answered in history:
        messages += [Message('user', asked), Message('assistant', answered)]
    messages.append(Message('user', query))
    return encode_prompt(messages, tokenizer, template or get_template('from_tokenizer', tokenizer))


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


class _Closed(Exception):
    """The reader closed the stream."""


class _Responses(BaseStreamer):
    """Decodes the answer so far at each new token and enqueues it, unless it ends within a character."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], out: queue.Queue) -> None:
        self.closed = threading.Event()
        self._tokenizer, self._stop_ids, self._out = tokenizer, stop_ids, out
        self._ids: list[int] | None = None

    def put(self, value: Any) -> None:
        """Receives the prompt once, then ids as they are generated."""
        if self.closed.is_set():
            raise _Closed
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.reshape(-1).tolist()
        text = self._text()
        if not text.endswith(REPLACEMENT_CHARACTER):
            self._out.put(text)

    def end(self) -> None:
        """Enqueues the complete answer."""
        self._out.put(strip_partial_character(self._text()))

    def _text(self) -> str:
        return self._tokenizer.decode(_until(self._ids or [], self._stop_ids), skip_special_tokens=True)


def _stream(
    model: Any, tokenizer: Any, prompt: list[int], stop_ids: list[int], sampling: Sampling
) -> Generator[str, None, None]:
    """Generates in a thread; yields the answer so far whenever it changes; re-raises the thread's exception.

    An empty answer is yielded once, so that there is always a last response.
    """
    out: queue.Queue[str | BaseException | None] = queue.Queue()
    streamer: Any = _Responses(tokenizer, stop_ids, out)

    def run() -> None:
        """Generates, and ends the queue with None or with the exception."""
        try:
            generate(model, prompt, stop_ids=stop_ids, sampling=sampling, streamer=streamer)
            out.put(None)
        except _Closed:
            pass
        except BaseException as error:
            out.put(error)

    thread = threading.Thread(target=run, name='stream_chat', daemon=True)
    thread.start()
    last = None
    try:
        while (text := out.get()) is not None:
            if isinstance(text, BaseException):
                raise text
            if text != last:
                last = text
                yield text
    finally:
        streamer.closed.set()
        thread.join()
