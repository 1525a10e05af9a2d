"""Adapters: attach one, load one, save one; what is trained and on which base it belongs.

A saved adapter is peft's own form (`adapter_config.json`, `adapter_model.safetensors`) beside `xtuner.json`, which
says on which base it was trained. Plain `PeftModel.from_pretrained` loads the folder without us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from xtuner import __version__
from xtuner.errors import CheckpointError, ConfigError, ModelError

PROVENANCE_FILE = 'xtuner.json'


@dataclass(frozen=True)
class Provenance:
    """What an adapter needs to be used as it was trained.

    Attributes:
        base: The base model's path or id, as the config named it.
        base_fingerprint: `xtuner.model.weights.fingerprint` of its weights.
        template: Name of the prompt template.
        compute_dtype: 'bf16', 'fp16' or 'fp32'.
        quantization: The `quantization` section in force, or None.
        xtuner: The version that wrote the adapter.
        training: How it was trained: what the model card tables (`xtuner.engine.facts.training_facts`); None: unknown.
    """

    base: str
    base_fingerprint: str
    template: str
    compute_dtype: str
    quantization: dict[str, Any] | None = None
    xtuner: str = __version__
    training: dict[str, Any] | None = None

    @property
    def answer_tokens(self) -> list[str] | None:
        """The special tokens that the model was taught to write, which earlier answers in a prompt spell."""
        found = (self.training or {}).get('special_tokens_in_answers')
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None

    def write(self, folder: Path) -> None:
        """Writes `xtuner.json` into the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / PROVENANCE_FILE).write_text(text + '\n', encoding='utf-8')


def read_provenance(folder: Path) -> Provenance | None:
    """What `xtuner.json` in an adapter's folder says; None for an adapter that another tool wrote.

    Raises:
        CheckpointError: the file is there and cannot be understood.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        return Provenance(**json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f'{path}: cannot be read ({error}); restore it, or remove it to do without') from error


def attach_adapter(model: nn.Module, section: Mapping[str, Any]) -> Any:
    """Freezes a base model and puts a new peft adapter, in float32, on it.

    Args:
        model: A transformers model, its base possibly quantised.
        section: The config's `adapter`: `type` (a peft config class) and its arguments.

    Returns:
        The `peft.PeftModel`; only the adapter's parameters require gradients.

    Raises:
        ConfigError: the section does not fit its type, no module matches, or nothing would be trained.
    """
    from peft import get_peft_model

    from xtuner.registry import build

    adapter_config = build(section, 'adapter')
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, adapter_config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:  # target modules that match nothing, a rank that is text
        raise ConfigError(f'`adapter`: {error}') from error
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError('`adapter` leaves nothing to train; see `adapter.target_modules`')
    for _, parameter in trained:
        parameter.data = parameter.data.float()  # modules_to_save copies keep the base's dtype otherwise
    return adapted


def looks_at_the_base(section: Mapping[str, Any] | None) -> bool:
    """Whether the adapter of a config is made from the base's weights, or changes them, when it is attached.

    Plain LoRA does not; DoRA takes their norms, PiSSA and its like take them apart, others were not looked at. None,
    all weights, does not either.
    """
    if section is None:
        return False
    from peft import LoraConfig

    from xtuner.registry import build

    adapter = build(section, 'adapter')
    plain = type(adapter) is LoraConfig and adapter.init_lora_weights in (True, False, 'gaussian')
    return not plain or bool(adapter.use_dora or adapter.target_parameters or adapter.layer_replication)


def load_adapter(
    model: nn.Module,
    folder: Path,
    *,
    trainable: bool = False,
    base_fingerprint: str | None = None,
    name: str = 'default',
) -> Any:
    """Puts a saved adapter on its base.

    Args:
        model: The base model, or a `peft.PeftModel` that holds other adapters already.
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether its parameters shall require gradients.
        base_fingerprint: The fingerprint of `model`'s weights, to compare with the adapter's; None skips that.
        name: What peft calls it.

    Returns:
        The `peft.PeftModel`.

    Raises:
        CheckpointError: no adapter there, weights that do not fit, or an adapter of another base.
    """
    from peft import PeftModel

    check_adapter(folder, base_fingerprint)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, is_trainable=trainable)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f'adapter {folder} does not fit this base model: {error}') from error


def _newest_of(run: Path) -> str:
    """A hint at a run's newest checkpoint, for who gave the run's folder or its file `last`; else nothing."""
    last = run if run.name == 'last' else run / 'last'
    return f'; did you mean {last.parent / last.read_text(encoding="utf-8").strip()}?' if last.is_file() else ''


def check_adapter(folder: Path, base_fingerprint: str | None) -> Provenance | None:
    """Checks that a folder holds an adapter, and one of this base; returns its provenance.

    Raises:
        CheckpointError: a file is missing or no settings, or the fingerprints differ.
    """
    for name in ('adapter_config.json', 'adapter_model.safetensors'):
        if not (folder / name).is_file():
            raise CheckpointError(f'{folder}: no adapter there ({name} is missing){_newest_of(folder)}')
    try:
        if not isinstance(json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8')), dict):
            raise ValueError('expected a JSON object')
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{folder / "adapter_config.json"} cannot be read: {error}') from error
    provenance = read_provenance(folder)
    if provenance and base_fingerprint and provenance.base_fingerprint != base_fingerprint:
        raise CheckpointError(
            f'{folder} was trained on another base: {provenance.base} with weights {provenance.base_fingerprint[:12]}, '
            f'these are {base_fingerprint[:12]}; give the base it was trained on'
        )
    return provenance


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name.

    Raises:
        ModelError: there are none, or one is not float32 (a half-precision one would lose small updates).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError('the model has no trainable parameter')
    wrong = next((name for name, p in trained.items() if p.dtype != torch.float32), None)
    if wrong is not None:
        raise ModelError(f'trainable parameter {wrong} is {trained[wrong].dtype}, must be float32')
    return trained
