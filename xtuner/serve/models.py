"""Loads the served models: one base and any number of adapters, each with its name and prompt template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.adapters.attach import Provenance, check_template, read_provenance
from xtuner.adapters.load import check_adapter, load_adapter
from xtuner.chat.base import AS_TRAINED, BaseChoice, load_base, log_base_notes
from xtuner.dataset.conversation import to_conversation, to_prompt
from xtuner.dataset.encode.conversation_encoder import encode_conversation, encode_pieces
from xtuner.dataset.templates.builtin import Piece, Template, get_template
from xtuner.errors import ConfigError, DataError, ModelError, UsageError
from xtuner.model.loading import load_config, load_tokenizer, resolve_model
from xtuner.model.run_folder import resolve_checkpoint
from xtuner.model.weights.reader import fingerprint, open_weights
from xtuner.serve.address import base_name_of, name_adapters


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can select.

    Attributes:
        name: The name used by clients.
        adapter: The name of its adapter in peft, see `_peft_name`; None for the base.
        tokenizer: Its tokenizer.
        template: Its prompt template; None if unknown.
        why_no_template: The reason, for clients that send a chat request.
    """

    name: str
    adapter: str | None
    tokenizer: Any
    template: Template | None
    why_no_template: str = ''

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer."""
        return frozenset(self._template_or_plain().stop_ids(self.tokenizer))

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> list[Piece]:
        """Renders messages up to the start of the answer, as in training; DataError if the template cannot."""
        if self.template is None:
            raise DataError(f'{self.name!r} has no prompt template for conversations, use /v1/completions: '
                            f'{self.why_no_template}')  # fmt: skip
        return self.template.render(to_prompt(messages), prompt=True)

    def encode_chat(self, pieces: Sequence[Piece]) -> list[int]:
        """Encodes the output of `render_chat`."""
        return encode_pieces(pieces, self.tokenizer, self._template_or_plain())

    def encode_text(self, text: str) -> list[int]:
        """Encodes a text to complete, like a document in training without its end token."""
        document = to_conversation({'messages': [{'role': 'text', 'content': text}]}, 'the prompt')
        ids = encode_conversation(document, self.tokenizer, self._template_or_plain()).input_ids.tolist()
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _template_or_plain(self) -> Template:
        return self.template or get_template('default')  # documents are encoded the same way with every template


@dataclass(frozen=True)
class Loaded:
    """The loaded model and the names under which it is served.

    Attributes:
        model: The base, or the `peft.PeftModel` around it.
        served: The served models, the base first.
        max_length: The context length: maximum tokens of prompt and answer together.
    """

    model: Any
    served: tuple[ServedModel, ...]
    max_length: int

    def use(self, adapter: str | None) -> None:
        """Activates an adapter; None disables all."""
        if len(self.served) == 1:
            return
        tuner = self.model.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
            return
        if self.model.active_adapter != adapter:
            self.model.set_adapter(adapter, inference_mode=True)
        tuner.enable_adapter_layers()


def load_served(
    llm: str,
    *,
    adapters: Sequence[str] = (),
    template: str | None = None,
    choice: BaseChoice = AS_TRAINED,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a base and its adapters.

    Args:
        llm: Folder or hub id of the model; its last component is the name of the model.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template; None uses the one each model was trained with, or the tokenizer's own.
        choice: Precision and device of the base.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded, or an adapter adds tokens to the prompt.
        CheckpointError: an adapter was trained on another base, or a folder contains no adapter.
        UsageError: two names are equal, or adapters were trained with different quantization.
    """
    base_name = base_name_of(llm)
    folders = {name: resolve_checkpoint(path) for name, path in name_adapters(adapters, base_name).items()}
    folder = resolve_model(llm, trust_remote_code=trust_remote_code)
    base_fingerprint = fingerprint(open_weights(folder)) if folders else None
    origins = {name: check_adapter(path, base_fingerprint) for name, path in folders.items()}
    base_origin = read_provenance(folder)
    if template is None:
        for origin, path in ((base_origin, folder), *((origins[name], path) for name, path in folders.items())):
            check_template(origin, path)
    served = [_served(base_name, None, folder, template, base_origin, trust_remote_code)]
    for number, (name, path) in enumerate(folders.items()):
        source = path if (path / 'tokenizer_config.json').is_file() else folder
        origin = origins[name] or base_origin
        served.append(_served(name, _peft_name(number), source, template, origin, trust_remote_code))
    trained = _as_trained(origins) if choice.bits is None else None
    model = load_base(folder, choice, trained, trust_remote_code=trust_remote_code)
    log_base_notes(origins, base_origin, choice.quantization(trained))
    model = _add_adapters(model, list(folders.values()))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return Loaded(model, tuple(served), getattr(config, 'max_position_embeddings', 2048))


def _add_adapters(model: Any, folders: Sequence[Path]) -> Any:
    for number, path in enumerate(folders):
        model = load_adapter(model, path, name=_peft_name(number))
        if model.peft_config[_peft_name(number)].is_prompt_learning:
            raise ModelError(f'{path}: prompt-learning adapters, which add tokens to the prompt, cannot be served')
    return model.eval()


def _served(
    name: str, peft_name: str | None, source: Path, template: str | None, origin: Provenance | None, trusted: bool
) -> ServedModel:
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    template_name = template or (origin.template if origin else 'from_tokenizer')
    try:
        prompt_template = get_template(template_name, tokenizer)
        if origin and origin.answer_tokens:
            prompt_template = prompt_template.allowing(origin.answer_tokens, tokenizer)
        return ServedModel(name, peft_name, tokenizer, prompt_template)
    except ConfigError as error:
        if template:
            raise
        return ServedModel(name, peft_name, tokenizer, None, str(error))


def _peft_name(number: int) -> str:
    """The name of an adapter in peft, which differs from the served name.

    peft uses the name as a key of `nn.ModuleDict`, which allows neither dots nor its own attributes (`train`, `half`),
    and finds weights by a substring search, in which no name may be part of another name or of an adapter type.
    """
    return f'served_{number:04}'


def _as_trained(origins: dict[str, Provenance | None]) -> Mapping[str, Any] | None:
    """The quantization of the base in the training of the adapters."""
    quantizations = {name: origin.quantization for name, origin in origins.items() if origin}
    first = next(iter(quantizations.values()), None)
    other = next((name for name, quantization in quantizations.items() if quantization != first), None)
    if other is not None:
        raise UsageError(f'adapters {next(iter(quantizations))!r} and {other!r} were trained with different '
                         'quantization of the base; select one with --bits, or serve them separately')  # fmt: skip
    return first
