"""Talks to a model, with or without an adapter.

Piped, each line of input is a turn of one conversation, and its answer one line of output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.cli.options import add_sampling_arguments, positive_int
from xtuner.errors import UsageError

if TYPE_CHECKING:
    from xtuner.chat.web.talk import SharedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', help='a model: a folder or a hub id')
    parser.add_argument('--adapter', type=Path, help='a checkpoint folder of `xtuner train`, or any peft adapter')
    parser.add_argument('--prompt-template', help='prompt template in place of the one that comes with the model')
    parser.add_argument('--system', default='', help='system message')
    parser.add_argument('--bits', type=int, choices=(4, 8), help='hold the base in so many bits a weight')
    parser.add_argument('--trust-remote-code', action='store_true', help="run code that comes with the model's files")
    parser.add_argument('--web', action='store_true', help='chat on a web page on this machine')
    parser.add_argument('--port', type=positive_int, help='port of the web page (the first free one from 8501)')
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Loads, then chats until the input ends, or the page is closed by Ctrl-C."""
    if args.web:
        return _run_page(args)
    if args.port:
        raise UsageError('--port is of the web page; add --web')
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


def load_shared_model(args: argparse.Namespace) -> SharedModel:
    """Loads what the page's tabs share."""
    from xtuner.chat.load import open_chat_model
    from xtuner.chat.web.talk import SharedModel
    from xtuner.model.generate import Sampling

    chat = open_chat_model(
        args.llm,
        adapter=args.adapter,
        template=args.prompt_template,
        bits=args.bits,
        trust_remote_code=args.trust_remote_code,
    )
    return SharedModel(
        chat,
        name=args.llm,
        adapter=str(args.adapter or ''),
        system=args.system,
        sampling=Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed),
    )


def _run_page(args: argparse.Namespace) -> int:
    from xtuner.cli.log import start_logging

    start_logging()
    try:
        from xtuner.chat.web.app import check_port, run_app
    except ModuleNotFoundError as error:
        if error.name not in ('streamlit', 'starlette'):
            raise
        raise UsageError("--web needs Streamlit: pip install 'xtuner[web]'") from error
    if args.port:
        check_port(args.port)
    run_app(load_shared_model(args), args.port)
    return 0
