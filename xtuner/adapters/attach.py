"""Attaches a new adapter to a base model, and records on which base it was trained; `adapters.load` loads adapters.

A saved adapter consists of peft's own files (`adapter_config.json`, `adapter_model.safetensors`) and `xtuner.json`,
which records the base that it was trained on. `PeftModel.from_pretrained` loads the folder without this package.
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
    """Training metadata that is needed to use an adapter as it was trained.

    Attributes:
        base: The base model's path or id, as the config named it.
        base_fingerprint: `xtuner.model.weights.reader.fingerprint` of its weights.
        template: Name of the prompt template.
        compute_dtype: 'bf16', 'fp16' or 'fp32'.
        quantization: The `quantization` section used in training, or None.
        xtuner: The version that wrote the adapter.
        training: Training facts for the model card, from `engine.metadata.training_facts`; None: unknown.
        merged: For a merged model: `base`, into which it was merged ('original' or 'dequantized'), and, if it was
            compared with the trained model, `agreement` (share of equal most likely tokens), `kl` (nats), `positions`.
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
        """Special tokens that the model was trained to write, and that earlier answers in a prompt contain as text."""
        tokens = (self.training or {}).get('special_tokens_in_answers')
        return tokens if isinstance(tokens, list) and all(isinstance(name, str) for name in tokens) else None

    def write(self, folder: Path) -> None:
        """Writes `xtuner.json` into the folder."""
        content = {key: value for key, value in asdict(self).items() if key != 'merged' or value is not None}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / PROVENANCE_FILE).write_text(text + '\n', encoding='utf-8')


def read_provenance(folder: Path) -> Provenance | None:
    """Reads `xtuner.json` from an adapter's folder; returns None for an adapter of another tool.

    Raises:
        CheckpointError: The file exists but is invalid.
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
        raise CheckpointError(f'{path}: `{missing[0]}` is missing; restore the file, or remove it')
    if surplus := [name for name in content if name not in names]:
        raise CheckpointError(f'{path}: unknown field {shown(surplus[0])}; restore the file, or remove it')
    try:
        if content.get('quantization') is not None:
            section_of(QuantizationConfig, content['quantization'], 'quantization')
    except ConfigError as error:
        raise CheckpointError(f'{path}: {error}') from error
    return Provenance(**content)


def check_template(provenance: Provenance | None, folder: Path) -> None:
    """Checks before a model is loaded that an adapter's prompt template is known.

    Raises:
        CheckpointError: The template is unknown; names file, field and value.
    """
    if provenance is None or provenance.template == FROM_TOKENIZER:
        return
    try:
        get_template(provenance.template)
    except ConfigError as error:
        raise CheckpointError(f'{folder / PROVENANCE_FILE}: `template`: {error}') from error


def attach_adapter(model: nn.Module, section: Mapping[str, Any]) -> Any:
    """Freezes a base model and attaches a new peft adapter in float32.

    Args:
        model: A transformers model; its base weights may be quantized.
        section: The config's `adapter` section: `type` (a peft config class) and its arguments.

    Returns:
        The `peft.PeftModel`; only the adapter's parameters require gradients.

    Raises:
        ConfigError: The section does not fit its type, no module matches, or nothing would be trained.
    """
    from peft import get_peft_model

    from xtuner.registry import build

    adapter_config = build(section, 'adapter')
    check_patterns(vars(adapter_config), module_names(model), '`adapter`', ConfigError)
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(model, adapter_config, autocast_adapter_dtype=True)
    except Exception as error:  # no matching target module, an invalid rank, out of memory for a huge one
        raise ConfigError(f'`adapter`: {one_line(error)}') from error
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError('`adapter` has no trainable parameter; see `adapter.target_modules`')
    for _, parameter in trained:
        parameter.data = parameter.data.float()  # modules_to_save copies keep the base's dtype otherwise
    return adapted


def needs_base_weights(section: Mapping[str, Any] | None) -> bool:
    """Whether attaching a config's adapter reads or changes the base's weights.

    Plain LoRA does not; DoRA reads their norms, PiSSA and similar methods decompose them; other methods are assumed to.
    None (full fine-tuning) does not.
    """
    if section is None:
        return False
    from peft import LoraConfig

    from xtuner.registry import build

    adapter = build(section, 'adapter')
    plain = type(adapter) is LoraConfig and adapter.init_lora_weights in (True, False, 'gaussian')
    return not plain or bool(adapter.use_dora or adapter.target_parameters or adapter.layer_replication)


def module_names(model: nn.Module) -> list[str]:
    """Names of a model's modules, against which the patterns of an adapter's settings are matched."""
    return [name for name, _ in model.named_modules()]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name.

    Raises:
        ModelError: There are none, or one is not float32 (half precision would lose small updates).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError('the model has no trainable parameter')
    wrong = next((name for name, p in trained.items() if p.dtype != torch.float32), None)
    if wrong is not None:
        raise ModelError(f'trainable parameter {wrong} is {trained[wrong].dtype}, must be float32')
    return trained
