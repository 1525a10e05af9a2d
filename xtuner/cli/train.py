"""Fine-tunes a model with a config and writes checkpoints, which are PEFT adapters, to work_dirs/NAME/."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.cli.early import check_config, say_loading
from xtuner.cli.options import add_config_arguments, filled, given_path, positive_int, read_config
from xtuner.errors import UsageError

if TYPE_CHECKING:
    from xtuner.config.schema import TrainConfig
    from xtuner.engine.checkpoint.resume import ResumeOptions

_NEWEST = 'newest'  # `xtuner.engine.checkpoint.resume.NEWEST`, which imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', type=given_path, help='folder for checkpoints and logs (default: work_dirs/NAME)')
    parser.add_argument(
        '--max-steps', type=positive_int, help="number of optimizer steps, overrides the config's epochs"
    )
    parser.add_argument(
        '--resume',
        type=filled,
        nargs='?',
        const=_NEWEST,
        metavar='CHECKPOINT',
        help='resume a run exactly, from its newest checkpoint or the given one; starts a new run if there is none',
    )
    parser.add_argument(
        '--allow-changes', action='store_true', help='resume even if the config, data or world size changed'
    )
    parser.add_argument(
        '--start-from',
        type=given_path,
        metavar='CHECKPOINT',
        help='start a new run with the weights of a checkpoint or adapter, without its training state',
    )
    parser.add_argument('--seed', type=int, help="random seed, overrides the config's")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for several devices on one or more nodes (docs/scale.md)."""
    group = parser.add_argument_group('several devices')
    group.add_argument(
        '--nproc-per-node', type=positive_int, help='number of GPUs (processes) to use on this node (or NPROC_PER_NODE)'
    )
    group.add_argument('--nnodes', type=positive_int, help='number of nodes; run this command on each (or NNODES)')
    group.add_argument('--node-rank', type=int, help='rank of this node, from 0 (or NODE_RANK)')
    group.add_argument('--master-addr', help='address of node 0 (or MASTER_ADDR)')
    group.add_argument('--master-port', type=positive_int, help='free port of node 0 (default: 29500; or MASTER_PORT)')
    group.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm'),
        default='none',
        help='launcher that started this process: pytorch for torchrun, slurm for srun',
    )
    group.add_argument('--strategy', help='single, ddp, fsdp, or a value of --deepspeed')
    group.add_argument(
        '--deepspeed', metavar='NAME', help='deepspeed_zero1, _zero2, _zero2_offload, _zero3, or a .json file'
    )


def run(args: argparse.Namespace) -> int:
    """Checks the config, trains, and prints the path of the last checkpoint to stdout, for scripts."""
    from xtuner.cli.log import start_logging

    _take_config_from_resume(args)
    overrides: dict[str, Any] = {}
    if args.max_steps is not None:
        overrides['schedule.max_steps'] = args.max_steps
    if args.seed is not None:
        overrides['runtime.seed'] = args.seed
    if args.strategy and args.deepspeed:
        raise UsageError('--strategy and --deepspeed both select a strategy; use only one of them')
    if args.strategy or args.deepspeed:
        overrides['parallel.strategy'] = args.strategy or args.deepspeed
    config = read_config(args, overrides)
    start_logging()
    work_dir = args.work_dir or Path('work_dirs') / Path(args.config).stem
    start = _checked_start(args, config, work_dir)
    say_loading()
    if args.launcher == 'none' and _needs_launcher(args, config.parallel.strategy):
        return _launch(args, config)

    from xtuner.engine.run import train
    from xtuner.ranks import is_first_process

    last = train(config, work_dir=work_dir, start=start, launcher=args.launcher)
    if is_first_process() and not (sys.stdout.isatty() and sys.stderr.isatty()):  # the last log line has it
        print(last)
    return 0


def _checked_start(args: argparse.Namespace, config: TrainConfig, work_dir: Path) -> ResumeOptions:
    """Checks the paths of the command before heavy imports; returns where the run starts."""
    from xtuner.engine.checkpoint.resume import ResumeOptions, check_start, check_work_dir
    from xtuner.ranks import is_first_process

    start = ResumeOptions(resume=args.resume, weights=args.start_from, allow_changes=args.allow_changes)
    check_start(work_dir, start)
    if is_first_process() and _node_rank(args) == 0:  # other ranks would find the first rank's lock
        check_work_dir(work_dir)
    check_config(config)
    return start


def _take_config_from_resume(args: argparse.Namespace) -> None:
    """Handles `--resume CONFIG`, where argparse takes CONFIG as the value of `--resume`."""
    if args.config is None and args.resume not in (None, _NEWEST) and not Path(args.resume).is_dir():
        args.config, args.resume = args.resume, _NEWEST


# Options of the launch only; torch passes this information to the processes that it starts.
_LAUNCH_OPTIONS = ('--nproc-per-node', '--nnodes', '--node-rank', '--master-addr', '--master-port')


def _needs_launcher(args: argparse.Namespace, strategy: str) -> bool:
    """Whether to start processes; DeepSpeed and sharding need a process group even with one process."""
    several = _count(args.nproc_per_node, 'NPROC_PER_NODE') > 1 or _count(args.nnodes, 'NNODES') > 1
    return several or strategy not in ('auto', 'single')


def _launch(args: argparse.Namespace, config: TrainConfig) -> int:
    """Starts the processes of this node and waits for them."""
    from xtuner.engine.distributed.choose import choose_strategy
    from xtuner.engine.distributed.launch import Nodes, run_on_devices

    num_nodes = _count(args.nnodes, 'NNODES')
    port = args.master_port or os.environ.get('MASTER_PORT', os.environ.get('PORT'))
    nodes = Nodes(
        num_processes=_count(args.nproc_per_node, 'NPROC_PER_NODE'),
        num_nodes=num_nodes,
        node_rank=_node_rank(args),
        address=args.master_addr or os.environ.get('MASTER_ADDR', '127.0.0.1'),
        port=int(port) if port is not None else None,
    )
    choose_strategy(config, nodes.world_size)  # reports errors before any process is started
    words = sys.argv[1:]
    for option in _LAUNCH_OPTIONS:
        words = _without_option(words, option)
    return run_on_devices(words, nodes)


def _node_rank(args: argparse.Namespace) -> int:
    return args.node_rank if args.node_rank is not None else int(os.environ.get('NODE_RANK', 0))


def _count(given: int | None, variable: str) -> int:
    return given or int(os.environ.get(variable, 1))


def _without_option(words: list[str], option: str) -> list[str]:
    """Removes an option and its value from a command line."""
    kept = [word for word in words if not word.startswith(f'{option}=')]
    if option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept
