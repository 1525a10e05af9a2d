"""What to chat with: a model, or a base and its adapter, and the template that belongs to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.chat.moss import Call, MossSession
from xtuner.chat.plugins.base import Plugin
from xtuner.chat.session import ChatSession
from xtuner.config.schema import QuantizationConfig
from xtuner.dataset.template import Template, get_template
from xtuner.errors import UsageError
from xtuner.model.adapter import check_adapter, load_adapter, read_provenance
from xtuner.model.generate import Sampling, warm
from xtuner.model.loading import load_model, load_tokenizer, resolve_model
from xtuner.model.precision import compute_dtype, default_device
from xtuner.model.weights import fingerprint, open_weights

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class ChatModel:
    """What every conversation with one model shares: nothing here changes while it is talked to.

    Attributes:
        model: A transformers or peft causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        template: The prompt format it was tuned with.
        max_length: Tokens of prompt and answer together that it can hold.
    """

    model: Any
    tokenizer: Any
    template: Template
    max_length: int

    def session(self, *, system: str = '', sampling: Sampling) -> ChatSession:
        """Begins a conversation; several can be under way over the same weights."""
        return ChatSession(self.model, self.tokenizer, self.template, **self._settings(system, sampling))

    def moss_session(
        self, plugins: Sequence[Plugin], on_call: Callable[[Call, str], None], *, system: str = '', sampling: Sampling
    ) -> MossSession:
        """Begins a conversation in which the model may call tools; see `MossSession`."""
        settings = self._settings(system, sampling)
        return MossSession(self.model, self.tokenizer, self.template, plugins=plugins, on_call=on_call, **settings)

    def warm(self) -> None:
        """Makes the first answer as fast as all others: on a GPU, loads kernels and records the decoding step."""
        if self.model.device.type == 'cuda':
            logger.info('warming up; the first time on a machine, kernels are compiled, which takes some seconds')
            warm(self.model, self.max_length)

    def _settings(self, system: str, sampling: Sampling) -> dict[str, Any]:
        return {'system': system, 'sampling': sampling, 'max_length': self.max_length}


def open_session(llm: str, *, system: str = '', sampling: Sampling, **choice: Any) -> ChatSession:
    """Begins a conversation with a model that `open_chat_model` loads; `choice` are its further arguments."""
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
    """Loads everything a chat needs.

    Args:
        llm: A model's folder or hub id.
        adapter: A checkpoint of `xtuner train`, or any peft adapter.
        template: Name of the prompt template; None takes the one the adapter or the merged model was tuned with, or
            else the tokenizer's own.
        bits: 4 or 8 quantises the base; 16 does not; None leaves it as the adapter was trained, or else as 16.
        dtype: 'auto', 'bf16', 'fp16' or 'fp32', as in a config: half precision on a GPU, float32 on a CPU.
        device: 'cuda' or 'cpu'; 'auto' is a GPU where there is one.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded.
        CheckpointError: the adapter is of another base, or none.
        DataError: no template is known.
        UsageError: a GPU is asked for and there is none.
    """
    folder = resolve_model(llm, trust_remote_code=trust_remote_code)
    source = folder
    provenance = read_provenance(folder)
    if adapter is not None:
        provenance = check_adapter(adapter, fingerprint(open_weights(folder)))
        source = adapter if (adapter / 'tokenizer_config.json').is_file() else folder
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    name = template or (provenance.template if provenance else 'from_tokenizer')
    place = _device(device)
    quantization = QuantizationConfig(bits=bits) if bits in (4, 8) else None
    if bits is None and adapter is not None and provenance and provenance.quantization:
        quantization = QuantizationConfig(**provenance.quantization)  # the base as the adapter saw it
        logger.info('base in %d bit, as the adapter was trained; --bits changes that', quantization.bits)
    model: Any = load_model(
        folder,
        dtype=compute_dtype(dtype, place),
        quantization=quantization,
        device=place,
        trust_remote_code=trust_remote_code,
    )
    max_length = getattr(model.config, 'max_position_embeddings', 2048)
    if adapter is not None:
        model = load_adapter(model, adapter)
    model.eval()
    chosen = get_template(name, tokenizer)
    if provenance is not None and provenance.answer_tokens:
        chosen = chosen.allowing(provenance.answer_tokens, tokenizer)
    return ChatModel(model, tokenizer, chosen, max_length)


def _device(name: str) -> torch.device:
    if name == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda, but PyTorch sees no GPU here; leave it out, or see `xtuner doctor`')
    return torch.device('cpu') if name == 'cpu' else default_device()
