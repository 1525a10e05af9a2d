"""The trainer's state in a checkpoint: `trainer.json` for numbers, `trainer.safetensors` for tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from xtuner.errors import CheckpointError, one_line
from xtuner.utils.files import read_object

if TYPE_CHECKING:
    import torch  # imported lazily, since checkpoints are listed before torch is needed

STATE_FILE = 'trainer.json'
TENSORS_FILE = 'trainer.safetensors'
VALIDATION_LOSS = 'val_loss'
"""Key of the validation loss in a checkpoint's state; None or absent if there is none."""
_FORMAT = 'format'
_VERSION = 1  # version of the state's keys; a state without a version has the same format


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and JSON values."""
    from xtuner.model.weights.files import write_tensors

    tensors: dict[str, torch.Tensor] = {}
    content = _split({_FORMAT: _VERSION} | state, '', tensors)
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    write_tensors(tensors, folder / TENSORS_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the state passed to `write_checkpoint`, with tensors on the CPU.

    Raises:
        CheckpointError: A file is missing or invalid, or was written by a newer version.
    """
    from safetensors.torch import load_file

    try:
        content = read_object(folder / STATE_FILE, CheckpointError)
        state = _join(content, load_file(folder / TENSORS_FILE))
        version = state.pop(_FORMAT, _VERSION)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f'{folder}: the trainer state cannot be read: {one_line(error)}') from error
    if version != _VERSION:
        raise CheckpointError(
            f'{folder / STATE_FILE}: format {version!r}, but this version of xtuner reads format {_VERSION}; resume '
            'with the version that wrote it, or use its weights with --start-from'
        )
    return state


def validation_loss(folder: Path) -> float | None:
    """The validation loss recorded in a checkpoint; None if there is none or it cannot be read."""
    try:
        loss = dict(read_object(folder / STATE_FILE, CheckpointError)['dict']).get(VALIDATION_LOSS)
    except (CheckpointError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and loss == loss else None


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Converts a nested state to JSON; tensors are moved to `tensors` and replaced by their names."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {'tensor': path}
    if isinstance(value, dict):  # a list of pairs preserves keys that are not strings
        return {'dict': [[key, _split(item, f'{path}/{key}', tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = 'tuple' if isinstance(value, tuple) else 'list'
        return {kind: [_split(item, f'{path}/{i}', tensors) for i, item in enumerate(value)]}
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split`."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == 'tensor':
        return tensors[content]
    if kind == 'dict':
        return {key: _join(item, tensors) for key, item in content}
    items = [_join(item, tensors) for item in content]
    return tuple(items) if kind == 'tuple' else items
