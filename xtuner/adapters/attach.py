"""Adapters: attach one, save one; what is trained and on which base it belongs. `adapter_load` loads them.

A saved adapter is peft's own form (`adapter_config.json`, `adapter_model.safetensors`) beside `xtuner.json`, which
says on which base it was trained. Plain `PeftModel.from_pretrained` loads the folder without us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner import __version__
from xtuner.adapters.settings import check_patterns
from xtuner.config.load import section_of
from xtuner.config.schema import QuantizationConfig
from xtuner.dataset.templates.builtin import FROM_TOKENIZER, get_template
from xtuner.errors import CheckpointError, ConfigError, ModelError, one_line
from xtuner.utils.fields import Field, check_fields, shown
from xtuner.utils.files import read_object

PROVENANCE_FILE = 'xtuner.json'
_TEXT = Field(str)
_FIELDS = {
    'base': _TEXT, 'base_fingerprint': _TEXT, 'template': _TEXT, 'xtuner': _TEXT,
    'compute_dtype': Field(str, allowed=('bf16', 'fp16', 'fp32')),
    'quantization': Field(dict[str, Any] | None),
    'training': Field(dict[str, Any] | None), 'merged': Field(dict[str, Any] | None),
}  # fmt: skip
_TRAINING_FIELDS = {'data': Field(list[str] | None)}


@dataclass(frozen=True)
class Provenance:
    """What an adapter needs to be used as it was trained.

    Attributes:
        base: The base model's path or id, as the config named it.
        base_fingerprint: `xtuner.model.weights.reader.fingerprint` of its weights.
        template: Name of the prompt template.
        compute_dtype: 'bf16', 'fp16' or 'fp32'.
        quantization: The `quantization` section in force, or None.
        xtuner: The version that wrote the adapter.
        training: How it was trained, as `engine.metadata.training_facts` gives it for the model card; None: unknown.
        merged: Of a merged model: `base`, on which it was merged ('original' or 'dequantized'), and, where it was
            measured against the trained model, `agreement` (share of the likeliest tokens), `kl` (nats), `positions`.
    """

    base: str
    base_fingerprint: str
    template: str
    compute_dtype: str
    quantization: dict[str, Any] | None = None
    xtuner: str = __version__
    training: dict[str, Any] | None = None
    merged: dict[str, Any] | None = None

    @property
    def answer_tokens(self) -> list[str] | None:
        """The special tokens that the model was taught to write, which earlier answers in a prompt spell."""
        found = (self.training or {}).get('special_tokens_in_answers')
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None

    def write(self, folder: Path) -> None:
        """Writes `xtuner.json` into the folder."""
        known = {key: value for key, value in asdict(self).items() if key != 'merged' or value is not None}
        text = json.dumps(known, indent=2, ensure_ascii=False)
        (folder / PROVENANCE_FILE).write_text(text + '\n', encoding='utf-8')


def read_provenance(folder: Path) -> Provenance | None:
    """What `xtuner.json` in an adapter's folder says; None for an adapter that another tool wrote.

    Raises:
        CheckpointError: the file is there and cannot be understood.
    """
    path = folder / PROVENANCE_FILE
    if not path.exists() and not path.is_symlink():
        return None
    content = read_object(path, CheckpointError)
    names = [field.name for field in fields(Provenance)]
    required = [field.name for field in fields(Provenance) if field.default is MISSING]
    check_fields(content, _FIELDS, path, CheckpointError)
    check_fields(content.get('training') or {}, _TRAINING_FIELDS, f'{path}: in `training`', CheckpointError)
    if missing := [name for name in required if name not in content]:
        raise CheckpointError(f'{path}: `{missing[0]}` is missing; restore the file, or remove it to do without')
    if surplus := [name for name in content if name not in names]:
        raise CheckpointError(
            f'{path}: unknown field {shown(surplus[0])}; restore the file, or remove it to do without'
        )
    try:
        if content.get('quantization') is not None:
            section_of(QuantizationConfig, content['quantization'], 'quantization')
    except ConfigError as error:
        raise CheckpointError(f'{path}: {error}') from error
    return Provenance(**content)


def check_template(provenance: Provenance | None, folder: Path) -> None:
    """Refuses an adapter whose prompt template is none that is known here, before a model is loaded.

    Raises:
        CheckpointError: it names none; says file, field and value.
    """
    if provenance is None or provenance.template == FROM_TOKENIZER:
        return
    try:
        get_template(provenance.template)
    except ConfigError as error:
        raise CheckpointError(f'{folder / PROVENANCE_FILE}: `template`: {error}') from error


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
    check_patterns(vars(adapter_config), module_names(model), '`adapter`', ConfigError)
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, adapter_config, autocast_adapter_dtype=True)
    except Exception as error:  # target modules that match nothing, a rank that is text, memory for a huge one
        raise ConfigError(f'`adapter`: {one_line(error)}') from error
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


def module_names(model: nn.Module) -> list[str]:
    """The names of a model's modules, which the patterns of an adapter's settings are matched with."""
    return [name for name, _ in model.named_modules()]


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
