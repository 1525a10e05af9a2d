"""Writing weights as they come: full shards go to disk, the index is written at the end."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class ShardWriter:
    """Writes `model.safetensors`, or numbered shards and their index, holding one shard in memory.

    Args:
        folder: Where the files go; exists.
        max_shard_bytes: Most bytes of one file, unless one tensor alone is larger.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._max_shard_bytes = folder, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the next tensor; may write a shard."""
        size = sum(pending.nbytes for pending in self._pending.values())
        if self._pending and size + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is left and gives the shards their published names."""
        if self._pending:
            self._flush()
        if len(self._shards) == 1:
            self._part(1).rename(self._folder / 'model.safetensors')
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = f'model-{number:05d}-of-{len(self._shards):05d}.safetensors'
            self._part(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {'metadata': {'total_size': self.num_bytes}, 'weight_map': weight_map}
        (self._folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        save_file(self._pending, self._part(len(self._shards)), metadata={'format': 'pt'})
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._folder / f'part-{number:05d}.safetensors'
