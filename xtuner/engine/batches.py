"""Micro-batches of a run in schedule order, from prepared data or from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from xtuner.config.schema import TrainConfig
from xtuner.dataset.packing.collate import collate
from xtuner.dataset.packing.sampler import EpochSampler, LengthGroupedEpochSampler
from xtuner.dataset.stream import PackStream
from xtuner.engine.schedule import StepSampler, TrainingSchedule
from xtuner.errors import ConfigError, DataError, first_few
from xtuner.utils.units import counted

# Without packing, rows are padded to a multiple of this many tokens on a GPU.
_UNPACKED_MULTIPLE = 64
_MAX_NAMED = 8  # conversations of a pack that a message lists


class MicroBatches:
    """Yields this rank's micro-batches from `start_step` to the end of the run.

    Args:
        dataset: A `PreparedDataset`, or a `PackStream`, which restarts when it ends.
        config: The run's config.
        plan: The run's schedule.
        pad_id: The id that pads rows.
        rank: Rank of this process.
        collate: Joins items into a micro-batch; see `Objective.collate`.
    """

    def __init__(
        self,
        dataset: Any,
        config: TrainConfig,
        plan: TrainingSchedule,
        *,
        pad_id: int,
        rank: int = 0,
        collate: Callable[..., dict[str, Tensor]] = collate,
    ) -> None:
        self.start_step = 0
        self.dataset, self._config, self._plan, self._rank = dataset, config, plan, rank
        self._named: tuple[int, list[list[int]]] = (-1, [])  # the items of the last step that a message described
        self._settings: dict[str, Any] = {
            'num_workers': config.runtime.num_workers,
            'collate_fn': partial(collate, pad_id=pad_id, multiple_of=_row_multiple(config)),
            'pin_memory': torch.cuda.is_available(),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not isinstance(self.dataset, PackStream):
            sampler = StepSampler(self._order(), self._plan, rank=self._rank, start_step=self.start_step)
            yield from DataLoader(self.dataset, batch_sampler=sampler, **self._settings)
            return
        # A resumed run reads again what it has used and skips it, since a stream has no random access.
        first = self.start_step * self._plan.schedule.accumulative_counts
        yield from islice(self._stream(), first, self._plan.num_micro_batches)

    def origins(self, step: int, micro_batch: int) -> list[str]:
        """Describes each row of one of this rank's micro-batches (from 0) by its conversations' origins."""
        if isinstance(self.dataset, PackStream):
            size, each = self._plan.schedule.batch_size, self._plan.schedule.accumulative_counts
            first = (step * each + micro_batch) * size
            return [f'pack {number + 1} of this process' for number in range(first, first + size)]
        if self._named[0] != step:  # computes an epoch's order once per step, not for each micro-batch
            sampler = StepSampler(self._order(), self._plan, rank=self._rank, start_step=step)
            self._named = step, list(islice(sampler, self._plan.micro_batches_of(step)))
        return [f'pack {i} ({first_few(self.dataset.origins(i), _MAX_NAMED)})' for i in self._named[1][micro_batch]]

    def _order(self) -> EpochSampler:
        seed = self._config.runtime.seed
        if self._config.dataset.group_by_length:
            size = self._plan.items_per_step  # makes the order independent of the number of ranks
            return LengthGroupedEpochSampler(self.dataset.lengths, batch_size=size, seed=seed)
        return EpochSampler(len(self.dataset), seed=seed, lengths=self.dataset.lengths)

    def _stream(self) -> Iterator[dict[str, Tensor]]:
        while True:
            count = 0
            for batch in DataLoader(self.dataset, batch_size=self._plan.schedule.batch_size, **self._settings):
                count += 1
                yield batch
            if not count:
                raise DataError(self._no_pack_reason())

    def _no_pack_reason(self) -> str:
        """Why this process found no pack in a stream; there are few packs, so that counting them again is quick."""
        num_packs = self.dataset.num_packs()
        source, workers = self._config.dataset.source, max(1, self._config.runtime.num_workers)
        if not num_packs:
            return f'`dataset.source` {source!r} contains no conversation; ' + ' | '.join(self.dataset.summary.lines())
        return (
            f'`dataset.source` {source!r} yields {counted(num_packs, "pack")}, too few for {self.dataset.world_size} '
            f'groups of processes x {workers} readers to have one each; use fewer, a smaller `dataset.max_length`, or '
            '`dataset.streaming=False`'
        )


def make_plan(dataset: Any, config: TrainConfig, world_size: int) -> TrainingSchedule:
    """Returns the schedule of a run over a data set; a stream counts as one pass over `max_steps` steps.

    Raises:
        ConfigError: A run without a step, or a stream without `schedule.max_steps`, whose length is unknown.
    """
    schedule = config.schedule
    if not isinstance(dataset, PackStream):
        plan = TrainingSchedule(len(dataset), schedule, world_size)
        if plan.num_steps < 1:
            raise ConfigError(f'`schedule.max_epochs={schedule.max_epochs}` gives zero training steps; increase it')
        return plan
    if schedule.max_steps is None:
        raise ConfigError(
            '`dataset.streaming` needs `schedule.max_steps` (or --max-steps): the length of a stream is unknown'
        )
    return TrainingSchedule(
        schedule.max_steps * schedule.batch_size * schedule.accumulative_counts * world_size, schedule, world_size
    )


def _row_multiple(config: TrainConfig) -> int:
    """Multiple to which rows are padded: on a GPU, equal shapes let kernels and CUDA graphs be reused."""
    if not torch.cuda.is_available():
        return 1
    return config.dataset.max_length if config.dataset.packing != 'none' else _UNPACKED_MULTIPLE
