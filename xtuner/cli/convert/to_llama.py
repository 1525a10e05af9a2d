"""Converts an InternLM model of any generation to a plain Llama checkpoint for vLLM, llama.cpp and others."""

from __future__ import annotations

import argparse

from xtuner.cli.convert.merge import size
from xtuner.cli.options import filled, given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('model', type=filled, help='the model: a folder, a hub id or modelscope:OWNER/NAME')
    parser.add_argument('out', type=given_path, help='output folder; missing or empty')
    parser.add_argument('--revision', help='branch, tag or commit of a hub model')
    parser.add_argument(
        '--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='maximum size of a shard (default: 2GB)'
    )


def run(args: argparse.Namespace) -> int:
    """Converts the model and prints the path of the output folder to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.to_llama import to_llama

    print(to_llama(args.model, args.out, revision=args.revision, max_shard_bytes=args.max_shard_size))
    return 0
