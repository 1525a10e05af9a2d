"""Converts a checkpoint of classical xtuner to a peft adapter or a model folder, whichever it contains."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner import __version__
from xtuner.config.find import find_config
from xtuner.config.load import read_file
from xtuner.convert.folder import write_model_files
from xtuner.convert.legacy_checkpoint import read_old_checkpoint
from xtuner.convert.output import atomic_folder, check_output
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import CheckpointError, ConfigError, ModelError
from xtuner.model.loading import load_tokenizer, resolve_model
from xtuner.model.run_folder import ADAPTER_CONFIG, resolve_checkpoint
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.files import write_tensors
from xtuner.registry import build

logger = logging.getLogger('xtuner')

_PREFIX = 'base_model.model.'
_WIDER = 'use --fp32'
_TRAINER_FILES = ('manifest.json', 'run.json', 'trainer.json', 'trainer.safetensors')  # needed only for resuming


def pth_to_hf(
    config: str, checkpoint: Path, out: Path, *, dtype: torch.dtype = torch.float16, max_shard_bytes: int = 2 * 10**9
) -> Path:
    """Writes the adapter in a checkpoint, or the whole model if all weights were trained.

    Args:
        config: The run's config, classical or new: it names the base model, the template and the adapter's settings.
        checkpoint: A `.pth` file, or the folder that DeepSpeed writes instead. A checkpoint of `xtuner train` is
            already an adapter or a model: it is copied without the trainer's state.
        out: A missing or empty folder. It appears only once it is complete.
        dtype: Dtype of the written weights.
        max_shard_bytes: Maximum bytes per file of a whole model.

    Returns:
        `out`.

    Raises:
        CheckpointError: The checkpoint cannot be read safely, or the config belongs to another run.
        ConfigError: The config cannot be read, or lacks required settings.
        ModelError: `out` is not empty, or the base of a whole model is missing.
    """
    check_output(out)
    checkpoint = resolve_checkpoint(checkpoint)
    if (checkpoint / ADAPTER_CONFIG).is_file() or (checkpoint / 'config.json').is_file():
        return _copy(checkpoint, out)
    path = find_config(config)
    run = _RunSettings(path, read_file(path))
    tensors = read_old_checkpoint(checkpoint)
    adapter = _adapter_tensors(tensors)
    with atomic_folder(out, ['pth_to_hf', __version__, str(checkpoint), checkpoint.stat().st_mtime_ns, str(dtype),
                            max_shard_bytes]) as folder:  # fmt: skip
        if adapter:
            if rest := len(tensors) - len(adapter):
                logger.info('skipping %d base tensors in the checkpoint, which the adapter does not need', rest)
            _write_adapter(folder, run, adapter, dtype)
        else:
            _write_model(folder, run, tensors, dtype, max_shard_bytes)
    return out


def _copy(checkpoint: Path, out: Path) -> Path:
    logger.info("%s is already in Hugging Face format; copying it without the trainer's state", checkpoint)
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name not in _TRAINER_FILES]
    with atomic_folder(out, ['copy', __version__, str(checkpoint)]) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)
    return out


def _adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the adapter's tensors: all of them under peft's names on disk; in-memory names may include the base's."""
    if not any('.lora_' in name for name in tensors):
        return {}
    if not any('.default' in name for name in tensors):
        return dict(tensors)
    return {name: tensor for name, tensor in tensors.items() if '.default' in name}


class _RunSettings:
    """Settings of a run's config, classical or new.

    Attributes:
        path: The config file.
        base: The base model's folder or hub id.
        template: The prompt template, or None.
        lora: The adapter's settings, or None.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        model = values.get('model') or {}
        llm = model.get('llm') or {}
        base = (
            llm.get('pretrained_model_name_or_path') or model.get('path') or values.get('pretrained_model_name_or_path')
        )
        if not isinstance(base, str):
            raise ConfigError(f'{path}: names no base model (`model.llm.pretrained_model_name_or_path`)')
        self.base = base
        template = values.get('prompt_template') or model.get('template')
        self.template = re.split('[.:]', str(template))[-1] if template else None
        self.lora: dict[str, Any] | None = model.get('lora') or values.get('adapter')

    def tokenizer(self) -> Any:
        """The base's tokenizer with the run's chat template, or None if it is unavailable."""
        try:
            tokenizer: Any = load_tokenizer(self.base)
            if self.template and self.template != 'from_tokenizer':
                tokenizer.chat_template = get_template(self.template, tokenizer).chat_template()
        except (ModelError, ConfigError) as error:
            logger.warning('no tokenizer was written: %s', error)
            return None
        return tokenizer


def _write_adapter(folder: Path, run: _RunSettings, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    if run.lora is None:
        raise ConfigError(f'{run.path}: the checkpoint contains an adapter, but the config has none (`model.lora`)')
    named = {_adapter_name(name): tensor for name, tensor in tensors.items() if '.original_module.' not in name}
    ranks = {name.removesuffix('.lora_A.weight').removeprefix(_PREFIX): tensor.shape[0]
             for name, tensor in named.items() if name.endswith('.lora_A.weight')}  # fmt: skip
    settings = dict(run.lora) | {'base_model_name_or_path': run.base}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else settings.get('r', 8)
    if ranks and settings.get('r') != common:
        raise CheckpointError(f'{run.path}: rank {settings.get("r")} in the config but {common} in the checkpoint; '
                              'is it the config of that run?')  # fmt: skip
    if not isinstance(settings.get('target_modules'), (list, tuple)):
        settings['target_modules'] = sorted({module.rpartition('.')[2] for module in ranks})
    settings['rank_pattern'] = {module: rank for module, rank in ranks.items() if rank != common}
    if whole := sorted({name.split('.')[-2] for name in named if '.lora_' not in name}):
        settings['modules_to_save'] = whole
    settings.setdefault('task_type', 'CAUSAL_LM')
    adapter_config: Any = build(settings, 'model.lora')
    adapter_config.inference_mode = True
    adapter_config.save_pretrained(folder)
    plans = {name: TensorPlan(name, tuple(tensor.shape), dtype) for name, tensor in named.items()}
    values = {name: plans[name].cast(tensor, wider=_WIDER).contiguous() for name, tensor in named.items()}
    write_tensors(values, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    if (tokenizer := run.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)
    logger.info('%d tensors of an adapter of rank %d for %s', len(named), common, run.base)


def _adapter_name(name: str) -> str:
    """Returns peft's name on disk, without the adapter's name that mmengine and DeepSpeed keep."""
    name = re.sub(r'\.(lora_[A-Za-z_]+)\.default(?=\.|$)', r'.\1', name)
    name = re.sub(r'\.modules_to_save\.default\.', '.', name)
    return name if name.startswith(_PREFIX) else _PREFIX + name


def _write_model(
    folder: Path, run: _RunSettings, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    base = resolve_model(run.base)
    plans = [TensorPlan(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
             for name, tensor in tensors.items() if not name.endswith('inv_freq')]  # fmt: skip

    def blocks(plan: TensorPlan) -> Iterator[Tensor]:
        """See `shards.Blocks`."""
        tensor = tensors[plan.name]
        for start, stop in row_blocks(plan.shape):
            yield plan.cast(tensor[start:stop] if plan.shape else tensor, wider=_WIDER)

    write_weights(folder, plans, max_shard_bytes, blocks)
    write_model_files(folder, base, None, None, {'dtype': str(dtype).removeprefix('torch.')})
    if (tokenizer := run.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)
    logger.info('%d tensors of a whole model', len(plans))
