"""Writing weights block by block into .safetensors shards that are planned before the first byte.

A shard is written under another name, flushed, and renamed; so those that have their names are whole, and a run that
was interrupted goes on after them. The index comes last.

    model-00001-of-00008.safetensors.part  ->  model-00001-of-00008.safetensors  ...  ->  model.safetensors.index.json
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from xtuner.errors import ModelError
from xtuner.model.weights import DTYPES

logger = logging.getLogger('xtuner')

BLOCK_ELEMENTS = 2**20  # of a block: 4 MB in float32, which stays in a processor's cache and in the C library's heap
_BLOCKS_AHEAD = 4  # computed while one is written
_SYNC_BYTES = 2**28  # written between two flushes, so that the last one is short
_REPORT_SECONDS = 5.0
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Blocks = Callable[[TensorPlan], Iterable[Tensor]]
"""Gives a planned tensor's values: consecutive blocks of rows, in its dtype, on the CPU."""


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `BLOCK_ELEMENTS` elements; a tensor without dimensions is one row."""
    num_rows = shape[0] if shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def write_weights(folder: Path, plans: Sequence[TensorPlan], max_shard_bytes: int, blocks: Blocks) -> int:
    """Writes `model.safetensors`, or numbered shards and their index; goes on after the shards that are there.

    Args:
        folder: Where the files go; exists. What an earlier call with the same plans wrote there is kept.
        plans: The tensors in the order in which they are written.
        max_shard_bytes: Most bytes of tensors in one file, unless one tensor alone is larger.
        blocks: Gives a tensor's values. It runs in this thread while another writes.

    Returns:
        The bytes of all tensors.

    Raises:
        ModelError: the disk has not enough space.
        OSError: the file system refuses.
    """
    shards = list(_into_shards(plans, max_shard_bytes))
    files = [_file_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    todo = [(folder / file, shard) for file, shard in zip(files, shards, strict=True) if not (folder / file).is_file()]
    total = sum(plan.nbytes for _, shard in todo for plan in shard)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(f'{folder.parent} has {free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are to be written')
    if len(todo) < len(shards):
        logger.info('going on after %d of %d shards of an interrupted run', len(shards) - len(todo), len(shards))
    progress = _Progress(total)
    for path, shard in todo:
        _write_shard(path, shard, blocks, progress)
    num_bytes = sum(plan.nbytes for plan in plans)
    if len(shards) > 1:
        weight_map = {plan.name: file for file, shard in zip(files, shards, strict=True) for plan in shard}
        index = {'metadata': {'total_size': num_bytes}, 'weight_map': weight_map}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')
    return num_bytes


class _Progress:
    """A line in the log now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._reported = time.perf_counter()

    def add(self, num_bytes: int) -> None:
        """Counts what was written."""
        self._done += num_bytes
        now = time.perf_counter()
        if now - self._reported > _REPORT_SECONDS or self._done == self._total:
            self._reported = now
            speed = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / speed
            logger.info(
                '%.1f of %.1f GB, %.0f MB/s, eta %.0f s', self._done / 1e9, self._total / 1e9, speed / 1e6, left
            )


def _write_shard(path: Path, shard: Sequence[TensorPlan], blocks: Blocks, progress: _Progress) -> None:
    part = path.with_name(f'{path.name}.part')
    with part.open('wb') as file, ThreadPoolExecutor(1, 'write-weights') as pool:
        pending: deque[Future[None]] = deque([pool.submit(_append, file, _header(shard))])
        unsynced = 0
        for plan in shard:
            written = 0
            for block in blocks(plan):
                assert block.dtype == plan.dtype, f'{plan.name}: {block.dtype} is not {plan.dtype}'
                pending.append(pool.submit(_append, file, _bytes(block)))
                written += block.nbytes
                unsynced += block.nbytes
                if unsynced > _SYNC_BYTES:
                    pending.append(pool.submit(_sync, file))
                    unsynced = 0
                while len(pending) > _BLOCKS_AHEAD:
                    pending.popleft().result()
                progress.add(block.nbytes)
            assert written == plan.nbytes, f'{plan.name}: {written} bytes came, {plan.nbytes} were planned'
        pending.append(pool.submit(_sync, file))
        for future in pending:
            future.result()
    part.rename(path)


def _into_shards(plans: Iterable[TensorPlan], max_shard_bytes: int) -> Iterator[list[TensorPlan]]:
    """Plans by file; within one, wider elements come first, so that each tensor begins at a multiple of its own."""
    shard: list[TensorPlan] = []
    size = 0
    for plan in plans:
        if shard and size + plan.nbytes > max_shard_bytes:
            yield sorted(shard, key=lambda p: -p.dtype.itemsize)
            shard, size = [], 0
        shard.append(plan)
        size += plan.nbytes
    if shard:
        yield sorted(shard, key=lambda p: -p.dtype.itemsize)


def _file_name(number: int, count: int) -> str:
    return 'model.safetensors' if count == 1 else f'model-{number:05d}-of-{count:05d}.safetensors'


def _header(shard: Sequence[TensorPlan]) -> memoryview:
    """The head of a .safetensors file: its length in 8 bytes, then JSON, filled up with spaces to a multiple of 8."""
    entries: dict[str, object] = {'__metadata__': {'format': 'pt'}}
    offset = 0
    for plan in shard:
        end = offset + plan.nbytes
        entries[plan.name] = {'dtype': _NAMES[plan.dtype], 'shape': list(plan.shape), 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, 'little') + text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _append(file: BinaryIO, data: memoryview) -> None:
    file.write(data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
