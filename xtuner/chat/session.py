"""A chat session: its messages, truncation to the context length, and one answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xtuner.dataset.conversation import Message
from xtuner.dataset.encode.conversation_encoder import encode_prompt
from xtuner.dataset.templates.builtin import Template
from xtuner.errors import DataError, ModelError
from xtuner.inference.detokenizer import TextStream, strip_partial_character
from xtuner.inference.generate import Sampling, generate
from xtuner.utils.jsonl import to_line
from xtuner.utils.out_of_memory import is_out_of_memory


class ChatSession:
    """Keeps the messages of a conversation and generates answers.

    Args:
        model: A transformers or peft causal language model.
        tokenizer: Its tokenizer.
        template: The prompt template the model was trained with.
        system: System message; '' for none. May be changed between answers.
        sampling: Sampling settings. May be changed between answers.
        max_length: The context length: maximum tokens of prompt and answer together.

    Attributes:
        history: The messages so far, without the system message.
        num_dropped_turns: Number of oldest turns dropped so far to fit the context length.
        answer_limit: Maximum tokens of the last answer; fewer than requested if its prompt was long.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: Template, *, system: str = '', sampling: Sampling, max_length: int
    ) -> None:
        self.system, self.sampling = system, sampling
        self.history: list[Message] = []
        self.num_dropped_turns = 0
        self.answer_limit = sampling.max_new_tokens
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._max_length = max_length

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        """Answers one message.

        If prompt and answer exceed the context length, the oldest turns are dropped as a whole and counted in
        `num_dropped_turns`. An answer that is interrupted or fails does not change the conversation; `keep` adds the
        partial answer.

        Args:
            text: The message of the user.
            on_text: Called with each piece of the answer; an exception that it raises stops the answer.

        Returns:
            The complete answer, without its stop token.

        Raises:
            DataError: the message alone exceeds the context length.
            ModelError: out of memory.
        """
        messages, prompt_ids = self._fit([*self.history, Message('user', text)])
        answer = self._generate(prompt_ids, on_text)
        self.history = [*messages, Message('assistant', answer)]
        return answer

    def keep(self, text: str, answer: str) -> None:
        """Adds a turn with a partial answer."""
        self.history = [*self.history, Message('user', text), Message('assistant', answer)]

    def undo(self) -> str | None:
        """Removes the last turn; returns the message of the user, None if there was no turn."""
        starts = _turns(self.history)
        if not starts:
            return None
        text = self.history[starts[-1]].content
        self.history = self.history[: starts[-1]]
        return text

    def clear(self) -> None:
        """Clears the conversation; the system message stays."""
        self.history = []

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as one line of JSON in OpenAI's format, which `xtuner train` reads.

        Raises:
            DataError: there is nothing to save, or the file cannot be written.
        """
        if not self.history:
            raise DataError('there is no conversation to save yet')
        messages = [{'role': message.role, 'content': message.content} for message in self._with_system(self.history)]
        try:
            with path.open('a', encoding='utf-8') as file:
                file.write(to_line({'messages': messages}))
        except OSError as error:
            raise DataError(f'{path} cannot be written: {error.strerror}') from error

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The newest messages that fit, and their ids."""
        prompt_ids = self._encode(messages)
        dropped = 0
        while len(prompt_ids) + self.sampling.max_new_tokens > self._max_length and len(_turns(messages)) > 1:
            messages = messages[_turns(messages)[1] :]
            dropped += 1
            prompt_ids = self._encode(messages)
        available = self._max_length - len(prompt_ids)
        if available < 1:
            raise DataError(
                f'the prompt with this message has {len(prompt_ids)} tokens; the context length is {self._max_length} '
                'including the answer; shorten the message or the system message'
            )
        self.num_dropped_turns += dropped
        self.answer_limit = min(available, self.sampling.max_new_tokens)
        return messages, prompt_ids

    def _generate(self, prompt_ids: list[int], on_text: Callable[[str], None]) -> str:
        stop_ids = self._template.stop_ids(self._tokenizer)
        stream = TextStream(self._tokenizer, on_text, stop_ids)
        sampling = replace(self.sampling, max_new_tokens=self.answer_limit)
        dtype, device = self._model.dtype, self._model.device
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                generate(self._model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=stream)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(f'out of {device.type} memory during this answer; limit its length '
                             '(--max-new-tokens), or start a new conversation') from None  # fmt: skip
        return strip_partial_character(self._tokenizer.decode(stream.ids, clean_up_tokenization_spaces=False))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [Message('system', self.system), *messages] if self.system else messages

    def _encode(self, messages: list[Message]) -> list[int]:
        return encode_prompt(self._with_system(messages), self._tokenizer, self._template)


def _turns(messages: list[Message]) -> list[int]:
    """Indices of the first messages of turns, which are the user's messages."""
    return [index for index, message in enumerate(messages) if message.role == 'user']
