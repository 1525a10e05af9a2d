"""One process or several: who started us, and starting several ourselves, through torch's own launcher."""

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
_SAVING_S = 600  # time for a checkpoint after a signal, before what is left is killed
# What Slurm calls the variables that torch reads.
_SLURM_VARIABLES = {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'}


@dataclass(frozen=True)
class Group:
    """This process among the others: its rank, how many there are, and the watch over them (None for one alone)."""

    rank: int = 0
    world_size: int = 1
    watch: Watchdog | None = None


@dataclass(frozen=True)
class Nodes:
    """The machines of a run that `xtuner train` launches itself.

    Attributes:
        num_processes: Processes on each.
        num_nodes: Machines.
        node_rank: This one, from 0.
        address: Of machine 0.
        port: Free on machine 0; None for any, which only one machine can have.
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
            raise UsageError(f'--nproc-per-node {self.num_processes}, but this machine has {num_gpus} GPUs')

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_nodes


@contextmanager
def process_group(launcher: str, *, timeout_s: float = 1800) -> Iterator[Group]:
    """Joins this process to its group for the time of a run.

    Args:
        launcher: 'none' for a single process; 'pytorch' under torchrun; 'slurm' under srun.
        timeout_s: How long a collective waits for a rank.

    Raises:
        UsageError: the launcher did not set the variables that it should have.
    """
    if launcher == 'none':
        yield Group()
        return
    if launcher == 'slurm':
        _take_slurm_variables()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR') if name not in os.environ]
    if missing:
        how = 'torchrun' if launcher == 'pytorch' else 'srun'
        raise UsageError(f'--launcher {launcher} needs {", ".join(missing)} in the environment; start with {how}')
    if not _is_known(os.environ['MASTER_ADDR']):  # torch would try for as long as a collective may wait
        raise UsageError(f'MASTER_ADDR {os.environ["MASTER_ADDR"]} is no name that this machine knows; set it to the '
                         'address of the machine that rank 0 runs on')  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.set_device(_device_index(int(os.environ['LOCAL_RANK']), launcher))
    # The watch names who hangs; the collectives' own time-out, which cannot, stands behind it.
    patience = timedelta(seconds=2 * timeout_s + 5)
    distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', timeout=patience)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    watch = start_watchdog(rank, world_size, timeout_s)
    yield Group(rank, world_size, watch)
    # After a failure nothing is taken apart: it would wait for ranks that wait for us. The process ends anyway.
    if watch is not None:
        watch.stop()
    distributed.destroy_process_group()


def sequence_group(size: int) -> SequenceGroup:
    """This process's group of neighbours that share packs: `size` consecutive ranks, on one machine where they fit."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    own = None
    for first in range(0, world_size, size):  # every rank takes part in making every group
        group = distributed.new_group(list(range(first, first + size)))
        own = group if first <= rank < first + size else own
    return SequenceGroup(own, rank % size, size)


def run_on_devices(arguments: Sequence[str], nodes: Nodes) -> int:
    """Runs an `xtuner` command in several processes of this machine, with this interpreter; returns its exit status.

    Raises:
        TrainingError: a process failed; the message is the first failed one's, the exit status its own.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL + 1)  # our line says it
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
    """The error of a run: of a process that was killed, else of the one that left a word."""
    killed = {
        r: f for r, f in failures.items() if f.exitcode < 0 and -f.exitcode not in (signal.SIGTERM, signal.SIGINT)
    }
    told = {r: f for r, f in failures.items() if isinstance(f.message, dict)}
    if told and not killed:
        failure = next(iter(told.values()))
        error = TrainingError(failure.message['message'])
        error.exit_status = failure.exitcode if failure.exitcode > 0 else 1
        return error
    rank, failure = next(iter((killed or failures).items()))
    if not killed:
        error = TrainingError(f'rank {rank} ended with exit status {failure.exitcode} and said nothing')
        error.exit_status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return error
    name = failure.signal_name()
    why = ', maybe for lack of host memory (see `dmesg`)' if -failure.exitcode == signal.SIGKILL else ''
    return TrainingError(f'rank {rank} was killed by {name}{why}; the last checkpoint is kept')


def _stopped(number: int, folder: Path) -> Interrupted:
    """The end of a run by a signal, in the words of the process that saved."""
    for path in sorted(folder.glob('**/error.json')):
        return Interrupted(number, json.loads(path.read_text(encoding='utf-8'))['message']['message'])
    return Interrupted(number, 'stopped before anything was trained')


def _device_index(local_rank: int, launcher: str) -> int:
    """Which of the GPUs that this process sees is its own.

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
            f'LOCAL_RANK is {local_rank}, and this process sees {count} GPUs; start at most {count} processes on a '
            'machine'
        )
    return local_rank


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _slurm_address(node: str) -> str:
    """Where Slurm itself finds a node whose name is no host name; the name where it does not say."""
    told = _ask_slurm('node', node)
    return next((word.partition('=')[2] for word in told.split() if word.startswith('NodeAddr=')), node)


def _ask_slurm(what: str, name: str) -> str:
    try:
        return subprocess.check_output(['scontrol', 'show', what, name], text=True, stderr=subprocess.PIPE)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = one_line(getattr(error, 'stderr', None) or error)
        raise UsageError(f'`scontrol show {what} {name}` failed ({reason}); set MASTER_ADDR to the address of the '
                         'machine that rank 0 runs on') from error  # fmt: skip


def _take_slurm_variables() -> None:
    for name, slurm_name in _SLURM_VARIABLES.items():
        if slurm_name in os.environ:
            os.environ.setdefault(name, os.environ[slurm_name])
    nodes = os.environ.get('SLURM_STEP_NODELIST', os.environ.get('SLURM_NODELIST', ''))
    if nodes and 'MASTER_ADDR' not in os.environ:
        first = _ask_slurm('hostnames', nodes).split()[0]
        os.environ['MASTER_ADDR'] = first if _is_known(first) else _slurm_address(first)
    # A port that all tasks of the job agree on without talking, away from other jobs' on the same node.
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 20000))
