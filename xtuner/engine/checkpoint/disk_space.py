"""Disk space of checkpoints, checked before a run and before each save."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from xtuner.errors import CheckpointError
from xtuner.utils.units import gib

OVERHEAD_BYTES = 5 * 2**20
"""Size of a checkpoint besides weights and moments: tokenizer, settings, manifest. InternLM's take 4.5 MB."""


def checkpoint_bytes(trained: Iterable[torch.Tensor], optimizer_state: Mapping[Any, Any] | None = None) -> int:
    """Maximum disk space of a checkpoint in bytes.

    Args:
        trained: The trained parameters, written in their own dtype.
        optimizer_state: `optimizer.state`; None or empty, as before the first step, counts two float32 moments.
    """
    parameters = list(trained)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    moments = sum(_tensor_bytes(state) for state in (optimizer_state or {}).values())
    return weights + (moments or 2 * 4 * sum(p.numel() for p in parameters)) + OVERHEAD_BYTES


def check_space(work_dir: Path, needed: int, what: str) -> None:
    """Compares the free space of a folder, which need not exist yet, with what is needed.

    Raises:
        CheckpointError: There is too little; says how much, and what would help.
    """
    folder = work_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f'{work_dir} has {gib(free)} free, but {what} need up to {gib(needed)}; '
            'free some, lower checkpoint.max_keep, or choose another --work-dir'
        )


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return 0
