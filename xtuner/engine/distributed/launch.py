"""Joins or starts the processes of a run, through torch's launcher, torchrun or Slurm."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from xtuner.engine.distributed.watchdog import Watchdog, start_watchdog
from xtuner.errors import Interrupted, TrainingError, UsageError, one_line
from xtuner.fused.ulysses import SequenceGroup
from xtuner.ranks import CHILD

LAUNCHERS = ('none', 'pytorch', 'slurm')
_DEFAULT_PORT = 29500
_SAVING_S = 600  # time for a checkpoint after a signal, before remaining processes are killed
# Slurm's names of the variables that torch reads.
_SLURM_VARIABLES = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process, number of processes, and the watchdog (None for a single process)."""

    rank: int = 0
    world_size: int = 1
    watch: Watchdog | None = None


@dataclass(frozen=True)
class Nodes:
    """The machines of a run that `xtuner train` launches.

    Attributes:
        num_processes: Processes per machine.
        num_nodes: Number of machines.
        node_rank: Rank of this machine, from 0.
        address: Address of machine 0.
        port: Port on machine 0; None for any free one, only for a single machine.
    """

    num_processes: int
    num_nodes: int = 1
    node_rank: int = 0
    address: str = '127.0.0.1'
    port: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.num_nodes:
            raise UsageError(f'--node-rank {self.node_rank} must be from 0 to --nnodes - 1, {self.num_nodes - 1}')
        if self.num_nodes > 1 and self.address in ('127.0.0.1', 'localhost'):
            raise UsageError('--nnodes needs --master-addr: the address of the machine with --node-rank 0')
        num_gpus = torch.cuda.device_count()
        if num_gpus and self.num_processes > num_gpus:
            raise UsageError(f'--nproc-per-node is {self.num_processes}, but this machine has {num_gpus} GPUs')

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.num_processes * self.num_nodes


@contextmanager
def process_group(launcher: str, *, timeout_s: float = 1800) -> Iterator[RankInfo]:
    """Joins the process group for the duration of a run.

    Args:
        launcher: 'none' for a single process; 'pytorch' under torchrun; 'slurm' under srun.
        timeout_s: How long a collective waits for a rank.

    Raises:
        UsageError: The launcher did not set the required variables.
    """
    if launcher == 'none':
        yield RankInfo()
        return
    if launcher == 'slurm':
        _take_slurm_variables()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        how = 'torchrun' if launcher == 'pytorch' else 'srun'
        raise UsageError(f'--launcher {launcher} requires {", ".join(missing)} in the environment; start with {how}')
    if not _is_resolvable(os.environ['MASTER_ADDR']):  # torch would retry until the collectives' time-out
        raise UsageError(f'MASTER_ADDR {os.environ["MASTER_ADDR"]} cannot be resolved on this machine; set it to the '
                         'address of the machine of rank 0')  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.set_device(_device_index(int(os.environ['LOCAL_RANK']), launcher))
    # The watchdog names a rank that hangs; the collectives' own time-out, which cannot, is the fallback.
    collective_timeout = timedelta(seconds=2 * timeout_s + 5)
    distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', timeout=collective_timeout)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    watch = start_watchdog(rank, world_size, timeout_s)
    yield RankInfo(rank, world_size, watch)
    # After a failure nothing is shut down: it would wait for ranks that wait for this one. The process ends anyway.
    if watch is not None:
        watch.stop()
    distributed.destroy_process_group()


def sequence_group(size: int) -> SequenceGroup:
    """The group of `size` consecutive ranks that share packs, on one machine if they fit."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    my_group = None
    for first in range(0, world_size, size):  # every rank takes part in creating every group
        group = distributed.new_group(list(range(first, first + size)))
        my_group = group if first <= rank < first + size else my_group
    return SequenceGroup(my_group, rank % size, size)


def run_on_devices(arguments: Sequence[str], nodes: Nodes) -> int:
    """Runs an `xtuner` command in several processes of this machine with this interpreter; returns its exit status.

    Raises:
        TrainingError: A process failed, with the message and exit status of the first one that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL + 1)  # this package reports the error
    os.environ[CHILD] = '1'
    os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] = str(_SAVING_S)
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // nodes.num_processes)))
    with tempfile.TemporaryDirectory(prefix='xtuner-ranks-') as folder:
        config = LaunchConfig(
            min_nodes=nodes.num_nodes,
            max_nodes=nodes.num_nodes,
            nproc_per_node=nodes.num_processes,
            run_id='xtuner',
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **_rendezvous(nodes),
        )
        words = ['-m', 'xtuner.cli.main', *arguments, '--launcher', 'pytorch']
        try:
            elastic_launch(config, sys.executable)(*words)
        except ChildFailedError as error:
            raise _failure(error.failures) from None
        except SignalException as stopped:
            raise _stopped(int(stopped.sigval), Path(folder)) from None
    return 0


