"""The trainer's state in a checkpoint: `trainer.json` for numbers, `trainer.safetensors` for tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from xtuner.errors import CheckpointError, one_line
from xtuner.utils.files import read_object

if TYPE_CHECKING:
    import torch  # imported where tensors are met: which checkpoints there are is asked before

STATE_FILE = 'trainer.json'
TENSORS_FILE = 'trainer.safetensors'
VALIDATION_LOSS = 'val_loss'
"""The key of a state under which its checkpoint's validation loss stands; None, or absent, where there is none."""
_FORMAT = 'format'
_VERSION = 1  # of the keys in a state; a state without one was written before there was a number, in the same form


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and JSON values."""
    from xtuner.model.weights.files import write_tensors

    tensors: dict[str, torch.Tensor] = {}
    content = _split({_FORMAT: _VERSION} | state, '', tensors)
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    write_tensors(tensors, folder / TENSORS_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer's state as `write_checkpoint` was given it, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or cannot be understood, or a newer version wrote it.
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
            f'{folder / STATE_FILE}: format {version!r}, and this version of xtuner reads format {_VERSION}; resume '
            'with the version that wrote it, or take its weights with --start-from'
        )
    return state


def validation_loss(folder: Path) -> float | None:
    """The validation loss that a checkpoint was written with; None where it had none, or cannot be read."""
    try:
        loss = dict(read_object(folder / STATE_FILE, CheckpointError)['dict']).get(VALIDATION_LOSS)
    except (CheckpointError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and loss == loss else None


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a nested state; a tensor goes to `tensors` and leaves its name behind."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {'tensor': path}
    if isinstance(value, dict):  # a list of pairs keeps keys that are no text
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
