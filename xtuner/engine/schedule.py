"""Number of steps, items of each step and learning rate as pure functions of the step.

Nothing here has state, so that a resumed run is exact by construction: it continues at `step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.utils.data import Sampler

from xtuner.config.schema import ScheduleConfig
from xtuner.dataset.packing.sampler import EpochSampler
from xtuner.utils.units import counted


@dataclass(frozen=True)
class TrainingSchedule:
    """Schedule of a run.

    Items (packs or samples) form an endless stream of epochs, each in its own order. A step takes the next
    `batch_size * accumulative_counts * world_size` items, also across the end of an epoch; the last step takes the
    rest.

    Attributes:
        num_items: Packs or samples in the data set.
        schedule: The config's section.
        world_size: Number of process groups that read different items.
        float_products: Whether to round products such as `warmup_ratio * num_steps` up including their rounding error,
            as in runs of `run.json` format 1, so that those resume exactly.
    """

    num_items: int
    schedule: ScheduleConfig
    world_size: int = 1
    float_products: bool = False

    @property
    def items_per_micro_batch(self) -> int:
        """Items of one micro-batch over all ranks."""
        return self.schedule.batch_size * self.world_size

    @property
    def items_per_step(self) -> int:
        """Items of one full optimizer step over all ranks."""
        return self.items_per_micro_batch * self.schedule.accumulative_counts

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the whole run per rank."""
        if self.schedule.max_steps is not None:
            return self.schedule.max_steps * self.schedule.accumulative_counts
        return self._ceil(self.schedule.max_epochs * self.num_items / self.items_per_micro_batch)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.num_micro_batches // self.schedule.accumulative_counts)

    @property
    def num_warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return self._ceil(self.schedule.warmup_ratio * self.num_steps)

    @property
    def items_of_last_step(self) -> int:
        """Items of the last optimizer step, which takes the rest."""
        return self.micro_batches_of(self.num_steps - 1) * self.items_per_micro_batch

    @property
    def largest_step(self) -> int:
        """Items of the largest step: a full one, or the only one."""
        return min(self.items_per_step, self.num_micro_batches * self.items_per_micro_batch)

    def epochs_after(self, steps: int) -> float:
        """Epochs after a number of steps; the last step counts only the items that it took."""
        done = min(steps * self.schedule.accumulative_counts, self.num_micro_batches)
        return done * self.items_per_micro_batch / self.num_items

    def micro_batches_of(self, step: int) -> int:
        """Micro-batches of a step per rank: `accumulative_counts`, or the rest for the last step."""
        each = self.schedule.accumulative_counts
        return min(each, self.num_micro_batches - step * each)

    def _ceil(self, value: float) -> int:
        """Rounds up, ignoring rounding errors just above an integer: 0.07 * 100 is 7."""
        return math.ceil(value if self.float_products else value * (1 - 1e-12))

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step (from 0) as a share of its peak.

        It rises linearly during warm-up, whose first step already trains, then decays to `min_lr_ratio`, reached at the
        end of the last step:

            warm-up of 2 of 6 steps, cosine to 0:   0.5, 1.0, 1.0, 0.854, 0.5, 0.146
        """
        warmup, floor = self.num_warmup_steps, self.schedule.min_lr_ratio
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule.decay == 'constant':
            return 1.0
        done = (step - warmup) / max(1, self.num_steps - warmup)
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule.decay == 'cosine' else 1 - done
        return floor + (1 - floor) * shape


FEW_STEPS = 20
"""A run of whole epochs with fewer steps has hardly trained: warm-up and decay take most of it."""


def few_steps_note(plan: TrainingSchedule, num_samples: int | None = None) -> str:
    """Settings to change if whole epochs give fewer than `FEW_STEPS` steps; '' if there are enough.

    Args:
        plan: The run's schedule.
        num_samples: Conversations in the packs; None: unknown.

    Returns:
        A text such as "only 4 optimizer steps; schedule.accumulative_counts=2 gives 27".
    """
    if plan.schedule.max_steps is not None or plan.num_steps >= FEW_STEPS:
        return ''
    choices = [('', _finer(plan))]
    if num_samples is not None and num_samples > plan.num_items:
        choices.append(('dataset.packing=none ', _finer(replace(plan, num_items=num_samples))))
    packing, finer = next((choice for choice in choices if choice[1].num_steps >= FEW_STEPS), choices[-1])
    if finer.num_steps <= plan.num_steps:
        return f'only {counted(plan.num_steps, "optimizer step")}; raise schedule.max_epochs'
    schedule = finer.schedule
    size = f'schedule.batch_size={schedule.batch_size} ' if schedule.batch_size != plan.schedule.batch_size else ''
    more = ', and a larger schedule.max_epochs more' if finer.num_steps < FEW_STEPS else ''
    return (
        f'only {counted(plan.num_steps, "optimizer step")}; {packing}{size}'
        f'schedule.accumulative_counts={schedule.accumulative_counts} gives {finer.num_steps}{more}'
    )


def _finer(plan: TrainingSchedule) -> TrainingSchedule:
    """The schedule with the largest steps that gives at least `FEW_STEPS` steps, else with the smallest steps."""
    schedule = plan.schedule
    count = min(schedule.accumulative_counts, max(1, math.ceil(plan.num_micro_batches / (FEW_STEPS - 1)) - 1))
    finer = replace(plan, schedule=replace(schedule, accumulative_counts=count))
    if finer.num_steps >= FEW_STEPS:
        return finer
    items = schedule.max_epochs * plan.num_items / plan.world_size
    size = min(schedule.batch_size, max(1, math.ceil(items / (FEW_STEPS - 1)) - 1))
    return replace(plan, schedule=replace(schedule, accumulative_counts=1, batch_size=size))


class StepSampler(Sampler[list[int]]):
    """Yields the item indices of one rank's micro-batches, from `start_step` to the end of the run.

    A batch sampler for `DataLoader`. Micro-batch m on rank r takes the stream's items
    `[(m * world_size + r) * batch_size, ... + batch_size)`.
    """

    def __init__(self, order: EpochSampler, plan: TrainingSchedule, *, rank: int = 0, start_step: int = 0) -> None:
        self._order, self._plan, self._rank = order, plan, rank
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        plan, size = self._plan, self._plan.schedule.batch_size
        first = self.start_step * plan.schedule.accumulative_counts
        items = self._stream(first * plan.items_per_micro_batch)
        for _ in range(first, plan.num_micro_batches):
            items_of_all_ranks = [next(items) for _ in range(plan.items_per_micro_batch)]
            yield items_of_all_ranks[self._rank * size : (self._rank + 1) * size]

    def __len__(self) -> int:
        return self._plan.num_micro_batches - self.start_step * self._plan.schedule.accumulative_counts

    def _stream(self, position: int) -> Iterator[int]:
        epoch, skip = divmod(position, self._plan.num_items)
        while True:
            self._order.set_epoch(epoch, skip=skip)
            yield from self._order
            epoch, skip = epoch + 1, 0
