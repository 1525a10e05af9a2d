"""A run's micro-batches in the plan's order, from prepared data or from a stream."""

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
from xtuner.errors import ConfigError, DataError
from xtuner.utils.units import counted

# Tokens to a multiple of which rows of single conversations are filled up on a GPU.
_UNPACKED_MULTIPLE = 64
_MOST_NAMED = 8  # conversations of a pack, in a message


class MicroBatches:
    """Yields this rank's micro-batches from `start_step` to the end of the run.

    Args:
        dataset: A `PreparedDataset`, or a `PackStream`, which begins again when it ends.
        config: The run's config.
        plan: The run's arithmetic.
        pad_id: Fills rows up.
        rank: This process.
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
        self._named: tuple[int, list[list[int]]] = (-1, [])  # the items of a step that a message named
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
        # What a resumed run has seen is read again and passed over: a stream has no other way to its place.
        first = self.start_step * self._plan.schedule.accumulative_counts
        yield from islice(self._stream(), first, self._plan.num_micro_batches)

    def origins(self, step: int, micro_batch: int) -> list[str]:
        """For each row of one of this rank's micro-batches, counted from 0, the conversations in it."""
        if isinstance(self.dataset, PackStream):
            size, each = self._plan.schedule.batch_size, self._plan.schedule.accumulative_counts
            first = (step * each + micro_batch) * size
            return [f'pack {number + 1} of this process' for number in range(first, first + size)]
        if self._named[0] != step:  # an epoch's order is sorted once, not for each micro-batch of a message
            sampler = StepSampler(self._order(), self._plan, rank=self._rank, start_step=step)
            self._named = step, list(islice(sampler, self._plan.micro_batches_of(step)))
        return [f'pack {index} ({_some(self.dataset.origins(index))})' for index in self._named[1][micro_batch]]

    def _order(self) -> EpochSampler:
        seed = self._config.runtime.seed
        if self._config.dataset.group_by_length:
            size = self._plan.items_per_step  # so that the order is the same on any number of ranks
            return LengthGroupedEpochSampler(self.dataset.lengths, batch_size=size, seed=seed)
        return EpochSampler(len(self.dataset), seed=seed, lengths=self.dataset.lengths)

    def _stream(self) -> Iterator[dict[str, Tensor]]:
        while True:
            count = 0
            for batch in DataLoader(self.dataset, batch_size=self._plan.schedule.batch_size, **self._settings):
                count += 1
                yield batch
            if not count:
                raise DataError(self._why_nothing())

    def _why_nothing(self) -> str:
        """Why this process found no pack in a stream: there are few, so reading them again takes a moment."""
        found = self.dataset.num_packs()
        source, workers = self._config.dataset.source, max(1, self._config.runtime.num_workers)
        if not found:
            return f'`dataset.source` {source!r} contains no conversation; ' + ' | '.join(self.dataset.summary.lines())
        return (
            f'`dataset.source` {source!r} makes {counted(found, "pack")}, too few for {self.dataset.world_size} groups '
            f'of processes x {workers} readers to have one each; use fewer, a smaller `dataset.max_length`, or '
            '`dataset.streaming=False`'
        )


def _some(names: list[str]) -> str:
    more = f' and {len(names) - _MOST_NAMED} more' if len(names) > _MOST_NAMED else ''
    return ', '.join(names[:_MOST_NAMED]) + more


def make_plan(dataset: Any, config: TrainConfig, world_size: int) -> TrainingSchedule:
    """The arithmetic of a run over a data set; a stream counts as one pass over `max_steps` steps.

    Raises:
        ConfigError: a run of no step, or a stream without `schedule.max_steps`: nobody knows its length.
    """
    schedule = config.schedule
    if not isinstance(dataset, PackStream):
        plan = TrainingSchedule(len(dataset), schedule, world_size)
        if plan.num_steps < 1:
            raise ConfigError(f'`schedule.max_epochs` is {schedule.max_epochs}, which makes no step; raise it')
        return plan
    if schedule.max_steps is None:
        raise ConfigError('`dataset.streaming` needs `schedule.max_steps` (or --max-steps): a stream has no length')
    return TrainingSchedule(
        schedule.max_steps * schedule.batch_size * schedule.accumulative_counts * world_size, schedule, world_size
    )


def _row_multiple(config: TrainConfig) -> int:
    """To what rows are filled up: on a GPU, packs that are all of one form let kernels and graphs be chosen once."""
    if not torch.cuda.is_available():
        return 1
    return config.dataset.max_length if config.dataset.packing != 'none' else _UNPACKED_MULTIPLE
