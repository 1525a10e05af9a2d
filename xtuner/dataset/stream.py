"""Packs straight from the sources, without a cache: for data that is larger than the disk, or that never ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from xtuner.config.schema import DatasetConfig
from xtuner.dataset.cache.fingerprint import digest
from xtuner.dataset.cache.store import join_samples
from xtuner.dataset.encode.conversation_encoder import Sample
from xtuner.dataset.packing.pack import pack_samples
from xtuner.dataset.prepare import encode_source, encoder_of
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.template import Template
from xtuner.errors import ConfigError


class PackStream(IterableDataset):
    """Yields packs in the order of the data, of which a window is looked at at a time.

    Items are those of `PreparedDataset`. Ranks, and the workers of a rank, read the same data and take turns in its
    packs; a resumed run passes `skip`, and reads past what it has seen.

    Args:
        config: The `dataset` section; weights and `val_ratio` need the whole data, so they cannot be.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        window: Conversations that are packed together: more fill better and cost memory.
        rank: This process, from 0.
        world_size: Processes that share the data.
        skip: Packs of this rank (or worker) to leave out at the beginning.

    Raises:
        ConfigError: For a weight or a `val_ratio`.
    """

    def __init__(
        self,
        config: DatasetConfig,
        *,
        tokenizer: Any,
        template: Template,
        window: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ) -> None:
        self.config = config
        self.sources = open_sources(config.source)
        if config.val_ratio or any(source.weight != 1 for source in self.sources):
            raise ConfigError(
                'a stream knows no `val_ratio` and no `weight`, which need the whole data; use `val_file`'
            )
        self.encoder = encoder_of(config, tokenizer, template)
        self.window = window
        self.rank, self.world_size, self.skip = rank, world_size, skip
        self.summary = Summary()

    @property
    def digest(self) -> str:
        """A hash of what the sources hold, as far as they tell without being read."""
        return digest(source.fingerprint() for source in self.sources)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        self.summary = Summary()
        yield from islice(self._packs(), self.rank * count + number + self.skip * self.world_size * count, None,
                          self.world_size * count)  # fmt: skip

    def num_packs(self) -> int:
        """Reads the data once and returns the packs of all ranks and workers together; fills `summary`."""
        self.summary = Summary()
        return sum(1 for _ in self._packs())

    def _packs(self) -> Iterator[dict[str, torch.Tensor]]:
        waiting: list[Sample] = []
        for source in self.sources:
            for chunk in encode_source(source, self.config, encoder=self.encoder, summary=self.summary):
                waiting += [sample for _, sample in chunk]
                if len(waiting) >= self.window:
                    yield from self._packed(waiting)
                    waiting = []
        yield from self._packed(waiting)

    def _packed(self, samples: list[Sample]) -> Iterator[dict[str, torch.Tensor]]:
        lengths = [len(sample.input_ids) for sample in samples]
        packs = pack_samples(lengths, self.config.max_length, packing=self.config.packing)
        for number in range(len(packs)):
            yield join_samples([samples[index] for index in packs[number]])
