"""A checkpoint of mmengine or DeepSpeed, as classical xtuner wrote them: read as data, never run.

    iter_500.pth                              mmengine: {'state_dict': ..., 'meta': ..., 'message_hub': ...}
    iter_500.pth/mp_rank_00_model_states.pt   DeepSpeed, ZeRO 1 and 2: {'module': ...}

Everything goes through torch's weights-only reader, which knows tensors and plain containers. Of what mmengine keeps
beside them, the records of a run, nothing is read: each name in them stands for an object that forgets what it is
given. Whatever else a file names is refused.
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


class _Record:
    """Stands for whatever is no weight: takes any arguments and any state, and keeps none."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Forgets it."""


_BEGINNINGS = (b'P', b'\x80', b'')  # of a zip archive, as torch writes; of a pickle, as before 1.6; of an empty file
_DEEPSPEED = 'mp_rank_00_model_states.pt'


def read_old_checkpoint(path: Path) -> dict[str, Tensor]:
    """The language model's tensors of a checkpoint, memory-mapped, without the `llm.` in front of their names.

    Args:
        path: A `.pth` file, or the folder that DeepSpeed writes in its place.

    Raises:
        CheckpointError: nothing there, a damaged file, one that holds code, or one that keeps its weights elsewhere.
    """
    file = path
    if path.is_dir():
        file = path / _DEEPSPEED
        if not file.is_file():
            raise CheckpointError(f'{path}: no {_DEEPSPEED} in that folder; give a .pth file or a DeepSpeed folder')
        if len(list(path.glob('mp_rank_*_model_states.pt'))) > 1:
            raise CheckpointError(f'{path}: its weights are cut over tensor-parallel ranks, which is not read')
        if list(path.glob('zero_pp_rank_*_model_states.pt')):
            raise CheckpointError(f'{path}: ZeRO 3 has cut its weights over the ranks; join them with the '
                                  'zero_to_fp32.py that DeepSpeed wrote there, and give its result')  # fmt: skip
    content = _load(file)
    for key in ('module', 'state_dict'):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f'{file}: no weights in it (neither `state_dict` nor `module`)')
    return _language_model(file, content)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f'{file}: no such file')
    with file.open('rb') as opened:
        beginning = opened.read(1)
    if beginning not in _BEGINNINGS:
        raise CheckpointError(f'{file} is no checkpoint: torch wrote it in none of its forms; give iter_N.pth, or the '
                              'folder that DeepSpeed writes')  # fmt: skip
    try:
        with torch.serialization.safe_globals(_records()):
            try:
                return torch.load(file, map_location='cpu', weights_only=True, mmap=True)
            except RuntimeError as error:  # a file of torch before 1.6 cannot be memory-mapped
                if 'mmap' not in str(error):
                    raise
                return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if 'GLOBAL' in line), first_line(error))
        raise CheckpointError(
            f'{file} was refused, and nothing of it was run: beside weights it holds something that only its own code '
            f'can read ({reason.strip()})'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f'{file} is damaged or cut off: {first_line(error)}') from error


def _records() -> list[Any]:
    """For each name that mmengine's records of a run mention, ours in its place."""
    arrays = (f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar'))
    names = ('mmengine.logging.history_buffer.HistoryBuffer', 'numpy.ndarray', 'numpy.dtype', *arrays)
    # A HistoryBuffer lists its own methods, by `getattr`: to allow the real one would be to allow everything.
    return [(_Record, name) for name in (*names, 'builtins.getattr', '__builtin__.getattr', 'getattr')]


def _language_model(file: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under `llm.`; a checkpoint of more than a language model is refused."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = re.sub(r'^(module\.)?(llm\.)?', '', str(key))
        if re.match(r'(projector|visual_encoder)\.', name):
            raise CheckpointError(f'{file}: {key} belongs to a model that sees images; only language models are read')
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f'{file}: {key} is no tensor')
        if not tensor.numel():
            raise CheckpointError(f'{file}: {key} is empty: the weights are in other files (ZeRO 3)')
        found[name] = tensor
    return found
