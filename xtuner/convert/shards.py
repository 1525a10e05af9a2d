"""Writes weights block by block into .safetensors shards whose layout is planned in advance.

Since the position of each tensor is known, several threads write one tensor each, overlapping computation with I/O. A
shard is written under a temporary name, flushed and renamed, so that named shards are complete and an interrupted run
resumes after them. The index is written last.

    model-00001-of-00008.safetensors.part  ->  model-00001-of-00008.safetensors  ...  ->  model.safetensors.index.json
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from xtuner.convert.direct_io import DirectIOWriter
from xtuner.errors import ModelError
from xtuner.model.weights.reader import DTYPES
from xtuner.utils.progress import Progress
from xtuner.utils.units import gigabytes

logger = logging.getLogger('xtuner')

_MAX_THREADS = 4  # enough to keep a disk busy; each takes memory
_OPEN_SHARDS = 2  # so that no thread waits for the end of a shard
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, block: Tensor, *, wider: str = 'use --dtype bf16') -> Tensor:
        """Casts a block of values to the planned dtype.

        Args:
            block: The values.
            wider: Advice for values that the dtype cannot represent.

        Raises:
            ModelError: A value exceeds the range of float16.
        """
        if block.dtype == self.dtype:
            return block
        if block.dtype == torch.bfloat16:
            block = block.float()  # torch converts between 16-bit types several times slower
        cast = block.to(self.dtype)
        if self.dtype == torch.float16 and not cast.sum(dtype=torch.float32).isfinite():  # float32 holds any sum
            raise ModelError(f'{self.name} has values beyond the range of float16; {wider}')
        return cast


Blocks = Callable[[TensorPlan], Iterable[Tensor]]
"""Yields a planned tensor's values: consecutive blocks of rows, in its dtype, on the CPU. Called by several threads."""


def write_weights(folder: Path, plans: Sequence[TensorPlan], max_shard_bytes: int, blocks: Blocks) -> int:
    """Writes `model.safetensors`, or numbered shards and their index; skips shards that are already complete.

    Args:
        folder: The output folder; must exist. Output of an earlier call with the same plans is kept.
        plans: The tensors in writing order.
        max_shard_bytes: Maximum bytes of tensors per file, unless a single tensor is larger.
        blocks: Yields a tensor's values; called by several threads for different tensors.

    Returns:
        Total bytes of all tensors.

    Raises:
        ModelError: The disk has too little space.
        OSError: Writing fails.
    """
    shards = list(_into_shards(plans, max_shard_bytes))
    files = [_file_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    todo = [(folder / file, shard) for file, shard in zip(files, shards, strict=True) if not (folder / file).is_file()]
    total = sum(plan.nbytes for _, shard in todo for plan in shard)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(f'{folder.parent} has {gigabytes(free)} free but {gigabytes(total)} are needed')
    if len(todo) < len(shards):
        logger.info('resuming after %d of %d shards of an interrupted run', len(shards) - len(todo), len(shards))
    with Progress(total=total, desc='writing weights', unit='B') as progress:
        _write_shards(todo, blocks, progress)
    num_bytes = sum(plan.nbytes for plan in plans)
    if len(shards) > 1:
        weight_map = {plan.name: file for file, shard in zip(files, shards, strict=True) for plan in shard}
        index = {'metadata': {'total_size': num_bytes}, 'weight_map': weight_map}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')
    return num_bytes


class _Shard:
    """A shard that threads are writing under a temporary name."""

    def __init__(
        self, path: Path, plans: Sequence[TensorPlan], blocks: Blocks, progress: Progress, pool: ThreadPoolExecutor
    ) -> None:
        self._path, self._part = path, path.with_name(f'{path.name}.part')
        self._blocks, self._progress = blocks, progress
        header = _header(plans)
        self._file = DirectIOWriter(self._part, len(header) + sum(plan.nbytes for plan in plans))
        self._file.write(0, [header])
        positions = dict(zip(plans, accumulate((plan.nbytes for plan in plans), initial=len(header))))  # noqa: B905
        largest_first = sorted(plans, key=lambda plan: -plan.nbytes)  # so that no thread finishes late
        self._tensors = [pool.submit(self._write, plan, positions[plan]) for plan in largest_first]

    def finish(self) -> None:
        """Waits for all tensors, flushes the file and renames it."""
        for tensor in self._tensors:
            tensor.result()
        self._file.flush()
        self._file.close()
        self._part.rename(self._path)

    def close(self) -> None:
        """Closes the file; no thread may write afterwards."""
        self._file.close()

    def _write(self, plan: TensorPlan, position: int) -> None:
        self._file.write(position, self._pieces(plan))

    def _pieces(self, plan: TensorPlan) -> Iterator[memoryview]:
        written = 0
        for block in self._blocks(plan):
            assert block.dtype == plan.dtype, f'{plan.name}: {block.dtype} is not {plan.dtype}'
            yield _bytes(block)
            written += block.nbytes
            self._progress.update(block.nbytes)
        assert written == plan.nbytes, f'{plan.name}: got {written} bytes, planned {plan.nbytes}'


def _write_shards(todo: Sequence[tuple[Path, list[TensorPlan]]], blocks: Blocks, progress: Progress) -> None:
    """Writes the shards in order, starting the next one before the current one is finished."""
    unfinished: deque[_Shard] = deque()
    with _threads() as pool:
        try:
            for path, plans in todo:
                unfinished.append(_Shard(path, plans, blocks, progress, pool))
                if len(unfinished) == _OPEN_SHARDS:
                    unfinished[0].finish()
                    unfinished.popleft()
            while unfinished:
                unfinished[0].finish()
                unfinished.popleft()
        finally:
            pool.shutdown(cancel_futures=True)
            for shard in unfinished:
                shard.close()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that read, compute and write tensors: one more than compute threads, since one waits for the disk.

    Each runs torch single-threaded: for blocks of this size, torch's own threads would mostly wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MAX_THREADS, before) + 1, 'write-weights') as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _into_shards(plans: Iterable[TensorPlan], max_shard_bytes: int) -> Iterator[list[TensorPlan]]:
    """Groups plans into files; within a file wider elements come first, so that every tensor is aligned."""
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
    """The header of a .safetensors file: its length in 8 bytes, then JSON padded with spaces to a multiple of 8."""
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
