"""A conversation under way: its messages, what of them fits, one answer at a time."""

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
    """Keeps the messages of a conversation and asks the model for the next one.

    Args:
        model: A transformers or peft causal language model.
        tokenizer: Its tokenizer.
        template: The prompt format the model was tuned with.
        system: System message; '' for none. May be changed between answers.
        sampling: How answers are drawn. May be changed between answers.
        max_length: Tokens of prompt and answer together that the model can hold.

    Attributes:
        history: The messages so far, without the system message.
        num_dropped_turns: How many of the oldest turns were left out so far to make room.
        room: Tokens that the last answer had room for: fewer than asked for where its prompt is long.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: Template, *, system: str = '', sampling: Sampling, max_length: int
    ) -> None:
        self.system, self.sampling = system, sampling
        self.history: list[Message] = []
        self.num_dropped_turns = 0
        self.room = sampling.max_new_tokens
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._max_length = max_length

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        """Answers one message.

        The oldest turns are left out, whole, where prompt and answer would not fit; `num_dropped_turns` counts them.
        An answer that is interrupted, or fails, leaves the conversation as it was; `keep` adds what there was of it.

        Args:
            text: What the user says.
            on_text: Called with each piece of the answer as it comes; whatever it raises ends the answer.

        Returns:
            The whole answer, without its stop token.

        Raises:
            DataError: the message alone is too long for the model.
            ModelError: memory ran out.
        """
        messages, prompt_ids = self._fit([*self.history, Message('user', text)])
        answer = self._say(prompt_ids, on_text)
        self.history = [*messages, Message('assistant', answer)]
        return answer

    def keep(self, text: str, answer: str) -> None:
        """Adds a turn whose answer was stopped."""
        self.history = [*self.history, Message('user', text), Message('assistant', answer)]

    def undo(self) -> str | None:
        """Takes the last turn back; returns what the user had said, None where there was no turn."""
        starts = _turns(self.history)
        if not starts:
            return None
        text = self.history[starts[-1]].content
        self.history = self.history[: starts[-1]]
        return text

    def clear(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.history = []

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as one line of JSON in the OpenAI form, which `xtuner train` reads.

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
        """What of the messages fits, and its ids."""
        prompt_ids = self._encode(messages)
        dropped = 0
        while len(prompt_ids) + self.sampling.max_new_tokens > self._max_length and len(_turns(messages)) > 1:
            messages = messages[_turns(messages)[1] :]
            dropped += 1
            prompt_ids = self._encode(messages)
        room = self._max_length - len(prompt_ids)
        if room < 1:
            raise DataError(
                f'this message makes a prompt of {len(prompt_ids)} tokens, the model holds {self._max_length} with the '
                'answer; shorten it, or the system message'
            )
        self.num_dropped_turns += dropped
        self.room = min(room, self.sampling.max_new_tokens)
        return messages, prompt_ids

    def _say(self, prompt_ids: list[int], on_text: Callable[[str], None]) -> str:
        stop_ids = self._template.stop_ids(self._tokenizer)
        stream = TextStream(self._tokenizer, on_text, stop_ids)
        sampling = replace(self.sampling, max_new_tokens=self.room)
        dtype, device = self._model.dtype, self._model.device
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                generate(self._model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=stream)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(f'{device.type} memory ran out during this answer; ask for a shorter one '
                             '(--max-new-tokens), or begin a new conversation') from None  # fmt: skip
        return strip_partial_character(self._tokenizer.decode(stream.ids, clean_up_tokenization_spaces=False))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [Message('system', self.system), *messages] if self.system else messages

    def _encode(self, messages: list[Message]) -> list[int]:
        return encode_prompt(self._with_system(messages), self._tokenizer, self._template)


def _turns(messages: list[Message]) -> list[int]:
    """Where turns begin: with what the user says."""
    return [index for index, message in enumerate(messages) if message.role == 'user']
