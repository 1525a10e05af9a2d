"""A conversation under way: history as token ids, one answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtuner.dataset.conversation import Message
from xtuner.dataset.template import Template
from xtuner.dataset.tokenize import encode_prompt
from xtuner.model.generate import Sampling, TextStream, generate


class ChatSession:
    """Keeps the messages of a conversation and asks the model for the next one.

    Args:
        model: A transformers or peft causal language model.
        tokenizer: Its tokenizer.
        template: The prompt format the model was tuned with.
        system: System message; '' for none.
        sampling: How answers are drawn.
        max_length: Tokens of prompt and answer together that the model can hold.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: Template, *, system: str = '', sampling: Sampling, max_length: int
    ) -> None:
        self.sampling = sampling
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._system = [Message('system', system)] if system else []
        self._max_length = max_length
        self.history: list[Message] = []
        self.num_dropped_turns = 0

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        """Answers one message.

        The oldest turns are left out, whole, where prompt and answer would not fit; `num_dropped_turns` counts them.

        Args:
            text: What the user says.
            on_text: Called with each piece of the answer as it comes.

        Returns:
            The whole answer, without its stop token.
        """
        messages = [*self.history, Message('user', text)]
        prompt_ids = self._encode(messages)
        while len(prompt_ids) + self.sampling.max_new_tokens > self._max_length and len(messages) > 1:
            messages = messages[2:]
            self.num_dropped_turns += 1
            prompt_ids = self._encode(messages)
        stop_ids = self._template.stop_ids(self._tokenizer)
        stream = TextStream(self._tokenizer, on_text, stop_ids)
        dtype, device = self._model.dtype, self._model.device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            generate(self._model, prompt_ids, stop_ids=stop_ids, sampling=self.sampling, streamer=stream)
        answer = self._tokenizer.decode(stream.ids, clean_up_tokenization_spaces=False)
        self.history = [*messages, Message('assistant', answer)]
        return answer

    def clear(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.history = []

    def _encode(self, messages: list[Message]) -> list[int]:
        return encode_prompt([*self._system, *messages], self._tokenizer, self._template)
