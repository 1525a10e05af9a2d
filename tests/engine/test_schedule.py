"""Steps, item order and learning rates: pure functions, checked against hand-worked cases and brute force."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.config.schema import ScheduleConfig
from xtuner.dataset.packing.sampler import EpochSampler
from xtuner.engine.schedule import FEW_STEPS, StepSampler, TrainingSchedule, few_steps_note


def plan(num_items: int, *, world_size: int = 1, **schedule: object) -> TrainingSchedule:
    return TrainingSchedule(num_items, ScheduleConfig(**schedule), world_size)  # type: ignore[arg-type]


def stream(p: TrainingSchedule, *, rank: int = 0, start_step: int = 0) -> list[list[int]]:
    return list(StepSampler(EpochSampler(p.num_items, seed=1), p, rank=rank, start_step=start_step))


@pytest.mark.parametrize(
    ('num_items', 'epochs', 'batch', 'accumulate', 'steps', 'last'),
    [
        (1, 1, 1, 16, 1, 1),  # one sample trains
        (16, 1, 1, 16, 1, 16),
        (17, 1, 1, 16, 2, 1),
        (10, 3, 2, 4, 4, 3),  # 30 items, 15 micro-batches
        (10, 0.5, 1, 2, 3, 1),
    ],
)
def test_steps(num_items: int, epochs: float, batch: int, accumulate: int, steps: int, last: int) -> None:
    p = plan(num_items, max_epochs=epochs, batch_size=batch, accumulative_counts=accumulate)
    assert p.num_steps == steps
    assert p.micro_batches_of(steps - 1) == last
    assert sum(p.micro_batches_of(s) for s in range(steps)) == p.num_micro_batches == len(stream(p))


def test_max_steps_counts_whole_steps() -> None:
    p = plan(5, max_steps=7, batch_size=2, accumulative_counts=3)
    assert (p.num_steps, p.num_micro_batches, p.micro_batches_of(6)) == (7, 21, 3)


def test_each_epoch_sees_every_item_once_in_its_own_order() -> None:
    p = plan(12, max_epochs=2, batch_size=1, accumulative_counts=5)
    items = [i for batch in stream(p) for i in batch]
    assert sorted(items[:12]) == sorted(items[12:]) == list(range(12))
    assert items[:12] != items[12:]


@pytest.mark.parametrize('start', range(5))
def test_a_resumed_stream_is_the_rest_of_the_whole_one(start: int) -> None:
    p = plan(7, max_epochs=3, batch_size=2, accumulative_counts=2)
    whole = stream(p)
    assert stream(p, start_step=start) == whole[start * 2 :]


@pytest.mark.parametrize('world_size', [2, 4])
def test_ranks_share_a_step_of_the_same_items(world_size: int) -> None:
    alone = plan(13, max_steps=6, batch_size=1, accumulative_counts=8)
    together = plan(13, max_steps=6, batch_size=1, accumulative_counts=8 // world_size, world_size=world_size)
    ranks = [stream(together, rank=r) for r in range(world_size)]
    assert together.items_per_step == alone.items_per_step
    for step in range(6):
        ours = Counter(i for b in stream(alone)[step * 8 : step * 8 + 8] for i in b)
        each = 8 // world_size
        theirs = Counter(i for rank in ranks for b in rank[step * each : (step + 1) * each] for i in b)
        assert ours == theirs


@pytest.mark.parametrize(
    ('ratio', 'steps', 'warmup'),
    [(0.07, 100, 7), (0.14, 50, 7), (0.29, 100, 29), (0.071, 100, 8), (1 / 3, 6, 2), (0.1 + 0.2, 10, 3), (1e-9, 5, 1),
     (0.0, 5, 0), (1.0, 5, 5)],
)  # fmt: skip
def test_warm_up_takes_no_step_more_for_a_rounding_error(ratio: float, steps: int, warmup: int) -> None:
    assert plan(steps, max_epochs=1, accumulative_counts=1, warmup_ratio=ratio).num_warmup_steps == warmup


def test_epochs_take_no_batch_more_for_a_rounding_error() -> None:
    assert plan(100, max_epochs=0.07).num_micro_batches == 7
    assert plan(100, max_epochs=0.071).num_micro_batches == 8
    assert plan(10, max_steps=3, accumulative_counts=2**60 - 1).num_steps == 3


def test_a_run_begun_with_rounding_errors_keeps_them() -> None:
    schedule = ScheduleConfig(max_epochs=0.07, accumulative_counts=1)
    assert (
        TrainingSchedule(100, schedule).num_steps,
        TrainingSchedule(100, schedule, float_products=True).num_steps,
    ) == (7, 8)
    schedule = ScheduleConfig(max_epochs=1, warmup_ratio=0.07, accumulative_counts=1)
    now, then = TrainingSchedule(100, schedule), TrainingSchedule(100, schedule, float_products=True)
    assert (now.num_warmup_steps, then.num_warmup_steps) == (7, 8)
    assert (now.lr_factor(0), then.lr_factor(0)) == (1 / 7, 1 / 8)


def test_learning_rate_of_a_worked_example() -> None:
    p = plan(6, max_epochs=1, accumulative_counts=1, warmup_ratio=2 / 6)
    expected = [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(math.pi * 3 / 4)) / 2]
    assert [p.lr_factor(s) for s in range(6)] == pytest.approx(expected)


def test_learning_rate_shapes() -> None:
    linear = plan(10, max_epochs=1, accumulative_counts=1, warmup_ratio=0, decay='linear', min_lr_ratio=0.5)
    assert [linear.lr_factor(s) for s in (0, 5, 9)] == pytest.approx([1.0, 0.75, 0.55])
    constant = plan(10, max_epochs=1, accumulative_counts=1, warmup_ratio=0.2, decay='constant')
    assert [constant.lr_factor(s) for s in (0, 1, 9)] == pytest.approx([0.5, 1.0, 1.0])


def test_the_last_step_counts_what_it_took() -> None:
    p = plan(1, max_epochs=3)  # 3 items, of the 16 that a whole step takes
    assert (p.num_steps, p.items_of_last_step, p.largest_step) == (1, 3, 3)
    assert p.epochs_after(1) == 3
    p = plan(18, max_epochs=3)
    assert (p.num_steps, p.items_of_last_step, p.largest_step) == (4, 6, 16)
    assert [round(p.epochs_after(step), 2) for step in range(5)] == [0, 0.89, 1.78, 2.67, 3]


@pytest.mark.parametrize(
    ('num_items', 'num_samples', 'note'),
    [
        (18, 200, 'only 4 optimizer steps; schedule.accumulative_counts=2 gives 27'),
        (2, 20, 'only 1 optimizer step; dataset.packing=none schedule.accumulative_counts=3 gives 20'),
        (
            1,
            1,
            'only 1 optimizer step; schedule.accumulative_counts=1 gives 3, and a larger schedule.max_epochs more',
        ),
        (107, 900, ''),  # 21 steps
    ],
)
def test_few_steps_are_reported_with_a_setting_that_makes_more(num_items: int, num_samples: int, note: str) -> None:
    assert few_steps_note(plan(num_items), num_samples) == note


def test_steps_that_were_asked_for_are_not_too_few() -> None:
    assert few_steps_note(plan(18, max_steps=2)) == ''
    assert few_steps_note(plan(1, accumulative_counts=1)) == 'only 3 optimizer steps; raise schedule.max_epochs'


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 20), st.sampled_from([0.5, 1, 2.3, 3]), st.integers(1, 4))
def test_the_advice_is_the_coarsest_setting_that_makes_enough(
    num_items: int, batch: int, accumulate: int, epochs: float, world_size: int
) -> None:
    def steps(batch: int, accumulate: int) -> int:
        return plan(num_items, world_size=world_size, max_epochs=epochs, batch_size=batch,
                    accumulative_counts=accumulate).num_steps  # fmt: skip

    note = few_steps_note(plan(num_items, world_size=world_size, max_epochs=epochs, batch_size=batch,
                               accumulative_counts=accumulate))  # fmt: skip
    coarsest_first = [(batch, count) for count in range(accumulate, 0, -1)] + [(b, 1) for b in range(batch, 0, -1)]
    assert bool(note) == (steps(batch, accumulate) < FEW_STEPS)
    if note and 'gives' in note:
        found = {key: int(value) for key, value in re.findall(r'schedule\.(\w+)=(\d+)', note)}
        size, count = found.get('batch_size', batch), found['accumulative_counts']
        assert f'gives {steps(size, count)}' in note
        enough = [pair for pair in coarsest_first if steps(*pair) >= FEW_STEPS]
        assert (size, count) == (enough[0] if enough else (1, 1))
