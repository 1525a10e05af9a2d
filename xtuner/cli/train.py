"""Fine-tunes a model as a config says, from the first record to a PEFT adapter in work_dirs/NAME/."""

from __future__ import annotations

import argparse
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
        help='go on with a run: from its newest checkpoint, or from the one given',
    )
    parser.add_argument('--seed', type=int, help="seed in place of the config's")


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
    work_dir = args.work_dir or Path('work_dirs') / find_config(args.config).stem
    start_logging()

    from xtuner.engine.train import train

    print(train(config, work_dir=work_dir, resume=args.resume))
    return 0
