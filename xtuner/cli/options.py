"""Groups of arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and what replaces parts of it."""
    parser.add_argument('config', help='a shipped name (see `xtuner list-cfg`) or a file')
    parser.add_argument('--model', help="base model in place of the config's: a folder, a hub id or modelscope:ID")
    parser.add_argument(
        '--data', help="data in place of the config's: a hub id, a file or a folder; its format is detected"
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='further values, such as schedule.batch_size=2',
    )


def config_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The dotted overrides that `add_config_arguments` collected, for `load_config`."""
    from xtuner.config.load import parse_options

    overrides: dict[str, Any] = {}
    if args.model:
        overrides['model.path'] = args.model
    if args.data:
        overrides |= {'dataset.source': args.data, 'dataset.map_fn': None}
    return overrides | parse_options(args.cfg_options)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How an answer is drawn. The defaults are those of InternLM's model card."""
    parser.add_argument('--max-new-tokens', type=positive_int, default=1024, help='tokens an answer may have (1024)')
    parser.add_argument(
        '--temperature', type=non_negative_float, default=0.8, help='0: always the likeliest token (0.8)'
    )
    parser.add_argument('--top-p', type=share, default=0.8, help='draw from the likeliest tokens of this mass (0.8)')
    parser.add_argument('--seed', type=int, help='makes the draws repeatable')


def positive_int(text: str) -> int:
    """Argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
    return value


def non_negative_int(text: str) -> int:
    """Argparse type: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def non_negative_float(text: str) -> float:
    """Argparse type: a finite number from 0."""
    value = float(text)
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def share(text: str) -> float:
    """Argparse type: a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text}')
    return value
