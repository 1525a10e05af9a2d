"""Chats with a model, with or without an adapter.

With piped input, each line of input is one turn of a conversation and produces one line of output.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from xtuner.chat.web.port import check_port
from xtuner.cli.early import check_adapters, check_model, say_loading
from xtuner.cli.options import add_base_arguments, add_sampling_arguments, filled, given_path, positive_int
from xtuner.errors import UsageError

if TYPE_CHECKING:
    from xtuner.chat.load import ChatModel
    from xtuner.chat.web.talk import SharedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', type=filled, help='the model: a folder or a hub id')
    parser.add_argument('--adapter', type=given_path, help='a checkpoint of `xtuner train`, or any peft adapter')
    parser.add_argument('--prompt-template', help='prompt template (default: that of the adapter or model)')
    parser.add_argument('--system', default='', help='system message')
    add_base_arguments(parser)
    parser.add_argument(
        '--with-plugins', nargs='+', metavar='NAME', default=[],
        help='enable tools for a model trained on MOSS plugins: calculate, solve, search',
    )  # fmt: skip
    parser.add_argument(
        '--trust-remote-code', action='store_true', help="allow running Python code from the model's files"
    )
    parser.add_argument('--web', action='store_true', help='chat on a web page, served on this machine only')
    parser.add_argument(
        '--port', type=positive_int, help='port of the web page (default: the first free port from 8501)'
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model, then chats until the input ends, or serves the web page until Ctrl-C."""
    if args.web and args.with_plugins:
        raise UsageError('--with-plugins works in the terminal only; remove it or --web')
    if args.web:
        return _run_page(args)
    if args.port:
        raise UsageError('--port sets the port of the web page; add --web')
    from xtuner.cli.log import start_logging

    start_logging()
    _check_early(args)
    from xtuner.chat.plugins.find import open_plugins
    from xtuner.chat.terminal import chat_interactive, chat_piped, show_call
    from xtuner.inference.generate import Sampling

    plugins = open_plugins(args.with_plugins)  # before anything is loaded
    chat = _open(args)
    settings: Any = {
        'system': args.system,
        'sampling': Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed),
    }
    session = chat.moss_session(plugins, show_call, **settings) if plugins else chat.session(**settings)
    if sys.stdin.isatty():
        chat_interactive(session, sys.stdout)
    else:
        chat_piped(session, sys.stdin, sys.stdout)
    return 0


def _check_early(args: argparse.Namespace) -> None:
    check_model(args.llm, trust_remote_code=args.trust_remote_code)
    check_adapters(*filter(None, [args.adapter]))
    say_loading()


def _open(args: argparse.Namespace) -> ChatModel:
    from xtuner.chat.load import open_chat_model

    chat = open_chat_model(
        args.llm,
        adapter=args.adapter,
        template=args.prompt_template,
        bits=args.bits,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    chat.warm()
    return chat


def load_shared_model(args: argparse.Namespace) -> SharedModel:
    """Loads the model that all tabs of the web page share."""
    from xtuner.chat.web.talk import SharedModel
    from xtuner.inference.generate import Sampling

    chat = _open(args)
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
    if args.port:
        check_port(args.port)
    try:
        import streamlit.starlette  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] not in ('streamlit', 'starlette'):
            raise
        raise UsageError(f"--web needs Streamlit ({error}): pip install 'xtuner[web]'") from error
    _check_early(args)
    from xtuner.chat.web.app import run_app

    run_app(load_shared_model(args), args.port)
    return 0
