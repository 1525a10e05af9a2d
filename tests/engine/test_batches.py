"""Which numbers are refused before anything is read, and how a message finds what was in a micro-batch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from xtuner.config.load import load_config
from xtuner.config.schema import DatasetConfig, ModelConfig, RuntimeConfig, ScheduleConfig, TrainConfig
from xtuner.dataset.packing.sampler import LengthGroupedEpochSampler
from xtuner.engine.batches import MicroBatches, make_plan
from xtuner.errors import ConfigError


def config_of(*, dataset: dict[str, Any] | None = None, runtime: dict[str, Any] | None = None, **schedule: Any) -> Any:
    return TrainConfig(
        model=ModelConfig(path='', template=''), optimizer={}, schedule=ScheduleConfig(**schedule),
        dataset=DatasetConfig(source='', **dataset or {}), runtime=RuntimeConfig(**runtime or {}),
    )  # fmt: skip


@pytest.mark.parametrize('absurd', [10**8, 10**12, 10**30])
@pytest.mark.parametrize(
    'key', ['schedule.batch_size', 'schedule.accumulative_counts', 'dataset.max_length', 'runtime.num_workers']
)
def test_numbers_that_no_machine_could_serve_are_refused(key: str, absurd: int) -> None:
    with pytest.raises(ConfigError, match=rf'`{key}` must be at most \d+.*, got {absurd}$') as caught:
        load_config('internlm_7b_qlora_oasst1', {key: absurd})
    assert '\n' not in str(caught.value)


def test_a_micro_batch_of_too_many_tokens_is_refused_where_each_number_would_do() -> None:
    with pytest.raises(ConfigError, match=r'^`schedule.batch_size` x `dataset.max_length` is 68,719,476,736 tokens'):
        config_of(batch_size=2**16, dataset={'max_length': 2**20})


def test_large_numbers_that_people_use_are_not() -> None:
    config_of(batch_size=4096, accumulative_counts=8192, dataset={'max_length': 131_072})
    config_of(dataset={'max_length': 10_000_000}, runtime={'num_workers': 4 * (os.cpu_count() or 1)})


class _Named:
    """A data set of which only lengths and origins are asked."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def origins(self, index: int) -> list[str]:
        return [f'line {index}']


def test_naming_a_step_sorts_its_epoch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(batch_size=2, accumulative_counts=4, dataset={'packing': 'none', 'group_by_length': True})
    data = _Named(list(range(1, 41)))
    batches = MicroBatches(data, config, make_plan(data, config, 1), pad_id=0)
    orders = []
    order = LengthGroupedEpochSampler.order
    monkeypatch.setattr(LengthGroupedEpochSampler, 'order', lambda self: orders.append(1) or order(self))
    named = [batches.origins(2, number) for number in range(4)]
    assert len(orders) == 1
    whole = LengthGroupedEpochSampler(data.lengths, batch_size=8, seed=config.runtime.seed).order()
    assert named == [[f'pack {i} (line {i})' for i in whole[16 + 2 * n : 18 + 2 * n]] for n in range(4)]
    assert batches.origins(0, 0) == [f'pack {i} (line {i})' for i in whole[:2]]
