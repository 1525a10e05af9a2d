"""What is served: one base, any number of adapters on it, each with its name and its prompt format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.schema import QuantizationConfig
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.template import Template, get_template
from xtuner.dataset.tokenize import encode_conversation, encode_prompt
from xtuner.errors import ConfigError, DataError, ModelError, UsageError
from xtuner.model.adapter import Provenance, check_adapter, load_adapter, read_provenance
from xtuner.model.loading import load_config, load_model, load_tokenizer, resolve_model
from xtuner.model.precision import compute_dtype, default_device
from xtuner.model.weights import fingerprint, open_weights

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class ServedModel:
    """One name of the service.

    Attributes:
        name: What clients call it.
        adapter: What peft calls its adapter; None for the base.
        tokenizer: Its tokenizer.
        template: Its prompt format; None where none is known.
        why_no_template: Why, for the client that asks it to chat.
    """

    name: str
    adapter: str | None
    tokenizer: Any
    template: Template | None
    why_no_template: str = ''

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset(self._template_or_plain().stop_ids(self.tokenizer))

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids up to where the answer begins, those of training; raises DataError on messages that have no form."""
        if self.template is None:
            raise DataError(f'{self.name!r} has no prompt format for conversations, /v1/completions works: '
                            f'{self.why_no_template}')  # fmt: skip
        return encode_prompt(messages, self.tokenizer, self.template)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text to be continued, those of a document in training without its end."""
        document = to_conversation({'messages': [{'role': 'text', 'content': text}]}, 'the prompt')
        ids = encode_conversation(document, self.tokenizer, self._template_or_plain()).input_ids.tolist()
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _template_or_plain(self) -> Template:
        return self.template or get_template('default')  # a document looks the same in all of them


@dataclass(frozen=True)
class Loaded:
    """The model in memory and the names under which it is served.

    Attributes:
        model: The base, or the `peft.PeftModel` around it.
        served: The base first.
        max_length: Tokens of prompt and answer together that it was made for.
    """

    model: Any
    served: tuple[ServedModel, ...]
    max_length: int

    def use(self, adapter: str | None) -> None:
        """Makes an adapter the active one; None: none."""
        if len(self.served) == 1:
            return
        tuner = self.model.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
            return
        if self.model.active_adapter != adapter:
            self.model.set_adapter(adapter, inference_mode=True)
        tuner.enable_adapter_layers()


def name_adapters(words: Sequence[str], base: str) -> dict[str, Path]:
    """Reads `[NAME=]FOLDER`; the name left out is the folder's own.

    Raises:
        UsageError: a name is used twice, or is the base's.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition('=')
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name
        if not name or name in found or name == base:
            raise UsageError(f'--adapter {word}: the name {name!r} is taken; give another: --adapter NAME={path}')
        found[name] = path
    return found


def load_served(
    llm: str,
    *,
    adapters: Sequence[str] = (),
    template: str | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a base and its adapters.

    Args:
        llm: A model's folder or hub id; the last part of it is its name.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template of all; None takes the one each was tuned with, or the tokenizer's own.
        bits: 4 or 8 quantises the base; None leaves it as the adapters were trained, or in half precision.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded, or an adapter adds tokens of its own to the prompt.
        CheckpointError: an adapter is of another base, or none.
        UsageError: two names are the same, or adapters were trained on the base in different bits.
    """
    base_name = llm.rstrip('/').rsplit('/', 1)[-1]
    folders = name_adapters(adapters, base_name)
    folder = resolve_model(llm, trust_remote_code=trust_remote_code)
    known = fingerprint(open_weights(folder)) if folders else None
    origins = {name: check_adapter(path, known) for name, path in folders.items()}
    base_origin = read_provenance(folder)
    served = [_served(base_name, None, folder, template, base_origin, trust_remote_code)]
    for name, path in folders.items():
        source = path if (path / 'tokenizer_config.json').is_file() else folder
        served.append(_served(name, name, source, template, origins[name] or base_origin, trust_remote_code))
    quantization = QuantizationConfig(bits=bits) if bits else _as_trained(origins)
    model = _load_model(folder, folders, quantization, trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return Loaded(model, tuple(served), getattr(config, 'max_position_embeddings', 2048))


def _load_model(base: Path, adapters: dict[str, Path], quantization: QuantizationConfig | None, trusted: bool) -> Any:
    device = default_device()
    model: Any = load_model(
        base,
        dtype=compute_dtype('auto', device),
        quantization=quantization,
        device=device,
        trust_remote_code=trusted,
    )
    for name, path in adapters.items():
        model = load_adapter(model, path, name=_peft_name(name))
        if model.peft_config[_peft_name(name)].is_prompt_learning:
            raise ModelError(f'{path}: an adapter that adds tokens to the prompt cannot be served')
    return model.eval()


def _served(
    name: str, adapter: str | None, source: Path, template: str | None, origin: Provenance | None, trusted: bool
) -> ServedModel:
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    wanted = template or (origin.template if origin else 'from_tokenizer')
    peft_name = None if adapter is None else _peft_name(adapter)
    try:
        found = get_template(wanted, tokenizer)
        if origin and origin.answer_tokens:
            found = found.allowing(origin.answer_tokens, tokenizer)
        return ServedModel(name, peft_name, tokenizer, found)
    except ConfigError as error:
        if template:
            raise
        return ServedModel(name, peft_name, tokenizer, None, str(error))


def _peft_name(name: str) -> str:
    """A module's name, which must hold no dot."""
    return name.replace('.', '_')


def _as_trained(origins: dict[str, Provenance | None]) -> QuantizationConfig | None:
    """The base as the adapters saw it."""
    kinds = {name: origin.quantization for name, origin in origins.items() if origin}
    if not kinds:
        return None
    first = next(iter(kinds.values()))
    other = next((name for name, kind in kinds.items() if kind != first), None)
    if other is not None:
        raise UsageError(f'adapters {next(iter(kinds))!r} and {other!r} were trained on the base in different bits; '
                         'choose with --bits, or serve them apart')  # fmt: skip
    if first is None:
        return None
    quantization = QuantizationConfig(**first)
    logger.info('base in %d bit, as the adapters were trained; --bits changes that', quantization.bits)
    return quantization
