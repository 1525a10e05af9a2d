"""Training processes that a test may kill: forked from a server that has imported everything, so that each starts fast.

A life is one `xtuner train` command in a process of its own, or in one for each rank.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['tests.faults.preload'])


def words_for(model: Path, data: Path, work_dir: Path, *options: str, steps: int) -> list[str]:
    """The flagship, made small: in 4 bit, packed, two micro-batches a step, with dropout, a checkpoint every step."""
    return ['train', 'internlm_7b_qlora_oasst1', '--model', str(model), '--data', str(data), '--work-dir',
            str(work_dir), '--max-steps', str(steps), '--resume', '--cfg-options', 'dataset.max_length=48',
            'schedule.accumulative_counts=2', 'adapter.r=2', 'adapter.lora_dropout=0.1', 'optimizer.lr=0.01',
            'checkpoint.interval=1', 'samples.prompts=[]', 'log.trackers=[]', *options]  # fmt: skip


class Life:
    """One command under way, in one process a rank.

    Args:
        words: The command line, without `xtuner`.
        log: Where stderr goes.
        ranks: Processes.
        before: Called in each process before the command, with its rank.
    """

    def __init__(
        self, words: Sequence[str], log: Path, *, ranks: int = 1, before: Callable[[int], None] | None = None
    ) -> None:
        port = _free_port() if ranks > 1 else 0
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_live, args=(list(words), str(log), rank, ranks, port, before))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """SIGKILL for all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def end(self, timeout_s: float = 120) -> list[int | None]:
        """Waits for the end and returns the exit statuses."""
        for process in self.processes:
            process.join(timeout_s)
        statuses = [process.exitcode for process in self.processes]
        if None in statuses:
            self.kill()
        return statuses

    @property
    def alive(self) -> bool:
        """Whether a process of it still runs."""
        return any(process.is_alive() for process in self.processes)


def _live(words: list[str], log: str, rank: int, ranks: int, port: int, before: Callable[[int], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
    if ranks > 1:
        os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(ranks),
                       'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}  # fmt: skip
        words = [words[0], '--launcher', 'pytorch', *words[1:]]
    if before is not None:
        before(rank)
    from xtuner.cli.main import main

    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no interpreter shutdown: that is time without anything of ours


def wait_for(condition: Callable[[], Any], life: Life, timeout_s: float = 60) -> None:
    """Returns when the condition holds or the life has ended."""
    deadline = time.monotonic() + timeout_s
    while not condition() and life.alive:
        assert time.monotonic() < deadline, 'nothing happened'
        time.sleep(0.002)


def metrics(work_dir: Path) -> list[dict[str, Any]]:
    """What the loss log says of each step, clocks left out."""
    lines = [json.loads(line) for line in (work_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    keys = ('step', 'loss', 'lr', 'grad_norm', 'num_targets', 'num_tokens', 'skipped', 'num_skipped', 'val_loss')
    return [{key: line[key] for key in keys if key in line} for line in lines]


def newest(work_dir: Path) -> Path:
    """The folder that `last` names."""
    return work_dir / (work_dir / 'last').read_text(encoding='utf-8').strip()


def result(work_dir: Path) -> dict[str, Any]:
    """The bytes that a run ended with, and its loss log."""
    folder = newest(work_dir)
    tensors = {name: (folder / name).read_bytes() for name in ('adapter_model.safetensors', 'trainer.safetensors')}
    state = dict(json.loads((folder / 'trainer.json').read_text(encoding='utf-8'))['dict'])
    state.pop('activation_rooms')  # of the machine, when the run began
    return tensors | {'state': state, 'metrics': metrics(work_dir)}


def steps_done(work_dir: Path) -> int:
    """The step of the newest checkpoint; 0 for none."""
    with contextlib.suppress(OSError, ValueError):
        return max((int(p.name.removeprefix('checkpoint-')) for p in work_dir.glob('checkpoint-*')), default=0)
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return int(listener.getsockname()[1])
