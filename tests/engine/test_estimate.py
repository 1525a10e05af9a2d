"""What `xtuner estimate` predicts, and the same check before a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xtuner.config.load import load_config
from xtuner.engine.estimate import DataSize, dims_of, estimate, memory_savings, optimizer_memory, setup_of
from xtuner.memory.gpus import GPUS
from xtuner.memory.predict import predict_memory

GIB = 2**30
FLAGSHIP = 'internlm_7b_qlora_oasst1'


def test_flagship_by_hand(folder_7b: Path) -> None:
    """The terms against arithmetic done here, from the shape alone."""
    hidden, inner, words, layers, rank = 4096, 11008, 103168, 32, 64
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    trained = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    found = estimate(load_config(FLAGSHIP), folder_7b)
    assert found.setup.dims.num_trained == trained == 159_907_840
    assert found.setup.dims.num_base == 7_321_948_160
    scales = linear / 64 * (1 + 4 / 256)
    head_norms_biases = 2 * (words * hidden + layers * (4 * hidden + 2 * hidden) + hidden)
    assert found.memory.terms['base'] == pytest.approx(linear / 2 + scales + head_norms_biases, rel=1e-6)
    assert found.memory.terms['adapter'] == 4 * trained
    assert found.memory.untracked['paged optimizer'] == 8 * trained
    assert found.memory.host['embedding'] == 2 * words * hidden
    assert 'embedding' not in found.memory.terms
    assert found.checkpoint_bytes == pytest.approx(12 * trained, rel=0.01)
    assert found.plan is None  # neither data nor max_steps


def test_memory_goes_the_way_of_each_setting(folder_7b: Path) -> None:
    def peak(*options: str, name: str = FLAGSHIP) -> int:
        overrides = dict(option.split('=') for option in options)
        values = {k: json.loads(v) for k, v in overrides.items()}
        return estimate(load_config(name, values), folder_7b).memory.on_gpu

    least = peak('runtime.activation_checkpointing=true')
    assert peak() == least  # 'auto' without a card: the least
    assert peak('runtime.activation_checkpointing=false') > least + 4 * GIB
    assert peak('runtime.fast=false') > least
    assert peak('schedule.batch_size=4') > least
    assert peak('dataset.max_length=8192') > least
    assert peak('adapter.r=16') < least
    assert peak('quantization=null') > least + 8 * GIB
    assert peak(name='internlm_7b_full_oasst1') > 100 * GIB


def test_auto_takes_what_the_card_has(folder_7b: Path) -> None:
    config = load_config(FLAGSHIP, {'schedule.batch_size': 4})
    large, small = (estimate(config, folder_7b, free=GPUS[name].num_bytes) for name in ('h200', 'l4'))
    assert large.setup.recomputed_layers == 0
    assert 0 < small.setup.recomputed_layers < 32
    assert small.memory.on_gpu < GPUS['l4'].num_bytes < large.memory.on_gpu
    assert large.least == estimate(config, folder_7b).memory


def test_knobs_are_sorted_and_each_saves_what_it_says(folder_7b: Path) -> None:
    config = load_config(FLAGSHIP, {'schedule.batch_size': 4, 'runtime.fast': False, 'quantization': None})
    setup = setup_of(config, dims_of(config, folder_7b))
    found = memory_savings(config, setup)
    assert [knob.saved for knob in found] == sorted((knob.saved for knob in found), reverse=True)
    texts = [knob.text for knob in found]
    assert {'quantization.bits=4', 'schedule.batch_size=2 schedule.accumulative_counts=32', 'adapter.r=32',
            'dataset.max_length=1024', 'runtime.fast=True'} == set(texts)  # fmt: skip
    halved = replace(setup, tokens=2 * 2048)
    saved = predict_memory(setup).on_gpu - predict_memory(halved).on_gpu
    assert found[texts.index('schedule.batch_size=2 schedule.accumulative_counts=32')].saved == saved


@pytest.mark.parametrize(
    ('section', 'expected'),
    [({'type': 'bitsandbytes.optim:PagedAdamW32bit'}, (8, True, 0)),
     ({'type': 'bitsandbytes.optim:AdamW8bit'}, (2, False, 0)),
     ({'type': 'torch.optim:AdamW'}, (8, False, 4)),
     ({'type': 'torch.optim:AdamW', 'fused': True}, (8, False, 0)),
     ({'type': 'torch.optim:SGD'}, (0, False, 0)),
     ({'type': 'torch.optim:SGD', 'momentum': 0.9}, (4, False, 4)),
     ({'type': 'bitsandbytes.optim:PagedLion8bit'}, (1, True, 0))],
)  # fmt: skip
def test_optimizer_memory(section: dict[str, Any], expected: tuple[float, bool, float]) -> None:
    found = optimizer_memory(section)
    assert (found['optimizer_bytes'], found['paged'], found['optimizer_spare']) == expected


def test_steps_and_tokens_follow_the_data(folder_7b: Path) -> None:
    data = DataSize(num_items=100, num_tokens=180_000, longest=2000, target_share=0.7)
    found = estimate(load_config(FLAGSHIP), folder_7b, data=data)
    assert found.plan is not None
    assert found.plan.num_steps == 19  # 300 packs of 16 a step
    assert found.tokens_per_step == 16 * 1800
    assert found.num_tokens == 300 * 1800
