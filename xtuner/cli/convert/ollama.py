"""Writes a folder for `ollama create NAME -f OUT/Modelfile`: a GGUF file and a Modelfile with the prompt format.

The GGUF file is written by llama.cpp's own converter, as in `convert gguf`.
"""

from __future__ import annotations

import argparse

from xtuner.cli.convert.gguf import add_converter_arguments
from xtuner.cli.options import filled, given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('model', type=filled, help='the model: a folder, such as the output of `merge`, or a hub id')
    parser.add_argument('out', type=given_path, help='output folder; missing or empty')
    parser.add_argument(
        '--template', metavar='NAME', help='prompt template (default: the one that the model was trained with)'
    )
    add_converter_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Converts the model and prints the path of the output folder to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.convert.ollama import to_ollama

    print(to_ollama(args.model, args.out, template=args.template, out_type=args.outtype, converter=args.converter))
    return 0
