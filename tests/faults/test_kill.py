"""A training that is killed, whenever it may be, and resumed ends with the bytes of one that never was."""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.lives import CONTEXT, Life, result, steps_done, wait_for, words_for
from xtuner.engine.checkpoint.store import newest_checkpoint, recover, verify_checkpoint, write_checkpoint
from xtuner.engine.checkpoint.trainer_state import read_state

OPTIONS = ['dataset.val_ratio=0.1']  # so that `best` is written as well


@pytest.mark.parametrize(
    ('kills', 'ranks'),
    [
        (3, 1),
        pytest.param(50, 1, marks=pytest.mark.slow),
        pytest.param(20, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    kills: int, ranks: int, tiny_internlm: Path, forty_conversations: Path, tmp_path: Path, seed: int = 1
) -> None:
    """Packed, two micro-batches a step, dropout, validation, several epochs, a checkpoint after every step."""
    steps = kills * 3 // 2 + 4
    whole, work_dir = tmp_path / 'whole', tmp_path / 'run'
    log = tmp_path / 'log'
    uninterrupted = Life(words_for(tiny_internlm, forty_conversations, whole, *OPTIONS, steps=steps), log, ranks=ranks)
    assert set(uninterrupted.end()) == {0}, log.read_text(encoding='utf-8')

    chance, words = random.Random(seed), words_for(tiny_internlm, forty_conversations, work_dir, *OPTIONS, steps=steps)
    while_saving = done = 0
    for _ in range(kills):
        life = Life(words, log, ranks=ranks)
        moment = random_moment(chance, work_dir, life)
        life.kill()
        while_saving += bool([*work_dir.glob('.saving-*'), *work_dir.glob('.removing-*')])
        assert steps_done(work_dir) >= done, f'a checkpoint was lost: killed {moment}'
        done = steps_done(work_dir)
        if done == steps:
            break
    print(f'{kills} kills, {while_saving} of them with a checkpoint half written or half removed, {done} steps done')
    assert while_saving >= kills // 10
    assert set(Life(words, log, ranks=ranks).end()) == {0}, log.read_text(encoding='utf-8')[-2000:]
    assert result(work_dir) == result(whole)
    for name in ('last', 'best'):
        assert (work_dir / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in work_dir.iterdir()) == sorted(p.name for p in whole.iterdir())


def random_moment(chance: random.Random, work_dir: Path, life: Life) -> str:
    """Waits for one: while the run starts, in or between its steps, or while it writes a checkpoint."""
    kind = chance.choice(['starting', 'training', 'saving', 'saving'])
    before = steps_done(work_dir)
    if kind == 'starting':
        wait = chance.uniform(0, 1.5)
    elif kind == 'training':
        wait_for(lambda: steps_done(work_dir) > before, life)
        wait = chance.uniform(0, 0.4)
    else:
        wait_for(lambda: list(work_dir.glob('.saving-*')), life)
        wait = chance.uniform(0, 0.05)
    time.sleep(wait)
    return f'{kind} after {wait:.3f} s'


STATE: dict[str, Any] = {'step': 0, 'tensor': torch.arange(6.0)}


def write(work_dir: Path, step: int) -> None:
    write_checkpoint(
        work_dir,
        step,
        write_model=lambda folder: (folder / 'adapter_config.json').write_text(f'{step}', encoding='utf-8') and None,
        state=STATE | {'step': step, 'val_loss': 1.0 / step},
        max_keep=2,
    )


class Killed(BaseException):
    """In place of SIGKILL: nothing handles it, and nothing cleans up after it."""


def write_and_die_at_every_operation(before: str, step: int) -> None:
    """In a process of its own, since an audit hook stays: a save that ends at its n-th operation, for every n."""
    folder, operations, count = '', 0, 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'shutil.rmtree', 'os.scandir'):
            count += folder != '' and folder in str(arguments[0])
            if folder and count == operations:
                raise Killed

    sys.addaudithook(audit)
    killed = True
    while killed:
        operations, count = operations + 1, 0
        work_dir = Path(before).with_name(f'killed-{operations}')
        shutil.copytree(before, work_dir)
        folder = str(work_dir)
        try:
            write(work_dir, step)
            killed = False
        except Killed:
            pass
        folder = ''
        check(work_dir, {step} if not killed else {2, step})
    assert operations > 20


def check(work_dir: Path, steps: set[int]) -> None:
    """What a resume finds."""
    recover(work_dir)
    for folder in work_dir.glob('checkpoint-*'):
        verify_checkpoint(folder)
    found = newest_checkpoint(work_dir, warn=pytest.fail)
    assert found is not None
    assert read_state(found)['step'] in steps
    assert not list(work_dir.glob('.*'))


@pytest.mark.parametrize('step', [3, 2])  # a new one, and one that is there and is written again
def test_killed_at_every_operation_of_a_save(step: int, tmp_path: Path) -> None:
    for old in (1, 2):
        write(tmp_path / 'before', old)
    process = CONTEXT.Process(target=write_and_die_at_every_operation, args=(str(tmp_path / 'before'), step))
    process.start()
    process.join()
    assert process.exitcode == 0
