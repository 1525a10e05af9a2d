"""Reads DeepSpeed's JSON configs, shipped ones and the user's own. Imports no heavy library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.config.compatibility import STRATEGIES
from xtuner.config.find import config_root
from xtuner.errors import ConfigError, nearest

# Set by the config of the run; ignored in a DeepSpeed config.
_SET_BY_RUN = ('train_batch_size', 'train_micro_batch_size_per_gpu', 'gradient_accumulation_steps', 'gradient_clipping',
         'optimizer', 'scheduler', 'fp16', 'bf16', 'bfloat16', 'torch_autocast')  # fmt: skip


def shipped_deepspeed_configs() -> dict[str, Path]:
    """Names and files of the shipped configs."""
    return {path.stem: path for path in sorted((config_root() / 'deepspeed').glob('*.json'))}


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Reads a shipped DeepSpeed config, such as `deepspeed_zero2`, or a .json file.

    Raises:
        ConfigError: there is no such config, the file cannot be read, or its ZeRO stage is not 1, 2 or 3.
    """
    shipped = shipped_deepspeed_configs()
    path = shipped.get(name, Path(name))
    if name not in shipped and not (path.suffix == '.json' and path.is_file()):
        names = ['auto', *STRATEGIES[:3], *shipped]
        hint = nearest(name, names) or f'; available: {", ".join(names)}, or a DeepSpeed .json file'
        raise ConfigError(f'`parallel.strategy` is {name!r}, which is neither a strategy nor a file{hint}')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        stage = content['zero_optimization']['stage']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path}: not a DeepSpeed config with `zero_optimization.stage`: {error!r}') from error
    if stage not in (1, 2, 3):
        raise ConfigError(f'{path}: `zero_optimization.stage` is {stage!r}, must be 1, 2 or 3; without ZeRO, use ddp')
    return {key: value for key, value in content.items() if key not in _SET_BY_RUN}


def stage_of(strategy: str) -> str:
    """Maps a name or file to one of `STRATEGIES`, e.g. 'deepspeed_zero2_offload' to 'deepspeed_zero2'."""
    if strategy in STRATEGIES:
        return strategy
    return f'deepspeed_zero{read_deepspeed_config(strategy)["zero_optimization"]["stage"]}'
