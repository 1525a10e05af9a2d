"""Writes a model as one GGUF file for llama.cpp, by llama.cpp's own converter.

It comes with `pip install 'xtuner[gguf]'`; --converter names the one in a checkout of llama.cpp instead. InternLM goes
through `to-llama` on the way.
"""

from __future__ import annotations

import argparse

from xtuner.cli.options import filled, given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('model', type=filled, help='the model: a folder, such as one that `merge` wrote, or a hub id')
    parser.add_argument('out', type=given_path, help='the file; must not exist')
    add_converter_arguments(parser)
    parser.add_argument('--vocab-only', action='store_true', help='write the vocabulary alone')


def add_converter_arguments(parser: argparse.ArgumentParser) -> None:
    """How weights are written, and by what."""
    parser.add_argument('--outtype', choices=('auto', 'f32', 'f16', 'bf16', 'q8_0'), default='auto',
                        help='how weights are written; auto keeps 16 bit as they are')  # fmt: skip
    parser.add_argument('--converter', type=given_path, metavar='FILE', help='convert_hf_to_gguf.py of llama.cpp')


def run(args: argparse.Namespace) -> int:
    """Converts and prints the file on stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.gguf import to_gguf

    print(to_gguf(args.model, args.out, out_type=args.outtype, converter=args.converter, vocab_only=args.vocab_only))
    return 0
