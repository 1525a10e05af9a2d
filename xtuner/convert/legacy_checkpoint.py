"""Reads checkpoints of classical xtuner (mmengine or DeepSpeed) as data, without running code from them.

    iter_500.pth                              mmengine: {'state_dict': ..., 'meta': ..., 'message_hub': ...}
    iter_500.pth/mp_rank_00_model_states.pt   DeepSpeed, ZeRO 1 and 2: {'module': ...}

Everything goes through torch's weights-only reader, which supports tensors and plain containers. mmengine's run records
in the file are not read: each class named in them is replaced by one that discards its contents. Any other class is
rejected.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import CheckpointError, first_line


class _Discarded:
    """Placeholder for objects that are not weights: accepts any arguments and state and discards them."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Discards the state."""


_FIRST_BYTES = (b'P', b'\x80', b'')  # a zip archive (torch's format), a pickle (before torch 1.6), an empty file
_DEEPSPEED = 'mp_rank_00_model_states.pt'


def read_old_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the language model's tensors of a checkpoint, memory-mapped, without the `llm.` prefix of their names.

    Args:
        path: A `.pth` file, or the folder that DeepSpeed writes instead.

    Raises:
        CheckpointError: The file is missing, damaged, contains code, or does not contain the weights itself.
    """
    file = path
    if path.is_dir():
        file = path / _DEEPSPEED
        if not file.is_file():
            raise CheckpointError(f'{path}: no {_DEEPSPEED} in that folder; give a .pth file or a DeepSpeed folder')
        if len(list(path.glob('mp_rank_*_model_states.pt'))) > 1:
            raise CheckpointError(f'{path}: tensor-parallel checkpoints are not supported')
        if list(path.glob('zero_pp_rank_*_model_states.pt')):
            raise CheckpointError(f'{path}: the weights are sharded by ZeRO 3; join them with the '
                                  'zero_to_fp32.py that DeepSpeed wrote there, and convert its result')  # fmt: skip
    content = _load(file)
    for key in ('module', 'state_dict'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f'{file}: contains no weights (neither `state_dict` nor `module`)')
    return _language_model(file, content)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f'{file}: no such file')
    with file.open('rb') as opened:
        first_byte = opened.read(1)
    if first_byte not in _FIRST_BYTES:
        raise CheckpointError(f'{file} is not a checkpoint: not in a format of torch.save; name iter_N.pth, or the '
                              'folder that DeepSpeed writes')  # fmt: skip
    try:
        with torch.serialization.safe_globals(_allowed_classes()):
            try:
                return torch.load(file, map_location='cpu', weights_only=True, mmap=True)
            except RuntimeError as error:  # files of torch before 1.6 cannot be memory-mapped
                if 'mmap' not in str(error):
                    raise
                return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if 'GLOBAL' in line), first_line(error))
        raise CheckpointError(
            f'{file} was rejected without running any of it: besides weights it contains objects of other classes '
            f'({reason.strip()})'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f'{file} is damaged or truncated: {first_line(error)}') from error


def _allowed_classes() -> list[Any]:
    """For each class named in mmengine's run records, a placeholder instead of it."""
    arrays = (f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar'))
    names = ('mmengine.logging.history_buffer.HistoryBuffer', 'numpy.ndarray', 'numpy.dtype', *arrays)
    # A HistoryBuffer references its own methods by `getattr`; allowing the real getattr would allow any code.
    return [(_Discarded, name) for name in (*names, 'builtins.getattr', '__builtin__.getattr', 'getattr')]


def _language_model(file: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors under `llm.`; rejects checkpoints of multimodal models."""
    weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = re.sub(r'^(module\.)?(llm\.)?', '', str(key))
        if re.match(r'(projector|visual_encoder)\.', name):
            raise CheckpointError(f'{file}: {key} belongs to a vision-language model; only language models are read')
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f'{file}: {key} is not a tensor')
        if not tensor.numel():
            raise CheckpointError(f'{file}: {key} is empty: the weights are in other files (ZeRO 3)')
        weights[name] = tensor
    return weights
