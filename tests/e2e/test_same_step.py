"""One step over the same samples, however they are cut into micro-batches, packs and ranks: one loss, one gradient.

The optimizer is plain SGD at so large a learning rate that what a weight was before does not show beside its step: the
weights that are saved are the gradient, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.lives import Life
from xtuner.cli.main import main

TOLERANCE = 1e-5  # float32, sums in another order
CONFIG = """
from peft import LoraConfig
from torch.optim import SGD

model = dict(path={model!r}, template='internlm_chat', dtype='fp32')
dataset = dict(source={data!r}, max_length=96)
optimizer = dict(type=SGD, lr=1e6)
adapter = {adapter}
schedule = dict(max_norm=None, warmup_ratio=0.0, decay='constant', max_steps=1)
log = dict(trackers=[])
"""
ADAPTERS = {
    'lora': "dict(type=LoraConfig, r=4, lora_alpha=4, target_modules='all-linear', init_lora_weights=False)",
    'all weights': 'None',
}
CUTS = {
    '12 x 1': ['dataset.packing=none', 'schedule.batch_size=12', 'schedule.accumulative_counts=1'],
    '4 x 3': ['dataset.packing=none', 'schedule.batch_size=4', 'schedule.accumulative_counts=3'],
    '1 x 12': ['dataset.packing=none', 'schedule.batch_size=1', 'schedule.accumulative_counts=12'],
    'by length': ['dataset.packing=none', 'schedule.batch_size=3', 'schedule.accumulative_counts=4',
                  'dataset.group_by_length=True'],
    'packs': ['schedule.batch_size=1', 'schedule.accumulative_counts=PACKS'],
    'all packs at once': ['schedule.batch_size=PACKS', 'schedule.accumulative_counts=1'],
    'packs in order': ['dataset.packing=stream', 'schedule.batch_size=1', 'schedule.accumulative_counts=STREAM'],
    'one pack': ['dataset.max_length=512', 'schedule.batch_size=1', 'schedule.accumulative_counts=1'],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve conversations of very unequal lengths."""
    rows = [
        {'messages': [{'role': 'user', 'content': f'Count to {n}.'},
                      {'role': 'assistant', 'content': ' '.join(map(str, range(n * n // 8 + 1)))}]}
        for n in range(12)
    ]  # fmt: skip
    path = tmp_path / 'unequal.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def words(folder: Path, config: Path, name: str, options: list[str]) -> list[str]:
    return ['train', str(config), '--work-dir', str(folder / name), '--cfg-options', *options]


def result(folder: Path, name: str) -> tuple[dict, torch.Tensor]:
    """The step's numbers, and the weights as one vector."""
    run = folder / name
    numbers = json.loads((run / 'metrics.jsonl').read_text(encoding='utf-8'))
    [file] = [*(run / 'checkpoint-00000001').glob('*model.safetensors')]
    weights = load_file(file)
    return numbers, torch.cat([weights[key].double().flatten() for key in sorted(weights)])


def number_of_packs(config: Path, data: Path, packing: str) -> int:
    from xtuner.config.load import load_config
    from xtuner.dataset.prepare import prepare_dataset
    from xtuner.dataset.templates.builtin import get_template
    from xtuner.model.loading import load_tokenizer

    loaded = load_config(str(config), {'dataset.packing': packing})
    tokenizer = load_tokenizer(loaded.model.path)
    return len(prepare_dataset(loaded.dataset, tokenizer=tokenizer, template=get_template('internlm_chat', tokenizer)))


@pytest.mark.parametrize('adapter', ['lora', pytest.param('all weights', marks=pytest.mark.slow)])
def test_one_step_is_one_step_however_it_is_cut(adapter: str, tiny_internlm: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / 'step.py'
    config.write_text(CONFIG.format(model=str(tiny_internlm), data=str(data), adapter=ADAPTERS[adapter]))
    packs, stream = (str(number_of_packs(config, data, packing)) for packing in ('best_fit', 'stream'))
    assert int(packs) > 2
    results = {}
    for name, options in CUTS.items():
        filled = [option.replace('PACKS', packs).replace('STREAM', stream) for option in options]
        assert main(words(tmp_path, config, name, filled)) == 0
        results[name] = result(tmp_path, name)
    two = words(tmp_path, config, 'two ranks', ['dataset.packing=none', 'schedule.batch_size=2',
                                                'schedule.accumulative_counts=3'])  # fmt: skip
    log = tmp_path / 'log'
    assert Life(two, log, ranks=2).end() == [0, 0], log.read_text(encoding='utf-8')
    results['two ranks'] = result(tmp_path, 'two ranks')

    expected, gradient = results['1 x 12']
    assert gradient.norm() > 1e4  # so the weights are the gradient
    for name, (numbers, weights) in results.items():
        assert numbers['num_targets'] == expected['num_targets'], name
        assert numbers['loss'] == pytest.approx(expected['loss'], rel=TOLERANCE), name
        assert numbers['grad_norm'] == pytest.approx(expected['grad_norm'], rel=TOLERANCE), name
        assert (weights - gradient).norm() < TOLERANCE * gradient.norm(), name


SLOW_MAP = """
import time

def slow(example):
    time.sleep(1)
    return example
"""
IMPATIENT = """
import sys
from datetime import timedelta
from xtuner.cli.main import main
from xtuner.engine import launch

launch._TIMEOUT = timedelta(seconds=5)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_wait_for_the_data_longer_than_a_collective_may_take(
    tiny_internlm: Path, data: Path, tmp_path: Path
) -> None:
    """Twelve seconds of mapping against five that a collective has."""
    config, functions, script = tmp_path / 'step.py', tmp_path / 'functions.py', tmp_path / 'impatient.py'
    config.write_text(CONFIG.format(model=str(tiny_internlm), data=str(data), adapter='None'))
    functions.write_text(SLOW_MAP)
    script.write_text(IMPATIENT)
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)]
    options = [f'dataset.map_fn={functions}:slow', 'schedule.accumulative_counts=2', 'optimizer.lr=0.1']
    command = [*launcher, *words(tmp_path, config, 'run', options), '--launcher', 'pytorch']
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'prepared in' in done.stderr or 'waiting for process' in done.stderr
    assert (tmp_path / 'run' / 'checkpoint-00000001').is_dir()
