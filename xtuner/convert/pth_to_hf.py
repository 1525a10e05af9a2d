"""A checkpoint of classical xtuner as what it holds: a peft adapter, or a model folder."""

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
from xtuner.convert.output import check_output, whole_folder
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
_OF_THE_TRAINER = ('manifest.json', 'run.json', 'trainer.json', 'trainer.safetensors')  # to go on with a run


def pth_to_hf(
    config: str, checkpoint: Path, out: Path, *, dtype: torch.dtype = torch.float16, max_shard_bytes: int = 2 * 10**9
) -> Path:
    """Writes the adapter that a checkpoint holds, or the whole model where all weights were trained.

    Args:
        config: The run's config, classical or ours: it names the base model, the template and the adapter's settings.
        checkpoint: A `.pth` file, or the folder that DeepSpeed writes in its place. A checkpoint of `xtuner train` is
            an adapter or a model already: it is copied, without the trainer's state.
        out: A folder that is missing or empty. It appears as a whole at the end.
        dtype: Of the written weights.
        max_shard_bytes: Most bytes of one file of a whole model.

    Returns:
        `out`.

    Raises:
        CheckpointError: the checkpoint cannot be read safely, or the config is of another run.
        ConfigError: the config cannot be read, or does not say what is needed.
        ModelError: `out` is not empty, or the base of a whole model is not there.
    """
    check_output(out)
    checkpoint = resolve_checkpoint(checkpoint)
    if (checkpoint / ADAPTER_CONFIG).is_file() or (checkpoint / 'config.json').is_file():
        return _copy(checkpoint, out)
    path = find_config(config)
    run = _Run(path, read_file(path))
    tensors = read_old_checkpoint(checkpoint)
    adapter = _adapter_part(tensors)
    with whole_folder(out, ['pth_to_hf', __version__, str(checkpoint), checkpoint.stat().st_mtime_ns, str(dtype),
                            max_shard_bytes]) as folder:  # fmt: skip
        if adapter:
            if rest := len(tensors) - len(adapter):
                logger.info('%d tensors of the base in the checkpoint are left out: the adapter does without', rest)
            _write_adapter(folder, run, adapter, dtype)
        else:
            _write_model(folder, run, tensors, dtype, max_shard_bytes)
    return out


def _copy(checkpoint: Path, out: Path) -> Path:
    logger.info("%s is in the form of Hugging Face already; it is copied without the trainer's state", checkpoint)
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name not in _OF_THE_TRAINER]
    with whole_folder(out, ['copy', __version__, str(checkpoint)]) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)
    return out


def _adapter_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors. Under peft's names on disk, all are; under those in memory, the base may be there."""
    if not any('.lora_' in name for name in tensors):
        return {}
    if not any('.default' in name for name in tensors):
        return dict(tensors)
    return {name: tensor for name, tensor in tensors.items() if '.default' in name}


class _Run:
    """What a config says, in either form.

    Attributes:
        path: The config's file.
        base: The base model's folder or hub id.
        template: Its prompt template, or None.
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
            raise ConfigError(f'{path}: it names no base model (`model.llm.pretrained_model_name_or_path`)')
        self.base = base
        template = values.get('prompt_template') or model.get('template')
        self.template = re.split('[.:]', str(template))[-1] if template else None
        self.lora: dict[str, Any] | None = model.get('lora') or values.get('adapter')

    def tokenizer(self) -> Any:
        """The base's tokenizer with the run's chat template, or None where it cannot be had here."""
        try:
            tokenizer: Any = load_tokenizer(self.base)
            if self.template and self.template != 'from_tokenizer':
                tokenizer.chat_template = get_template(self.template, tokenizer).chat_template()
        except (ModelError, ConfigError) as error:
            logger.warning('no tokenizer is written: %s', error)
            return None
        return tokenizer


def _write_adapter(folder: Path, run: _Run, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    if run.lora is None:
        raise ConfigError(f'{run.path}: the checkpoint holds an adapter, but the config has none (`model.lora`)')
    named = {_adapter_name(name): tensor for name, tensor in tensors.items() if '.original_module.' not in name}
    ranks = {name.removesuffix('.lora_A.weight').removeprefix(_PREFIX): tensor.shape[0]
             for name, tensor in named.items() if name.endswith('.lora_A.weight')}  # fmt: skip
    settings = dict(run.lora) | {'base_model_name_or_path': run.base}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else settings.get('r', 8)
    if ranks and settings.get('r') != common:
        raise CheckpointError(f'{run.path}: rank {settings.get("r")} there, {common} in the checkpoint; '
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
    """peft's name on disk: without the adapter's own name, which mmengine and DeepSpeed keep."""
    name = re.sub(r'\.(lora_[A-Za-z_]+)\.default(?=\.|$)', r'.\1', name)
    name = re.sub(r'\.modules_to_save\.default\.', '.', name)
    return name if name.startswith(_PREFIX) else _PREFIX + name


def _write_model(
    folder: Path, run: _Run, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int
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
