"""Who is taken for dead: a process that can be seen and is gone, never one that cannot be seen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from torch.distributed import TCPStore

from xtuner.engine.distributed import watchdog as watch_module
from xtuner.engine.distributed.watchdog import Watchdog
from xtuner.errors import TrainingError
from xtuner.utils import processes
from xtuner.utils.processes import this_process

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)


def neighbour(store: TCPStore, space: str) -> tuple[Watchdog, subprocess.Popen[bytes]]:
    """A watch of rank 0, and a process that says it is rank 1 where process numbers have this meaning."""
    program = 'import sys; print(flush=True); sys.stdin.read()'
    child = subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()  # it has begun
    name = f'{space} {child.pid} {processes._start_time(child.pid)}'
    store.set('xtuner/process/0', json.dumps(['host', this_process()]))
    store.set('xtuner/process/1', json.dumps(['host', name]))
    return Watchdog(store, rank=0, world_size=2, timeout_s=100), child


def test_a_neighbour_that_was_killed_is_seen(store: TCPStore) -> None:
    watch, child = neighbour(store, processes._pid_scope())
    assert watch._dead_neighbour() is None
    child.kill()
    child.communicate()
    assert watch._dead_neighbour() == 1
    store.set('xtuner/ended/1', '1')
    assert watch._dead_neighbour() is None


@pytest.mark.parametrize('word', [0, 1, 2])
def test_a_process_in_another_container_of_the_same_host_name_is_left_to_its_own(store: TCPStore, word: int) -> None:
    """Its number belongs to nobody here, or to somebody else."""
    space = processes._pid_scope().split()
    space[word] = 'other'
    watch, child = neighbour(store, ' '.join(space))
    child.kill()
    child.communicate()
    assert watch._dead_neighbour() is None


@pytest.mark.parametrize('seed', range(20))
def test_all_ranks_stop_in_the_same_place(seed: int) -> None:
    """Three ranks in any order of steps; after some steps one or two of them ask to stop."""
    chance = random.Random(seed)
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    watches = [Watchdog(store, rank=rank, world_size=3, timeout_s=100) for rank in range(3)]
    asking = {rank: chance.randrange(8) for rank in chance.sample(range(3), chance.randint(1, 2))}
    passed, stopped, foremost = [0] * 3, [0] * 3, 0
    while not all(stopped):
        rank = chance.choice([r for r in range(3) if not stopped[r]])
        asked = 15 if rank in asking and passed[rank] >= asking[rank] else None
        stopped[rank] = watches[rank].agree_on_stop(asked) or 0
        passed[rank] += not stopped[rank]
        foremost = max(foremost, passed[rank]) if not any(stopped) else foremost
    assert stopped == [15] * 3
    assert passed[0] == passed[1] == passed[2] <= foremost + 1


@pytest.mark.parametrize(
    ('outcomes', 'message'),
    [
        (('', ''), None),
        (('no memory', 'no memory'), None),
        (('', 'no memory'), 'rank 1 failed in the sample, but not all others did: no memory'),
        (('one', 'other'), 'rank 0 failed in the sample, but not all others did: one'),
    ],
)
def test_ranks_agree_on_how_it_ended(store: TCPStore, outcomes: tuple[str, str], message: str | None) -> None:
    watches = [Watchdog(store, rank=rank, world_size=2, timeout_s=100) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            ends = [pool.submit(w.agree_on_success, 'the sample', o) for w, o in zip(watches, outcomes, strict=True)]
            for end in ends:
                with nullcontext() if message is None else pytest.raises(TrainingError, match=message):
                    end.result(20)
    assert store.num_keys() <= 2 * 2 + 1


def test_a_rank_that_failed_does_not_wait_for_ever(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, '_PATIENCE_S', 0.1)
    with pytest.raises(TrainingError, match='only rank 0 failed in the sample: no memory'):
        Watchdog(store, rank=0, world_size=2, timeout_s=100).agree_on_success('the sample', 'no memory')
