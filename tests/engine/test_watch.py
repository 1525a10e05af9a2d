"""Who is taken for dead: a process that can be seen and is gone, never one that cannot be seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from xtuner import processes
from xtuner.engine.watch import Watch
from xtuner.processes import this_process

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)


def neighbour(store: TCPStore, space: str) -> tuple[Watch, subprocess.Popen[bytes]]:
    """A watch of rank 0, and a process that says it is rank 1 where process numbers have this meaning."""
    child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE)
    name = f'{space} {child.pid} {processes._start_time(child.pid)}'
    store.set('xtuner/process/0', json.dumps(['host', this_process()]))
    store.set('xtuner/process/1', json.dumps(['host', name]))
    return Watch(store, rank=0, world_size=2, timeout_s=100), child


def test_a_neighbour_that_was_killed_is_seen(store: TCPStore) -> None:
    watch, child = neighbour(store, processes._space())
    assert watch._dead_neighbour() is None
    child.kill()
    child.communicate()
    assert watch._dead_neighbour() == 1
    store.set('xtuner/ended/1', '1')
    assert watch._dead_neighbour() is None


@pytest.mark.parametrize('word', [0, 1, 2])
def test_a_process_in_another_container_of_the_same_host_name_is_left_to_its_own(store: TCPStore, word: int) -> None:
    """Its number belongs to nobody here, or to somebody else."""
    space = processes._space().split()
    space[word] = 'other'
    watch, child = neighbour(store, ' '.join(space))
    child.kill()
    child.communicate()
    assert watch._dead_neighbour() is None
