"""Copies a model with its weights split into smaller shards, by default one tensor per file."""

from __future__ import annotations

import argparse

from xtuner.cli.convert.merge import size
from xtuner.cli.options import filled, given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('model', type=filled, help='the model: a folder or a hub id')
    parser.add_argument('out', type=given_path, help='output folder; missing or empty')
    parser.add_argument(
        '--max-shard-size',
        type=size,
        default=1,
        metavar='SIZE',
        help='maximum size of a shard (default: one tensor per file)',
    )


def run(args: argparse.Namespace) -> int:
    """Splits the weights and prints the path of the output folder to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.split import split

    print(split(args.model, args.out, max_shard_bytes=args.max_shard_size))
    return 0
