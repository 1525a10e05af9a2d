"""Reads weights from disk tensor by tensor, without unpickling code.

A folder contains `.safetensors` or `.bin` files, one or several with an index:

    model.safetensors            pytorch_model.bin
    model.safetensors.index.json + shards      pytorch_model.bin.index.json + shards

`.bin` files are read by torch's weights-only reader, which supports only tensors.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xtuner.errors import ModelError, first_line, first_of, one_line
from xtuner.model.weights.offsets import ByteRange, bin_ranges, safetensors_ranges
from xtuner.utils.fields import Field, check_fields, shown
from xtuner.utils.files import check_regular, read_object

_SINGLE = ('model.safetensors', 'pytorch_model.bin')
_INDEX = '.index.json'
_MAX_FILE_NAME = 255
_INDEX_FIELDS = {'weight_map': Field(dict[str, str])}
# Buffers that some published checkpoints contain although they are computed from the config.
_STRAY_SUFFIXES = ('rotary_emb.inv_freq',)
_SAMPLE_LENGTH = 512  # elements that the fingerprint reads at each of three positions
# safetensors' dtype names.
DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
    'F8_E4M3': torch.float8_e4m3fn, 'F8_E5M2': torch.float8_e5m2,
}  # fmt: skip


class WeightReader:
    """The tensors of a checkpoint folder by name; thread-safe. Created by `open_weights`.

    Args:
        folder: The checkpoint's folder.
        files: The file of each tensor.
    """

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self.folder = folder
        self._files = files
        self._open: dict[Path, Any] = {}
        self._headers: dict[Path, dict[str, ByteRange]] = {}
        self._raw: dict[tuple[Path, int], Any] = {}

    def names(self) -> list[str]:
        """Names of all tensors, file by file, without stray buffers."""
        return [name for name in self._files if not name.endswith(_STRAY_SUFFIXES)]

    def file(self, name: str) -> Path:
        """The file that contains a tensor.

        Raises:
            ModelError: There is no such tensor.
        """
        if name not in self._files:
            raise ModelError(f'{self.folder} has no tensor {name!r}')
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """Reads a tensor to the CPU, in its own dtype; memory-mapped if the format allows it.

        Raises:
            ModelError: There is no such tensor, or its file is damaged.
        """
        return self._look(name, lambda source: source.get_tensor(name), lambda tensor: tensor)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Copies rows `start` to `stop` of a tensor, so that a model can be read in blocks.

        Raises:
            ModelError: As `read`.
        """
        path, shape = self.file(name), self.shape(name)
        byte_range = self._ranges(path).get(name)
        if byte_range is None or not shape:
            return self.read(name)[start:stop].clone() if shape else self.read(name).clone()
        stop = shape[0] if stop is None else min(stop, shape[0])
        start = min(start, stop)
        rows = torch.empty((stop - start, *shape[1:]), dtype=self.dtype(name))
        if rows.numel():
            begin = byte_range[0] + start * math.prod(shape[1:]) * rows.element_size()
            self._read_into(path, begin, rows.view(-1).view(torch.uint8).numpy().data)
        return rows

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it; raises as `read`."""
        return tuple(self._look(name, lambda source: source.get_slice(name).get_shape(), lambda tensor: tensor.shape))

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it; raises as `read`."""

        def in_safetensors(source: Any) -> torch.dtype:
            """Looks up the dtype in the file's header."""
            kind = source.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise ModelError(f'{self.file(name)}: tensor {name!r} has dtype {kind}, which is not supported')
            return DTYPES[kind]

        return self._look(name, in_safetensors, lambda tensor: tensor.dtype)

    def sample(self, name: str) -> bytes:
        """Raw bytes from a tensor's start, middle and end, for the fingerprint.

        Raises:
            ModelError: There is no such tensor.
        """
        path, size = self.file(name), self.dtype(name).itemsize
        num_elements = math.prod(self.shape(name))
        starts = sorted({0, num_elements // 2, max(0, num_elements - _SAMPLE_LENGTH)})
        if path.suffix != '.safetensors':
            flat = self.read(name).reshape(-1)
            parts = [flat[start : start + _SAMPLE_LENGTH].contiguous() for start in starts]
            return b''.join(part.view(torch.uint8).numpy().tobytes() for part in parts if part.numel())
        begin, end = self._ranges(path)[name]
        with path.open('rb') as file:  # safetensors' own slices cost milliseconds each
            parts_read = []
            for start in starts:
                file.seek(begin + start * size)
                parts_read.append(file.read(min(_SAMPLE_LENGTH * size, end - begin - start * size)))
        return b''.join(parts_read)

    def _read_into(self, path: Path, begin: int, buffer: memoryview) -> None:
        """Fills the buffer from a file; unlike a mapping, this keeps no pages of the file in the process."""
        key = (path, threading.get_ident())  # each thread has its own file position
        try:
            if key not in self._raw:
                self._raw[key] = path.open('rb', buffering=0)
            file = self._raw[key]
            file.seek(begin)
            while buffer:
                length = file.readinto(buffer)
                if not length:
                    raise ModelError(f'{path} is truncated: it ends within a tensor')
                buffer = buffer[length:]
        except OSError as error:
            raise ModelError(f'{path} cannot be read: {error.strerror or error}') from error

    def _ranges(self, path: Path) -> dict[str, ByteRange]:
        """Byte ranges of a file's tensors, where known."""
        if path not in self._headers:
            safe = path.suffix == '.safetensors'
            self._headers[path] = safetensors_ranges(path) if safe else bin_ranges(path, self._source(path))
        return self._headers[path]

    def _look(self, name: str, in_safetensors: Callable[[Any], Any], in_bin: Callable[[Tensor], Any]) -> Any:
        path = self.file(name)
        try:
            source = self._source(path)
            return in_safetensors(source) if path.suffix == '.safetensors' else in_bin(source[name])
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f'{path}: tensor {name!r} cannot be read: {one_line(error)}') from error

    def _source(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_file(path)
        return self._open[path]


def open_weights(folder: Path) -> WeightReader:
    """Opens a checkpoint folder and all of its files, so that a damaged one is detected at once.

    Raises:
        ModelError: No weights, a missing or damaged shard, or a file with anything but tensors.
    """
    folder = Path(folder)
    for name in _SINGLE:
        index, single = folder / (name + _INDEX), folder / name
        if index.exists():
            return WeightReader(folder, _indexed(folder, index))
        if single.exists():
            return WeightReader(folder, dict.fromkeys(file_names(open_file(single)), single))
    if not folder.is_dir():
        raise ModelError(f'{folder}: no such folder')
    raise ModelError(f'{folder} contains no weights: neither {" nor ".join(_SINGLE)}, nor an index of shards')


def open_file(path: Path) -> Any:
    """Opens a file's tensors: safetensors' own reader, or a dict of memory-mapped tensors for a `.bin`.

    Raises:
        ModelError: The file is missing, damaged, or contains anything but tensors.
    """
    if not path.exists():
        raise ModelError(f'{path} is missing')
    check_regular(path, ModelError)
    if path.suffix == '.safetensors':
        try:
            return safe_open(path, 'pt')
        except (SafetensorError, OSError) as error:
            raise ModelError(f'{path} is damaged or truncated: {error}') from error
    try:
        try:
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except RuntimeError as error:  # files of torch before 1.6 cannot be memory-mapped
            if 'mmap' not in str(error):
                raise
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error)
        raise ModelError(f'{path} was rejected: it contains objects other than tensors ({reason})') from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f'{path} is damaged or truncated: {first_line(error)}') from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f'{path} was rejected: it is not a plain dict of tensors')
    return content


