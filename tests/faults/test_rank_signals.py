"""Two processes: a signal to one of them stops both at the same step, saved; and what changes with their number."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.lives import Life, metrics, result, steps_done, wait_for, words_for


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_both_at_one_step(
    number: int, tiny_internlm: Path, forty_conversations: Path, tmp_path: Path
) -> None:
    log, work_dir = tmp_path / 'log', tmp_path / 'run'
    words = words_for(tiny_internlm, forty_conversations, work_dir, 'checkpoint.interval=1000', steps=400)
    life = Life(words, log, ranks=2)
    wait_for(lambda: (work_dir / 'metrics.jsonl').is_file(), life)
    os.kill(life.processes[1].pid, number)  # type: ignore[arg-type]
    assert life.end() == [128 + number, 128 + number], log.read_text(encoding='utf-8')
    stopped = steps_done(work_dir)
    assert 1 <= stopped < 400
    assert metrics(work_dir)[-1]['step'] == stopped
    text = log.read_text(encoding='utf-8')
    assert text.count(f'xtuner: error: stopped at step {stopped}, saved') == 1, text  # one of them tells


@pytest.mark.parametrize('rank', [0, 1])
def test_a_signal_within_a_long_step_stops_both_within_it(
    rank: int, tiny_internlm: Path, forty_conversations: Path, tmp_path: Path
) -> None:
    """The signalled rank is the slower or the faster one; resumed, the run ends as one that was never stopped."""
    log, work_dir, whole = tmp_path / 'log', tmp_path / 'run', tmp_path / 'whole'
    options = ['schedule.accumulative_counts=16', 'checkpoint.interval=1000']
    slow = {'type': 'tests.faults.hooks:SlowStep', 'step': 2, 'micro_batch': 4, 'rank': rank, 'seconds': [0.05, 0.1]}
    words = words_for(tiny_internlm, forty_conversations, work_dir, *options, steps=2)
    life = Life([*words, f'hooks={[slow]!r}'], log, ranks=2)
    assert life.end() == [143, 143], log.read_text(encoding='utf-8')
    text = log.read_text(encoding='utf-8')
    assert text.count('xtuner: error: stopped at step 1, saved') == 1, text
    counts = [int((work_dir / f'micro-batches-{r}').read_text(encoding='utf-8')) for r in range(2)]
    assert counts[0] == counts[1] < 16  # those that the foremost rank had begun
    assert Life([words[0], '--allow-changes', *words[1:]], log, ranks=2).end() == [0, 0], log.read_text(
        encoding='utf-8'
    )
    words = words_for(tiny_internlm, forty_conversations, whole, *options, steps=2)
    assert Life(words, log, ranks=2).end() == [0, 0], log.read_text(encoding='utf-8')
    assert result(work_dir) == result(whole)


@pytest.mark.slow
def test_another_number_of_processes_is_named(tiny_internlm: Path, forty_conversations: Path, tmp_path: Path) -> None:
    log, work_dir = tmp_path / 'log', tmp_path / 'run'
    assert Life(words_for(tiny_internlm, forty_conversations, work_dir, steps=2), log).end() == [0]
    options = ['schedule.accumulative_counts=1']
    words = words_for(tiny_internlm, forty_conversations, work_dir, *options, steps=3)
    assert Life(words, log, ranks=2).end()[0] == 1
    text = log.read_text(encoding='utf-8')
    assert 'the number of processes was 1 and is now 2' in text
    assert Life([*words[:2], '--allow-changes', *words[2:]], log, ranks=2).end() == [0, 0], log.read_text()
    assert [m['step'] for m in metrics(work_dir)] == [1, 2, 3]
