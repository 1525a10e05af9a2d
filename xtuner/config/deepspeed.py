"""DeepSpeed's JSON files: those that come with the package, and a user's own. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtuner.config.compatibility import STRATEGIES
from xtuner.config.find import config_root
from xtuner.errors import ConfigError, nearest

# What the run's own config says; a file's word on it is left out.
_OURS = ('train_batch_size', 'train_micro_batch_size_per_gpu', 'gradient_accumulation_steps', 'gradient_clipping',
         'optimizer', 'scheduler', 'fp16', 'bf16', 'bfloat16', 'torch_autocast')  # fmt: skip


def shipped_deepspeed_configs() -> dict[str, Path]:
    """Names and files of the configs that come with the package."""
    return {path.stem: path for path in sorted((config_root() / 'deepspeed').glob('*.json'))}


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed config by its shipped name, such as `deepspeed_zero2`, or from a .json file.

    Raises:
        ConfigError: there is neither, the file cannot be read, or it names no ZeRO stage from 1 to 3.
    """
    shipped = shipped_deepspeed_configs()
    path = shipped.get(name, Path(name))
    if name not in shipped and not (path.suffix == '.json' and path.is_file()):
        known = ['auto', *STRATEGIES[:3], *shipped]
        hint = nearest(name, known) or f'; known: {", ".join(known)}, or a DeepSpeed .json'
        raise ConfigError(f'`parallel.strategy` is {name!r}, which is no strategy and no file{hint}')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        stage = content['zero_optimization']['stage']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path}: no DeepSpeed config with a `zero_optimization.stage`: {error!r}') from error
    if stage not in (1, 2, 3):
        raise ConfigError(f'{path}: `zero_optimization.stage` is {stage!r}, must be 1, 2 or 3; use ddp for none')
    return {key: value for key, value in content.items() if key not in _OURS}


def stage_of(strategy: str) -> str:
    """Which of `STRATEGIES` a name or file stands for: 'deepspeed_zero2' for 'deepspeed_zero2_offload'."""
    if strategy in STRATEGIES:
        return strategy
    return f'deepspeed_zero{read_deepspeed_config(strategy)["zero_optimization"]["stage"]}'
