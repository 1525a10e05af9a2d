"""Loads a model, with or without an adapter, and its prompt template for a chat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.adapters.attach import check_template, read_provenance
from xtuner.adapters.load import check_adapter, load_adapter
from xtuner.chat.base import BaseChoice, load_base, log_base_notes
from xtuner.chat.moss import Call, MossSession
from xtuner.chat.plugins.base import Plugin
from xtuner.chat.session import ChatSession
from xtuner.dataset.templates.builtin import Template, get_template
from xtuner.inference.generate import Sampling, warm_up
from xtuner.model.loading import load_tokenizer, resolve_model
from xtuner.model.run_folder import resolve_checkpoint
from xtuner.model.weights.reader import fingerprint, open_weights

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class ChatModel:
    """The model, tokenizer and template shared by all conversations; immutable.

    Attributes:
        model: A transformers or peft causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        template: The prompt template it was trained with.
        max_length: The context length: maximum tokens of prompt and answer together.
    """

    model: Any
    tokenizer: Any
    template: Template
    max_length: int

    def session(self, *, system: str = '', sampling: Sampling) -> ChatSession:
        """Starts a conversation; several conversations may share the model."""
        return ChatSession(self.model, self.tokenizer, self.template, **self._settings(system, sampling))

    def moss_session(
        self, plugins: Sequence[Plugin], on_call: Callable[[Call, str], None], *, system: str = '', sampling: Sampling
    ) -> MossSession:
        """Starts a conversation in which the model may call tools; see `MossSession`."""
        settings = self._settings(system, sampling)
        return MossSession(self.model, self.tokenizer, self.template, plugins=plugins, on_call=on_call, **settings)

    def warm(self) -> None:
        """Warms up on a GPU: loads kernels and records the CUDA graph of the decoding step."""
        if self.model.device.type == 'cuda':
            logger.info('warming up (the first start on a machine compiles kernels, which takes some seconds)')
            warm_up(self.model, self.max_length)

    def _settings(self, system: str, sampling: Sampling) -> dict[str, Any]:
        return {'system': system, 'sampling': sampling, 'max_length': self.max_length}


def open_session(llm: str, *, system: str = '', sampling: Sampling, **choice: Any) -> ChatSession:
    """Starts a conversation with a model loaded by `open_chat_model`; `choice` are its other arguments."""
    return open_chat_model(llm, **choice).session(system=system, sampling=sampling)


def open_chat_model(
    llm: str,
    *,
    adapter: Path | None = None,
    template: str | None = None,
    bits: int | None = None,
    dtype: str = 'auto',
    device: str = 'auto',
    trust_remote_code: bool = False,
) -> ChatModel:
    """Loads a model, its tokenizer, its adapter and its template.

    Args:
        llm: Folder or hub id of the model.
        adapter: A checkpoint or work directory of `xtuner train`, or any peft adapter.
        template: Name of the prompt template; None uses the one that the adapter or the merged model was trained
            with, otherwise the tokenizer's own.
        bits: 4 or 8 to quantize the base, 16 not to; None means as the adapter was trained, otherwise 16.
        dtype: 'auto', 'bf16', 'fp16' or 'fp32', as in a config; auto is half precision on a GPU, float32 on a CPU.
        device: 'cuda' or 'cpu'; 'auto' selects a GPU if there is one.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded.
        CheckpointError: the adapter was trained on another base, or the folder contains no adapter.
        DataError: no template is known.
        UsageError: a GPU is requested but not available.
    """
    folder = resolve_model(llm, trust_remote_code=trust_remote_code)
    adapter = None if adapter is None else resolve_checkpoint(adapter)
    source = folder
    provenance = read_provenance(folder)
    if adapter is not None:
        provenance = check_adapter(adapter, fingerprint(open_weights(folder)))
        source = adapter if (adapter / 'tokenizer_config.json').is_file() else folder
    if template is None:
        check_template(provenance, adapter or folder)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    name = template or (provenance.template if provenance else 'from_tokenizer')
    choice = BaseChoice(bits, dtype, device)
    trained = provenance.quantization if provenance and adapter is not None else None
    model = load_base(folder, choice, trained, trust_remote_code=trust_remote_code)
    origins = {} if adapter is None else {str(adapter): provenance}
    log_base_notes(origins, provenance if adapter is None else None, choice.quantization(trained))
    max_length = getattr(model.config, 'max_position_embeddings', 2048)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.eval()
    prompt_template = get_template(name, tokenizer)
    if provenance is not None and provenance.answer_tokens:
        prompt_template = prompt_template.allowing(provenance.answer_tokens, tokenizer)
    return ChatModel(model, tokenizer, prompt_template, max_length)
