"""Merges adapters into their base model: plain weights that any tool loads.

An adapter that was trained on a 4- or 8-bit base belongs to those values. `--base auto` measures: it adds to the
published weights where the result answers as the trained model did, and else to the 4- or 8-bit values themselves.
Interrupted, it goes on where it was.
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
        'adapter', type=given_path, help='a checkpoint or work folder of `xtuner train`, or any peft LoRA adapter'
    )
    parser.add_argument('out', type=given_path, help='where the merged model goes; missing or empty')
    parser.add_argument('--weight', type=finite, default=1.0, help="how much of the adapter's change is taken (1)")
    parser.add_argument('--add', type=weighted, action='append', default=[], metavar='ADAPTER[:WEIGHT]',
                        help='a further adapter of the same base; may be given several times')  # fmt: skip
    parser.add_argument('--dtype', choices=('fp16', 'bf16', 'fp32'), help='fp16, or bf16 where training used it')
    parser.add_argument('--base', choices=('auto', 'original', 'dequantized'), default='auto',
                        help='added to: the published weights, what quantised training saw, or, by default, whichever '
                             'measurably keeps what was taught')  # fmt: skip
    parser.add_argument('--max-shard-size', type=size, default=2 * 10**9, metavar='SIZE', help='such as 2GB (default)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='where products are computed (cpu)')
    parser.add_argument('--verify', type=non_negative_int, metavar='N',
                        help='compare with base and adapter on N prompts; 0: never (a few where cheap)')  # fmt: skip
    parser.add_argument('--force', action='store_true', help='take an adapter that was trained on another base')


def run(args: argparse.Namespace) -> int:
    """Merges and prints the folder on stdout."""
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
    """argparse type: an adapter's folder, perhaps with its weight, as in `runs/b:0.5`."""
    path, _, weight = filled(text).rpartition(':')
    if not path or Path(text).is_dir():
        return Path(text), 1.0
    try:
        return Path(path), finite(weight)
    except ValueError:
        return Path(text), 1.0


def size(text: str) -> int:
    """argparse type: bytes, as in '500MB', '2GB' or '1000000'."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no size; write 500MB or 2GB')
    return int(float(match[1]) * {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}[match[2]])
