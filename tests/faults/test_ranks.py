"""One rank is killed, or hangs: all end within seconds, one line says which, and its checkpoint goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.test_ranks import run, words_for
from tests.faults.lives import Life, metrics, newest, steps_done
from tests.faults.lives import words_for as life_words

HOOKS = "hooks=[{{'type': 'tests.faults.rank_hooks:{name}', 'step': 3}}]"
# Dropout's masks are each rank's own, and a learning rate that falls would know how long the run is.
STEADY = ('adapter.lora_dropout=0', 'schedule.decay=constant', 'schedule.warmup_ratio=0.0')


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding='utf-8').splitlines() if line.startswith('xtuner: error')]


def test_killed_and_resumed_by_others(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    """Two ranks of `ddp`, one killed in step 3; two of `fsdp` go on."""
    folder, log = tmp_path / 'run', tmp_path / 'log'
    options = [*STEADY, 'dataset.val_ratio=0.2']
    words = life_words(tiny_internlm, forty_conversations, folder, *options, steps=4)
    began = time.monotonic()
    life = Life([*words, HOOKS.format(name='Killed')], log, ranks=2)
    assert life.end(60) == [1, -9], log.read_text(encoding='utf-8')
    assert time.monotonic() - began < 45
    assert len(errors(log)) == 1 and 'rank 1 was killed' in errors(log)[0]
    assert steps_done(folder) == 2
    others = [*words, 'parallel.strategy=fsdp', '--allow-changes']  # the hook is not there any more
    assert Life(others, log, ranks=2).end() == [0, 0], log.read_text(encoding='utf-8')
    whole = uninterrupted(tiny_internlm, forty_conversations, tmp_path, *options)
    assert_same_weights(folder, whole)
    losses = [[line['val_loss'] for line in metrics(f) if 'val_loss' in line] for f in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4


@pytest.mark.slow
def test_any_number_of_ranks_goes_on(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    """Two steps by four ranks of `fsdp`, one by two of `ddp`, one by a single process: always four items a step."""
    folder, log = tmp_path / 'run', tmp_path / 'log'
    for steps, ranks, strategy in ((2, 4, 'fsdp'), (3, 2, 'ddp'), (4, 1, 'auto')):
        words = life_words(tiny_internlm, forty_conversations, folder, *STEADY, steps=steps)
        more = [f'schedule.accumulative_counts={4 // ranks}', f'parallel.strategy={strategy}', '--allow-changes']
        assert set(Life([*words, *more], log, ranks=ranks).end()) == {0}, log.read_text(encoding='utf-8')
    assert_same_weights(folder, uninterrupted(tiny_internlm, forty_conversations, tmp_path))


def uninterrupted(model: Path, data: Path, tmp_path: Path, *options: str) -> Path:
    """The work folder of one process that did the same four steps."""
    folder, log = tmp_path / 'whole', tmp_path / 'whole.log'
    words = life_words(model, data, folder, *(options or STEADY), 'schedule.accumulative_counts=4', steps=4)
    assert Life(words, log).end() == [0], log.read_text(encoding='utf-8')
    return folder


def assert_same_weights(one: Path, other: Path) -> None:
    ended, expected = (load_file(newest(f) / 'adapter_model.safetensors') for f in (one, other))
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():  # AdamW divides a gradient by its own size: near zero, rounding shows
        assert (ended[name] - tensor).abs().max() < 2e-3 * tensor.abs().max(), name


def test_a_rank_that_hangs_is_named(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    words = life_words(tiny_internlm, forty_conversations, tmp_path / 'run', 'parallel.timeout_s=3', steps=4)
    life = Life([*words, HOOKS.format(name='Hangs')], log, ranks=2)
    assert set(life.end(60)) == {1}, log.read_text(encoding='utf-8')
    assert len(errors(log)) == 1
    assert 'rank 1 (on ' in errors(log)[0] and 'hangs at step 3, reading its data' in errors(log)[0]


@pytest.mark.slow
def test_the_launcher_tells_of_a_killed_rank(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    words = words_for(tiny_internlm, forty_conversations, tmp_path / 'run', 2)
    result = run([*words, HOOKS.format(name='Killed'), '--nproc-per-node', '2'])
    assert result.returncode == 1
    assert result.stderr.count('xtuner: error') == 1
    assert 'rank 1 was killed by SIGKILL' in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_wait_for_the_one_that_prepares(tiny_internlm: Path, conversations: Path, tmp_path: Path) -> None:
    """Twelve records at a second each, with a time-out of one second (seven for a collective)."""
    words = words_for(tiny_internlm, conversations, tmp_path / 'run', 2)
    more = ['dataset.map_fn=tests.faults.rank_hooks:slow_map', 'parallel.timeout_s=2']
    result = run([*words, *more, '--nproc-per-node', '2'])
    assert result.returncode == 0, result.stderr
    prepared = 'prepared in' in result.stderr  # by rank 0, who speaks for all; by rank 1 as it happens
    assert result.stderr.count('1 of') == 0 and (prepared or 'waiting for another process' in result.stderr)


SAMPLES = ('parallel.strategy=fsdp', 'samples.prompts=["Say 1."]', 'samples.max_new_tokens=5', 'samples.interval=1')


@pytest.mark.parametrize('failing', [0, 1])
def test_a_rank_that_alone_fails_to_sample_ends_all(
    failing: int, tiny_internlm: Path, forty_conversations: Path, tmp_path: Path
) -> None:
    """The other one waits in a collective that cannot end."""
    log = tmp_path / 'log'
    hook = {'type': 'tests.faults.rank_hooks:FailsToSample', 'failing': [failing]}
    words = life_words(tiny_internlm, forty_conversations, tmp_path / 'run', *SAMPLES, f'hooks={[hook]!r}', steps=2)
    assert Life(words, log, ranks=2).end() == [1, 1], log.read_text(encoding='utf-8')  # in time, neither hangs
    assert len(errors(log)) == 1, errors(log)
    assert f'only rank {failing} failed in the sample at step 0: RuntimeError: no memory' in errors(log)[0]


def test_ranks_that_fail_to_sample_alike_go_on(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    hook = {'type': 'tests.faults.rank_hooks:FailsToSample', 'failing': [0, 1]}
    words = life_words(tiny_internlm, forty_conversations, tmp_path / 'run', *SAMPLES, f'hooks={[hook]!r}', steps=2)
    assert Life(words, log, ranks=2).end() == [0, 0], log.read_text(encoding='utf-8')
    assert 'no sample at step 0, training continues: RuntimeError: no memory for the sample' in log.read_text('utf-8')
    assert steps_done(tmp_path / 'run') == 2
