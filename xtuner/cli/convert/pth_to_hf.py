"""Converts a checkpoint of classical xtuner (`.pth`, or a DeepSpeed folder) to a peft adapter or a model.

Checkpoints of `xtuner train` need no conversion: they are adapters already.
"""

from __future__ import annotations

import argparse

from xtuner.cli.convert.merge import size
from xtuner.cli.options import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('config', help='the config of the run: a file or the name of a shipped config')
    parser.add_argument(
        'checkpoint', type=given_path, help='a file such as iter_500.pth, or the folder written by DeepSpeed'
    )
    parser.add_argument('out', type=given_path, help='output folder; missing or empty')
    parser.add_argument('--fp32', action='store_true', help='write float32 (default: float16)')
    parser.add_argument(
        '--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='maximum size of a shard (default: 2GB)'
    )


def run(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints the path of the output folder to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    import torch

    from xtuner.convert.pth_to_hf import pth_to_hf

    dtype = torch.float32 if args.fp32 else torch.float16
    print(pth_to_hf(args.config, args.checkpoint, args.out, dtype=dtype, max_shard_bytes=args.max_shard_size))
    return 0