def _rendezvous(nodes: Nodes) -> dict[str, Any]:
    if nodes.num_nodes == 1:
        address = 'localhost:0' if nodes.port is None else f'localhost:{nodes.port}'
        return {'rdzv_backend': 'c10d', 'rdzv_endpoint': address, 'local_addr': 'localhost'}
    endpoint = f'{nodes.address}:{nodes.port or _DEFAULT_PORT}'
    return {'rdzv_backend': 'static', 'rdzv_endpoint': endpoint, 'rdzv_configs': {'rank': nodes.node_rank}}


def _failure(failures: dict[int, Any]) -> TrainingError:
    """The error of a run: of a process that was killed, else of the one that reported its error."""
    killed = {
        r: f for r, f in failures.items() if f.exitcode < 0 and -f.exitcode not in (signal.SIGTERM, signal.SIGINT)
    }
    reported = {r: f for r, f in failures.items() if isinstance(f.message, dict)}
    if reported and not killed:
        failure = next(iter(reported.values()))
        error = TrainingError(failure.message['message'])
        error.exit_status = failure.exitcode if failure.exitcode > 0 else 1
        return error
    rank, failure = next(iter((killed or failures).items()))
    if not killed:
        error = TrainingError(f'rank {rank} ended with exit status {failure.exitcode} and no error message')
        error.exit_status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return error
    name = failure.signal_name()
    why = ', possibly out of host memory (see `dmesg`)' if -failure.exitcode == signal.SIGKILL else ''
    return TrainingError(f'rank {rank} was killed by {name}{why}; the last checkpoint is kept')


def _stopped(number: int, folder: Path) -> Interrupted:
    """The end of a run by a signal, with the message of the process that saved."""
    for path in sorted(folder.glob('**/error.json')):
        return Interrupted(number, json.loads(path.read_text(encoding='utf-8'))['message']['message'])
    return Interrupted(number, 'stopped before anything was trained')


def _device_index(local_rank: int, launcher: str) -> int:
    """The index of this process's GPU among those that it sees.

    A process may see fewer GPUs than there are processes on its machine: Slurm can give each task its own, and a
    wrapper can set CUDA_VISIBLE_DEVICES for each.

    Raises:
        UsageError: torchrun started more processes than there are GPUs.
    """
    count = torch.cuda.device_count()
    if launcher == 'slurm' or count == 1:
        return local_rank % count
    if local_rank >= count:
        raise UsageError(
            f'LOCAL_RANK is {local_rank}, but this process sees {count} GPUs; start at most {count} processes per '
            'machine'
        )
    return local_rank


def _is_resolvable(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _slurm_address(node: str) -> str:
    """Slurm's address of a node whose name is not a host name; the name if Slurm does not know."""
    answer = _ask_slurm('node', node)
    return next((word.partition('=')[2] for word in answer.split() if word.startswith('NodeAddr=')), node)


def _ask_slurm(what: str, name: str) -> str:
    try:
        return subprocess.check_output(['scontrol', 'show', what, name], text=True, stderr=subprocess.PIPE)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = one_line(getattr(error, 'stderr', None) or error)
        raise UsageError(f'`scontrol show {what} {name}` failed ({reason}); set MASTER_ADDR to the address of the '
                         'machine of rank 0') from error  # fmt: skip


def _take_slurm_variables() -> None:
    for name, slurm_name in _SLURM_VARIABLES.items():
        if slurm_name in os.environ:
            os.environ.setdefault(name, os.environ[slurm_name])
    nodes = os.environ.get('SLURM_STEP_NODELIST', os.environ.get('SLURM_NODELIST', ''))
    if nodes and 'MASTER_ADDR' not in os.environ:
        first = _ask_slurm('hostnames', nodes).split()[0]
        os.environ['MASTER_ADDR'] = first if _is_resolvable(first) else _slurm_address(first)
    # A port that all tasks of the job derive without communication, distinct from other jobs' on the same node.
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 20000))
