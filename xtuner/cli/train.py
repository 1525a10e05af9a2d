"""Fine-tunes a model as a config says, from the first record to a PEFT adapter in work_dirs/NAME/."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xtuner.cli.options import add_config_arguments, config_overrides, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', type=Path, help='where checkpoints and logs go (work_dirs/NAME)')
    parser.add_argument('--max-steps', type=positive_int, help="optimizer steps, in place of the config's epochs")
    parser.add_argument(
        '--resume',
        nargs='?',
        const='newest',
        metavar='CHECKPOINT',
        help='go on exactly where a run was stopped: at its newest checkpoint, or the one given; without one, begin',
    )
    parser.add_argument(
        '--allow-changes', action='store_true', help='with --resume: go on although config, data or processes changed'
    )
    parser.add_argument(
        '--start-from',
        type=Path,
        metavar='CHECKPOINT',
        help='begin a new run with the weights of a checkpoint or adapter, and nothing else of it',
    )
    parser.add_argument('--seed', type=int, help="seed in place of the config's")
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm'),
        default='none',
        help='who started this process as one of several: torchrun or srun',
    )
    parser.add_argument(
        '--nproc-per-node', type=positive_int, help='train on so many devices of this machine (or set NPROC_PER_NODE)'
    )


def run(args: argparse.Namespace) -> int:
    """Checks the config, trains, and prints the last checkpoint's folder on stdout."""
    from xtuner.cli.log import start_logging
    from xtuner.config.find import find_config
    from xtuner.config.load import load_config

    overrides = config_overrides(args)
    if args.max_steps is not None:
        overrides['schedule.max_steps'] = args.max_steps
    if args.seed is not None:
        overrides['runtime.seed'] = args.seed
    config = load_config(args.config, overrides)
    num_processes = args.nproc_per_node or int(os.environ.get('NPROC_PER_NODE', 1))
    if num_processes > 1 and args.launcher == 'none':
        from xtuner.engine.launch import run_on_devices

        return run_on_devices(_without_option(sys.argv[1:], '--nproc-per-node'), num_processes)
    work_dir = args.work_dir or Path('work_dirs') / find_config(args.config).stem
    start_logging()

    from xtuner.engine.start import Start
    from xtuner.engine.train import train
    from xtuner.ranks import is_first_process

    start = Start(resume=args.resume, weights=args.start_from, allow_changes=args.allow_changes)
    last = train(config, work_dir=work_dir, start=start, launcher=args.launcher)
    if is_first_process():
        print(last)
    return 0


def _without_option(words: list[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    kept = [word for word in words if not word.startswith(f'{option}=')]
    if option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept
