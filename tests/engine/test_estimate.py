"""What `xtuner estimate` predicts, and the same check before a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.internlm_7b import SHAPE
from xtuner.cli.main import main
from xtuner.config.load import load_config
from xtuner.engine import preflight
from xtuner.engine.build import RunInputs
from xtuner.engine.estimate import DataSize, dims_of, estimate, memory_savings, optimizer_memory, setup_of
from xtuner.errors import TrainingError, UsageError
from xtuner.memory.gpus import GPUS, find_gpu, flops_per_token
from xtuner.memory.predict import predict_memory

GIB = 2**30
FLAGSHIP = 'internlm_7b_qlora_oasst1'


@pytest.fixture(scope='module')
def folder_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternLM-7B as far as an estimate needs it: one file of settings."""
    folder = tmp_path_factory.mktemp('internlm-7b')
    (folder / 'config.json').write_text(json.dumps(SHAPE), encoding='utf-8')
    return folder


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


def test_flops_are_those_of_the_notes(folder_7b: Path) -> None:
    """30.5 GFLOP a token without recomputation, in benchmarks/notes_qlora_step.md."""
    config = load_config(FLAGSHIP, {'runtime.activation_checkpointing': False})
    assert flops_per_token(setup_of(config, dims_of(config, folder_7b))) == pytest.approx(30.5e9, rel=0.01)


def test_cards_by_name() -> None:
    assert find_gpu('RTX 4090').gib == 24
    with pytest.raises(UsageError, match=r'unknown GPU .h10.; known: .*; did you mean .*h100.*\?$'):
        find_gpu('h10')


def test_steps_and_tokens_follow_the_data(folder_7b: Path) -> None:
    data = DataSize(num_items=100, num_tokens=180_000, longest=2000, target_share=0.7)
    found = estimate(load_config(FLAGSHIP), folder_7b, data=data)
    assert found.plan is not None
    assert found.plan.num_steps == 19  # 300 packs of 16 a step
    assert found.tokens_per_step == 16 * 1800
    assert found.num_tokens == 300 * 1800


def test_command(tiny_internlm: Path, conversations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ['estimate', FLAGSHIP, '--model', str(tiny_internlm), '--data', str(conversations)]
    assert main([*words, '--gpu', 'h100', '--num-gpus', '2']) == 0
    out = capsys.readouterr().out
    assert 'counted by torch' in out
    assert 'Fits h100' in out
    assert re.search(r'internlm\d*: [\d.]+ [kM] parameters', out)  # not '0.00 B'
    assert 'on 2 x h100' in out
    assert main([*words, '--step-seconds', '1800', '--max-steps', '3']) == 2
    assert main([*words, '--step-seconds', '1800', '--cfg-options', 'schedule.max_steps=3']) == 0
    assert 'time: 1 h 30 min at 1800 s per step' in capsys.readouterr().out
    assert main([*words, '--json', '--no-data']) == 0
    assert json.loads(capsys.readouterr().out)['memory']['allocated'] > 0


def test_command_without_the_data_still_tells_the_memory(
    folder_7b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['estimate', FLAGSHIP, '--model', str(folder_7b), '--data', str(tmp_path / 'none.jsonl')]) == 0
    found = capsys.readouterr()
    assert 'the size of the data is unknown' in found.err
    assert 'the number of steps is unknown' in found.out
    assert '  base               3.90   frozen weights' in found.out


class _Gpu:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gib: float) -> None:
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free_gib * GIB), 24 * GIB))


def test_a_run_that_cannot_fit_is_refused_with_what_to_turn(
    folder_7b: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, 'data_size', lambda dataset: None)
    data = RunInputs(folder_7b, '', None, None, None, None, {})  # type: ignore[arg-type]
    device = torch.device('cuda', 0)
    config = load_config(FLAGSHIP)
    _Gpu(monkeypatch, 5.0)
    with pytest.raises(TrainingError, match=r'predicted to need \d.\d\d GiB of cuda:0, and 5.00 GiB .*largest: base'):
        preflight.check_memory(config, data, device, 1)
    preflight.check_memory(load_config(FLAGSHIP, {'runtime.check_memory': False}), data, device, 1)
    assert 'dataset.max_length=1024 saves' in caplog.text
    _Gpu(monkeypatch, 10.0)
    preflight.check_memory(config, data, device, 1)
    preflight.check_memory(config, data, torch.device('cpu'), 1)
    _Gpu(monkeypatch, 1.0)
    preflight.check_memory(config, data, device, 4, strategy='fsdp')  # what it saves is not predicted
