"""Writes the adapter, or the whole model, that a checkpoint of classical xtuner holds (`.pth`, or DeepSpeed's folder).

Checkpoints of `xtuner train` need no conversion: each is an adapter already.
"""

from __future__ import annotations

import argparse

from xtuner.cli.convert.merge import size
from xtuner.cli.options import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('config', help="the run's config: a file or a shipped name")
    parser.add_argument('checkpoint', type=given_path, help='iter_500.pth: a file, or the folder that DeepSpeed writes')
    parser.add_argument('out', type=given_path, help='where the adapter or model goes; missing or empty')
    parser.add_argument('--fp32', action='store_true', help='keep float32 (float16)')
    parser.add_argument('--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='such as 2GB (default)')


def run(args: argparse.Namespace) -> int:
    """Converts and prints the folder on stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    import torch

    from xtuner.convert.pth_to_hf import pth_to_hf

    dtype = torch.float32 if args.fp32 else torch.float16
    print(pth_to_hf(args.config, args.checkpoint, args.out, dtype=dtype, max_shard_bytes=args.max_shard_size))
    return 0
