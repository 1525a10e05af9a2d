"""Fine-tunes a model as a config says, from the first record to a PEFT adapter in work_dirs/NAME/."""

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
    parser.add_argument('--work-dir', type=given_path, help='where checkpoints and logs go (work_dirs/NAME)')
    parser.add_argument('--max-steps', type=positive_int, help="optimizer steps, in place of the config's epochs")
    parser.add_argument(
        '--resume',
        type=filled,
        nargs='?',
        const=_NEWEST,
        metavar='CHECKPOINT',
        help='go on exactly where a run was stopped: at its newest checkpoint, or the one given; without one, begin',
    )
    parser.add_argument(
        '--allow-changes', action='store_true', help='with --resume: go on although config, data or processes changed'
    )
    parser.add_argument(
        '--start-from',
        type=given_path,
        metavar='CHECKPOINT',
        help='begin a new run with the weights of a checkpoint or adapter, and nothing else of it',
    )
    parser.add_argument('--seed', type=int, help="seed in place of the config's")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Several devices, one or many machines (docs/scale.md)."""
    group = parser.add_argument_group('several devices')
    group.add_argument(
        '--nproc-per-node', type=positive_int, help='train on so many devices of this machine (or set NPROC_PER_NODE)'
    )
    group.add_argument('--nnodes', type=positive_int, help='machines, each started with this command (or NNODES)')
    group.add_argument('--node-rank', type=int, help='number of this machine, from 0 (or NODE_RANK)')
    group.add_argument('--master-addr', help='address of machine 0 (or MASTER_ADDR)')
    group.add_argument('--master-port', type=positive_int, help='a free port of machine 0 (29500; or MASTER_PORT)')
    group.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm'),
        default='none',
        help='who started this process as one of several: torchrun or srun',
    )
    group.add_argument('--strategy', help='single, ddp, fsdp, or what --deepspeed takes')
    group.add_argument(
        '--deepspeed', metavar='NAME', help='deepspeed_zero1, _zero2, _zero2_offload, _zero3, or a .json'
    )


def run(args: argparse.Namespace) -> int:
    """Checks the config, trains, and prints the last checkpoint's folder on stdout, for scripts."""
    from xtuner.cli.log import start_logging

    _take_config_from_resume(args)
    overrides: dict[str, Any] = {}
    if args.max_steps is not None:
        overrides['schedule.max_steps'] = args.max_steps
    if args.seed is not None:
        overrides['runtime.seed'] = args.seed
    if args.strategy and args.deepspeed:
        raise UsageError('--strategy and --deepspeed both name a strategy; give one of them')
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
    if is_first_process() and not (sys.stdout.isatty() and sys.stderr.isatty()):  # there the log's last line says it
        print(last)
    return 0


def _checked_start(args: argparse.Namespace, config: TrainConfig, work_dir: Path) -> ResumeOptions:
    """Where the run begins, and whether the paths of the command allow it, before anything heavy is imported."""
    from xtuner.engine.checkpoint.resume import ResumeOptions, check_start, check_work_dir
    from xtuner.ranks import is_first_process

    start = ResumeOptions(resume=args.resume, weights=args.start_from, allow_changes=args.allow_changes)
    check_start(work_dir, start)
    if is_first_process() and _node_rank(args) == 0:  # the others would find the lock of the first
        check_work_dir(work_dir)
    check_config(config)
    return start


def _take_config_from_resume(args: argparse.Namespace) -> None:
    """`--resume CONFIG`: argparse takes the word after the option for its value, whichever was meant."""
    if args.config is None and args.resume not in (None, _NEWEST) and not Path(args.resume).is_dir():
        args.config, args.resume = args.resume, _NEWEST


# What concerns the launch alone; the processes that it starts are told by torch.
_LAUNCH_OPTIONS = ('--nproc-per-node', '--nnodes', '--node-rank', '--master-addr', '--master-port')


def _needs_launcher(args: argparse.Namespace, strategy: str) -> bool:
    """Whether there are several processes to start; DeepSpeed and sharding want a group even of one."""
    several = _count(args.nproc_per_node, 'NPROC_PER_NODE') > 1 or _count(args.nnodes, 'NNODES') > 1
    return several or strategy not in ('auto', 'single')


def _launch(args: argparse.Namespace, config: TrainConfig) -> int:
    """Starts the processes of this machine and waits for them."""
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
    choose_strategy(config, nodes.world_size)  # an error here is one line, before anything is started
    words = sys.argv[1:]
    for option in _LAUNCH_OPTIONS:
        words = _without_option(words, option)
    return run_on_devices(words, nodes)


def _node_rank(args: argparse.Namespace) -> int:
    return args.node_rank if args.node_rank is not None else int(os.environ.get('NODE_RANK', 0))


def _count(given: int | None, variable: str) -> int:
    return given or int(os.environ.get(variable, 1))


def _without_option(words: list[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    kept = [word for word in words if not word.startswith(f'{option}=')]
    if option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept
