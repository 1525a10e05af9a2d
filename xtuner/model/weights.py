"""Weights on disk, read one tensor at a time and never unpickled as code.

A folder holds `.safetensors` or `.bin` files, one or several with an index:

    model.safetensors            pytorch_model.bin
    model.safetensors.index.json + shards      pytorch_model.bin.index.json + shards

`.bin` files go through torch's weights-only reader, which knows tensors and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xtuner.errors import ModelError

_SINGLE = ('model.safetensors', 'pytorch_model.bin')
_INDEX = '.index.json'
# Buffers that some published checkpoints carry although they are computed from the config.
_STRAY_SUFFIXES = ('rotary_emb.inv_freq',)
_SAMPLE_BYTES = 1024


class WeightReader:
    """The tensors of a checkpoint folder, by name. Made by `open_weights`.

    Args:
        folder: The checkpoint's folder.
        files: For each tensor name, the file that holds it, where an index says so.
    """

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self.folder = folder
        self._files = files
        self._open: dict[Path, Any] = {}

    def names(self) -> list[str]:
        """Names of all tensors, file by file, stray buffers left out."""
        return [name for name in self._files if not name.endswith(_STRAY_SUFFIXES)]

    def file(self, name: str) -> Path:
        """The file that holds a tensor.

        Raises:
            ModelError: there is no such tensor.
        """
        if name not in self._files:
            raise ModelError(f'{self.folder} has no tensor {name!r}')
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its own dtype; memory-mapped where the file allows it.

        Raises:
            ModelError: there is no such tensor, or its file is damaged.
        """
        path = self.file(name)
        try:
            source = self._source(path)
            return source.get_tensor(name) if path.suffix == '.safetensors' else source[name]
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f'{path}: tensor {name!r} cannot be read: {error}') from error

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        path = self.file(name)
        source = self._source(path)
        return tuple(source.get_slice(name).get_shape() if path.suffix == '.safetensors' else source[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self.read(name).dtype

    def _source(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_file(path)
        return self._open[path]


def open_weights(folder: Path) -> WeightReader:
    """Opens a checkpoint folder; every file that it names is looked at, so that a torn one is found at once.

    Raises:
        ModelError: no weights there, a shard is missing or torn, or a file holds anything but tensors.
    """
    folder = Path(folder)
    for name in _SINGLE:
        index, single = folder / (name + _INDEX), folder / name
        if index.is_file():
            return WeightReader(folder, _indexed(folder, index))
        if single.is_file():
            return WeightReader(folder, dict.fromkeys(file_names(open_file(single)), single))
    if not folder.is_dir():
        raise ModelError(f'{folder}: no such folder')
    raise ModelError(f'{folder} holds no weights: neither {" nor ".join(_SINGLE)}, nor an index of shards')


def open_file(path: Path) -> Any:
    """A file's tensors: safetensors' own reader, or a dict of memory-mapped tensors for a `.bin`.

    Raises:
        ModelError: the file is missing, torn, or holds anything but tensors.
    """
    if not path.is_file():
        raise ModelError(f'{path} is missing')
    if path.suffix == '.safetensors':
        try:
            return safe_open(path, 'pt')
        except (SafetensorError, OSError) as error:
            raise ModelError(f'{path} is damaged or cut off: {error}') from error
    try:
        try:
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except RuntimeError as error:  # a file of torch before 1.6 cannot be memory-mapped
            if 'mmap' not in str(error):
                raise
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f'{path} was refused: it holds something else than tensors ({reason})') from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f'{path} is damaged or cut off: {str(error).splitlines()[0]}') from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f'{path} was refused: it is no plain table of tensors')
    return content


def file_names(source: Any) -> list[str]:
    """The tensor names of what `open_file` returned."""
    return list(source.keys())


def fingerprint(reader: WeightReader) -> str:
    """A hash that tells one model's weights from another's in little time.

    It takes every tensor's name, shape and dtype, and up to 1 KiB from each of its beginning, middle and end; so it is
    the same for the same weights in `.bin` and `.safetensors`, in one file or many.
    """
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        tensor = reader.read(name)
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        flat = tensor.reshape(-1)
        step = max(1, _SAMPLE_BYTES // tensor.element_size())
        for start in sorted({0, flat.numel() // 2, max(0, flat.numel() - step)}):
            digest.update(flat[start : start + step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f'{index} cannot be read: {error}') from error
    files = {name: folder / Path(file).name for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        held = set(file_names(open_file(path)))
        missing = next((name for name, file in files.items() if file == path and name not in held), None)
        if missing is not None:
            raise ModelError(f'{path} lacks tensor {missing!r}, which {index.name} says it holds')
    return files
