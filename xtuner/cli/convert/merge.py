"""Merges adapters into their base model and writes plain weights that any tool loads.

An adapter trained on a 4- or 8-bit base was trained on the quantized values. `--base auto` measures both options: it
merges into the original weights if the result answers like the trained model, otherwise into the dequantized weights.
An interrupted merge continues where it stopped.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from xtuner.cli.early import check_adapters, check_model, say_loading
from xtuner.cli.options import filled, finite, given_path, non_negative_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', type=filled, help='the base model: a folder or a hub id')
    parser.add_argument(
        'adapter', type=given_path, help='a checkpoint or work directory of `xtuner train`, or any peft LoRA adapter'
    )
    parser.add_argument('out', type=given_path, help='output folder; missing or empty')
    parser.add_argument('--weight', type=finite, default=1.0, help='scale of the adapter (default: 1)')
    parser.add_argument('--add', type=weighted, action='append', default=[], metavar='ADAPTER[:WEIGHT]',
                        help='another adapter of the same base; repeatable')  # fmt: skip
    parser.add_argument(
        '--dtype', choices=('fp16', 'bf16', 'fp32'), help='output dtype (default: bf16 if trained in it, else fp16)'
    )
    parser.add_argument('--base', choices=('auto', 'original', 'dequantized'), default='auto',
                        help='merge into the original weights or the dequantized weights of training; auto measures '
                             'which of them reproduces the trained model (default: auto)')  # fmt: skip
    parser.add_argument(
        '--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='maximum size of a shard (default: 2GB)'
    )
    parser.add_argument(
        '--device', choices=('cpu', 'cuda'), default='cpu', help='device for matrix products (default: cpu)'
    )
    parser.add_argument('--verify', type=non_negative_int, metavar='N',
                        help='compare with base and adapter on N prompts; 0: never (default: automatic)')  # fmt: skip
    parser.add_argument('--force', action='store_true', help='accept an adapter that was trained on another base')


def run(args: argparse.Namespace) -> int:
    """Merges and prints the path of the output folder to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.output import check_output

    check_output(args.out)
    check_model(args.llm)
    check_adapters(args.adapter, *(path for path, _ in args.add))
    say_loading()
    from xtuner.convert.merge import merge

    out = merge(
        args.llm,
        args.adapter,
        args.out,
        weight=args.weight,
        more=args.add,
        dtype=args.dtype,
        base=args.base,
        max_shard_bytes=args.max_shard_size,
        device=args.device,
        verify=args.verify,
        force=args.force,
    )
    print(out)
    return 0


def weighted(text: str) -> tuple[Path, float]:
    """Argparse type: an adapter folder with an optional weight, as in `runs/b:0.5`."""
    path, _, weight = filled(text).rpartition(':')
    if not path or Path(text).is_dir():
        return Path(text), 1.0
    try:
        return Path(path), finite(weight)
    except ValueError:
        return Path(text), 1.0


def size(text: str) -> int:
    """Argparse type: a number of bytes, as in '500MB', '2GB' or '1000000'."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a size; write for example 500MB or 2GB')
    return int(float(match[1]) * {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}[match[2]])
