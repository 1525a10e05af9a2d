"""Merges an adapter into its base model: plain weights that any tool loads."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', help='the base model: a folder or a hub id')
    parser.add_argument('adapter', type=Path, help='a checkpoint folder of `xtuner train`, or any peft LoRA adapter')
    parser.add_argument('out', type=Path, help='where the merged model goes; missing or empty')
    parser.add_argument('--dtype', choices=('fp16', 'bf16', 'fp32'), help='fp16, or bf16 where training used it')
    parser.add_argument('--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='such as 2GB (default)')


def run(args: argparse.Namespace) -> int:
    """Merges and prints the folder on stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.merge import merge

    print(merge(args.llm, args.adapter, args.out, dtype=args.dtype, max_shard_bytes=args.max_shard_size))
    return 0


def size(text: str) -> int:
    """argparse type: bytes, as in '500MB', '2GB' or '1000000'."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no size; write 500MB or 2GB')
    return int(float(match[1]) * {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}[match[2]])
