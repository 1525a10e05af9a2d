"""One process or several: who started us, and starting several ourselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from xtuner.errors import UsageError

LAUNCHERS = ('none', 'pytorch', 'slurm')
_TIMEOUT = timedelta(minutes=30)
# What Slurm calls the variables that torch reads.
_SLURM_VARIABLES = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}


@contextmanager
def process_group(launcher: str) -> Iterator[tuple[int, int]]:
    """Joins this process to its group for the time of a run.

    Args:
        launcher: 'none' for a single process; 'pytorch' under torchrun; 'slurm' under srun.

    Yields:
        This process's rank and the number of processes.

    Raises:
        UsageError: the launcher did not set the variables that it should have.
    """
    if launcher == 'none':
        yield 0, 1
        return
    if launcher == 'slurm':
        _take_slurm_variables()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        how = 'torchrun' if launcher == 'pytorch' else 'srun'
        raise UsageError(f'--launcher {launcher} needs {", ".join(missing)} in the environment; start with {how}')
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', timeout=_TIMEOUT)
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def run_on_devices(arguments: Sequence[str], num_processes: int) -> int:
    """Runs an `xtuner` command in several processes of this machine, with this interpreter; returns its exit status."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(num_processes)]
    return subprocess.call([*launcher, '-m', 'xtuner.cli.main', *arguments, '--launcher', 'pytorch'])


def _take_slurm_variables() -> None:
    for name, slurm_name in _SLURM_VARIABLES.items():
        if slurm_name in os.environ:
            os.environ.setdefault(name, os.environ[slurm_name])
    nodes = os.environ.get('SLURM_STEP_NODELIST', os.environ.get('SLURM_NODELIST', ''))
    if nodes and 'MASTER_ADDR' not in os.environ:
        names = subprocess.check_output(['scontrol', 'show', 'hostnames', nodes], text=True).split()
        os.environ['MASTER_ADDR'] = names[0]
    # A port that all tasks of the job agree on without talking, away from other jobs' on the same node.
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 20000))
