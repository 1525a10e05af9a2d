"""What is served: one base, any number of adapters on it, each with its name and its prompt format."""

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
    """One name of the service.

    Attributes:
        name: What clients call it.
        adapter: What peft calls its adapter, see `_peft_name`; None for the base.
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

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> list[Piece]:
        """Renders messages up to where the answer begins, as in training; DataError where they have no form."""
        if self.template is None:
            raise DataError(f'{self.name!r} has no prompt format for conversations, /v1/completions works: '
                            f'{self.why_no_template}')  # fmt: skip
        return self.template.render(to_prompt(messages), prompt=True)

    def encode_chat(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of what `render_chat` returned."""
        return encode_pieces(pieces, self.tokenizer, self._template_or_plain())

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
        llm: A model's folder or hub id; the last part of it is its name.
        adapters: Each `[NAME=]FOLDER`.
        template: Name of the prompt template of all; None takes the one each was tuned with, or the tokenizer's own.
        choice: How the base is held.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        ModelError: the model cannot be loaded, or an adapter adds tokens of its own to the prompt.
        CheckpointError: an adapter is of another base, or none.
        UsageError: two names are the same, or adapters were trained on the base in different bits.
    """
    base_name = base_name_of(llm)
    folders = {name: resolve_checkpoint(path) for name, path in name_adapters(adapters, base_name).items()}
    folder = resolve_model(llm, trust_remote_code=trust_remote_code)
    known = fingerprint(open_weights(folder)) if folders else None
    origins = {name: check_adapter(path, known) for name, path in folders.items()}
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
            raise ModelError(f'{path}: an adapter that adds tokens to the prompt cannot be served')
    return model.eval()


def _served(
    name: str, peft_name: str | None, source: Path, template: str | None, origin: Provenance | None, trusted: bool
) -> ServedModel:
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    wanted = template or (origin.template if origin else 'from_tokenizer')
    try:
        found = get_template(wanted, tokenizer)
        if origin and origin.answer_tokens:
            found = found.allowing(origin.answer_tokens, tokenizer)
        return ServedModel(name, peft_name, tokenizer, found)
    except ConfigError as error:
        if template:
            raise
        return ServedModel(name, peft_name, tokenizer, None, str(error))


def _peft_name(number: int) -> str:
    """What peft calls an adapter: never the served name.

    peft makes it a key of `nn.ModuleDict`, which allows no dot and none of its own attributes (`train`, `half`), and
    finds weights by it with a text search, in which no name may be a part of another or of a kind of adapter.
    """
    return f'served_{number:04}'


def _as_trained(origins: dict[str, Provenance | None]) -> Mapping[str, Any] | None:
    """The quantisation of the base that the adapters saw."""
    kinds = {name: origin.quantization for name, origin in origins.items() if origin}
    first = next(iter(kinds.values()), None)
    other = next((name for name, kind in kinds.items() if kind != first), None)
    if other is not None:
        raise UsageError(f'adapters {next(iter(kinds))!r} and {other!r} were trained on the base in different bits; '
                         'choose with --bits, or serve them apart')  # fmt: skip
    return first