def file_names(source: Any) -> list[str]:
    """Tensor names in the result of `open_file`."""
    return list(source.keys())


def fingerprint(reader: WeightReader) -> str:
    """A hash that identifies a model's weights quickly.

    It covers every tensor's name, shape and dtype, and raw bytes from its start, middle and end; it is the same for the
    same weights in `.bin` and `.safetensors`, in one file or several.
    """
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        digest.update(f'{name} {reader.shape(name)} {reader.dtype(name)}'.encode())
        digest.update(reader.sample(name))
    return digest.hexdigest()


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """Maps each tensor to its file by the index, including tensors that the index does not list."""
    content = read_object(index, ModelError)
    check_fields(content, _INDEX_FIELDS, index, ModelError)
    if 'weight_map' not in content:
        raise ModelError(f'{index} cannot be read: `weight_map` is missing')
    for file in content['weight_map'].values():
        if not file.isprintable() or len(file) > _MAX_FILE_NAME:
            raise ModelError(f'{index}: `weight_map` names {shown(file)}, which is not a file name')
    files = {name: folder / Path(file).name for name, file in content['weight_map'].items()}
    for path in sorted(set(files.values())):
        expected = [name for name, file in files.items() if file == path]
        try:
            stored = file_names(open_file(path))
        except ModelError as error:
            raise ModelError(f'{error}; {index.name} lists it for {first_of(expected)}') from error
        if missing := sorted(set(expected) - set(stored)):
            raise ModelError(f'{path} lacks tensor {missing[0]!r}, which {index.name} lists for it')
        files |= dict.fromkeys((name for name in stored if name not in files), path)
    return files
