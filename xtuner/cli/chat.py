"""Talks to a model, with or without an adapter.

Piped, each line of input is a turn of one conversation, and its answer one line of output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xtuner.cli.options import add_sampling_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', help='a model: a folder or a hub id')
    parser.add_argument('--adapter', type=Path, help='a checkpoint folder of `xtuner train`, or any peft adapter')
    parser.add_argument('--prompt-template', help='prompt template in place of the one that comes with the model')
    parser.add_argument('--system', default='', help='system message')
    parser.add_argument('--bits', type=int, choices=(4, 8), help='hold the base in so many bits a weight')
    parser.add_argument('--trust-remote-code', action='store_true', help="run code that comes with the model's files")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Loads, then chats until the input ends."""
    from xtuner.cli.log import start_logging

    start_logging()
    from xtuner.chat.load import open_session
    from xtuner.chat.terminal import chat_interactive, chat_piped
    from xtuner.model.generate import Sampling

    session = open_session(
        args.llm,
        adapter=args.adapter,
        template=args.prompt_template,
        system=args.system,
        bits=args.bits,
        sampling=Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed),
        trust_remote_code=args.trust_remote_code,
    )
    if sys.stdin.isatty():
        chat_interactive(session, sys.stdout)
    else:
        chat_piped(session, sys.stdin, sys.stdout)
    return 0
