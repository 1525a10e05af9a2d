"""Writing weights block by block into .safetensors shards that are planned before the first byte.

Where each tensor lies is known, so several threads write, a tensor each: what one computes another reads or writes
meanwhile. A shard is written under another name, flushed, and renamed; so those that have their names are whole, and a
run that was interrupted goes on after them. The index comes last.

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

_MOST_THREADS = 4  # keep a disk busy; each takes memory
_OPEN_SHARDS = 2  # so that no thread waits for the end of a shard
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

    def cast(self, block: Tensor, *, wider: str = 'use --dtype bf16') -> Tensor:
        """Some of its values in its dtype.

        Args:
            block: The values.
            wider: What to do where its dtype is too narrow.

        Raises:
            ModelError: a value is beyond what float16 holds.
        """
        if block.dtype == self.dtype:
            return block
        if block.dtype == torch.bfloat16:
            block = block.float()  # torch converts between 16-bit types several times slower
        cast = block.to(self.dtype)
        if self.dtype == torch.float16 and not cast.sum(dtype=torch.float32).isfinite():  # room for any block's sum
            raise ModelError(f'{self.name} has values that float16 cannot hold; {wider}')
        return cast


Blocks = Callable[[TensorPlan], Iterable[Tensor]]
"""Gives a planned tensor's values: consecutive blocks of rows, in its dtype, on the CPU. Several threads call it."""


def write_weights(folder: Path, plans: Sequence[TensorPlan], max_shard_bytes: int, blocks: Blocks) -> int:
    """Writes `model.safetensors`, or numbered shards and their index; goes on after the shards that are there.

    Args:
        folder: Where the files go; exists. What an earlier call with the same plans wrote there is kept.
        plans: The tensors in the order in which they are written.
        max_shard_bytes: Most bytes of tensors in one file, unless one tensor alone is larger.
        blocks: Gives a tensor's values; a few threads call it, each for another tensor.

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
        raise ModelError(f'{folder.parent} has {gigabytes(free)} free, {gigabytes(total)} are to be written')
    if len(todo) < len(shards):
        logger.info('going on after %d of %d shards of an interrupted run', len(shards) - len(todo), len(shards))
    with Progress(total=total, desc='writing weights', unit='B') as progress:
        _write_shards(todo, blocks, progress)
    num_bytes = sum(plan.nbytes for plan in plans)
    if len(shards) > 1:
        weight_map = {plan.name: file for file, shard in zip(files, shards, strict=True) for plan in shard}
        index = {'metadata': {'total_size': num_bytes}, 'weight_map': weight_map}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')
    return num_bytes


class _Shard:
    """A file that threads are writing, under another name."""

    def __init__(
        self, path: Path, plans: Sequence[TensorPlan], blocks: Blocks, progress: Progress, pool: ThreadPoolExecutor
    ) -> None:
        self._path, self._part = path, path.with_name(f'{path.name}.part')
        self._blocks, self._progress = blocks, progress
        header = _header(plans)
        self._file = DirectIOWriter(self._part, len(header) + sum(plan.nbytes for plan in plans))
        self._file.write(0, [header])
        places = dict(zip(plans, accumulate((plan.nbytes for plan in plans), initial=len(header))))  # noqa: B905
        largest_first = sorted(plans, key=lambda plan: -plan.nbytes)  # so that no thread is left alone with one
        self._tensors = [pool.submit(self._write, plan, places[plan]) for plan in largest_first]

    def finish(self) -> None:
        """Waits for all tensors, flushes the file, and gives it its name."""
        for tensor in self._tensors:
            tensor.result()
        self._file.flush()
        self._file.close()
        self._part.rename(self._path)

    def close(self) -> None:
        """Gives the file up; no thread may write any more."""
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
        assert written == plan.nbytes, f'{plan.name}: {written} bytes came, {plan.nbytes} were planned'


def _write_shards(todo: Sequence[tuple[Path, list[TensorPlan]]], blocks: Blocks, progress: Progress) -> None:
    """Writes the shards in their order; the next one has begun when one is finished."""
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
    """Threads for reading, computing and writing tensors, one more than may compute, since one waits for the disk.

    Each computes alone: on blocks of this size, torch's own threads would spend most of their time waiting for each
    other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MOST_THREADS, before) + 1, 'write-weights') as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


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
