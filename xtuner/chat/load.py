"""What to chat with: a model, or a base and its adapter, and the template that belongs to it."""

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
            warm_up(self.model, self.max_length)

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
        adapter: A checkpoint or work folder of `xtuner train`, or any peft adapter.
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
    chosen = get_template(name, tokenizer)
    if provenance is not None and provenance.answer_tokens:
        chosen = chosen.allowing(provenance.answer_tokens, tokenizer)
    return ChatModel(model, tokenizer, chosen, max_length)
