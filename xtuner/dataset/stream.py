"""Streams packs from the sources without a cache, for data that is larger than the disk or unbounded."""

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
    """Yields packs in data order, packing one window of conversations at a time.

    Items are those of `PreparedDataset`. All ranks, and the workers of a rank, read the same data and take turns in its
    packs; a resumed run passes `skip` and reads past the packs that it has used.

    Args:
        config: The `dataset` section without weights and `val_ratio`, which need the whole data.
        tokenizer: A transformers tokenizer.
        template: The prompt format.
        window: Conversations that are packed together: more fill packs better and take more memory.
        rank: Rank of this process, from 0.
        world_size: Number of processes that share the data.
        skip: Packs of this rank (or worker) to skip at the start.

    Raises:
        ConfigError: A weight or `val_ratio` is set.
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
                'a stream supports neither `val_ratio` nor `weight`, which need the whole data; use `val_file`'
            )
        self.encoder = encoder_of(config, tokenizer, template)
        self.window = window
        self.rank, self.world_size, self.skip = rank, world_size, skip
        self.summary = Summary()

    @property
    def digest(self) -> str:
        """A hash of the sources, as far as they can be identified without being read."""
        return digest(source.fingerprint() for source in self.sources)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        self.summary = Summary()
        yield from islice(self._packs(), self.rank * count + number + self.skip * self.world_size * count, None,
                          self.world_size * count)  # fmt: skip

    def num_packs(self) -> int:
        """Reads the data once and returns the number of packs over all ranks and workers; fills `summary`."""
        self.summary = Summary()
        return sum(1 for _ in self._packs())

    def _packs(self) -> Iterator[dict[str, torch.Tensor]]:
        window: list[Sample] = []
        for source in self.sources:
            for chunk in encode_source(source, self.config, encoder=self.encoder, summary=self.summary):
                window += [sample for _, sample in chunk]
                if len(window) >= self.window:
                    yield from self._packed(window)
                    window = []
        yield from self._packed(window)

    def _packed(self, samples: list[Sample]) -> Iterator[dict[str, torch.Tensor]]:
        lengths = [len(sample.input_ids) for sample in samples]
        packs = pack_samples(lengths, self.config.max_length, packing=self.config.packing)
        for number in range(len(packs)):
            yield join_samples([samples[index] for index in packs[number]])
