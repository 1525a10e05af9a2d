"""Serves a model and any number of adapters over HTTP with the OpenAI API, with concurrent requests.

Each adapter is a separate model: the field `model` of a request selects it by name (default: the name of its folder).
The API key is read from a file or from the variable XTUNER_API_KEY.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from xtuner.cli.early import check_adapters, check_model, say_loading
from xtuner.cli.options import add_base_arguments, add_sampling_arguments, filled, given_path, positive_int
from xtuner.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('llm', type=filled, help='the model: a folder or a hub id')
    parser.add_argument('--adapter', type=filled, action='append', default=[], metavar='[NAME=]FOLDER',
                        help='a checkpoint of `xtuner train`, or any peft adapter; repeatable')  # fmt: skip
    parser.add_argument('--prompt-template', help='prompt template (default: that of each adapter or model)')
    add_base_arguments(parser)
    parser.add_argument('--no-weight-cache', dest='weight_cache', action='store_false',
                        help='do not cache dequantized or repacked weights: less memory, slower')  # fmt: skip
    parser.add_argument('--packed', dest='weight_cache', action='store_false', help=argparse.SUPPRESS)  # earlier name
    parser.add_argument(
        '--trust-remote-code', action='store_true', help="allow running Python code from the model's files"
    )
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on (default: 127.0.0.1, this machine only)'
    )
    parser.add_argument(
        '--port', type=port_number, default=8000, help='port to listen on; 0 selects a free port (default: 8000)'
    )
    parser.add_argument('--api-key-file', type=given_path, help='file whose first line is the required API key')
    parser.add_argument(
        '--max-streams', type=positive_int, default=16, help='answers generated concurrently (default: 16)'
    )
    parser.add_argument(
        '--max-waiting', type=positive_int, default=64, help='queued answers, beyond that status 429 (default: 64)'
    )
    parser.add_argument('--max-length', type=positive_int, default=4096,
                        help="maximum tokens of prompt and answer, limited by the model (default: 4096)")  # fmt: skip
    parser.add_argument(
        '--max-body-kib', type=positive_int, default=1024, help='maximum size of a request in KiB (default: 1024)'
    )
    parser.add_argument('--grace', type=positive_int, default=30, metavar='SECONDS',
                        help='time for running answers to finish at shutdown (default: 30)')  # fmt: skip
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model, then serves until a signal arrives."""
    from xtuner.cli.log import start_logging

    start_logging()
    key = read_key(args.api_key_file)
    try:
        from xtuner.serve.address import Address, base_name_of, name_adapters, warn_if_exposed
        from xtuner.serve.server import listen
    except ModuleNotFoundError as error:
        if error.name not in ('starlette', 'uvicorn'):
            raise
        raise UsageError(f"serving needs {error.name}: pip install 'xtuner[serve]'") from None
    folders = name_adapters(args.adapter, base_name_of(args.llm))
    sockets = listen(args.host, args.port)
    address = Address(args.host, args.port, is_loopback(args.host), key)
    warn_if_exposed(address)
    check_model(args.llm, trust_remote_code=args.trust_remote_code)
    check_adapters(*folders.values())
    say_loading()
    from xtuner.chat.base import BaseChoice
    from xtuner.inference.generate import Sampling
    from xtuner.serve.app import Limits
    from xtuner.serve.run import ServedSource, run_service

    base = BaseChoice(args.bits, args.dtype, args.device)
    run_service(
        ServedSource(args.llm, args.adapter, args.prompt_template, base, args.weight_cache, args.trust_remote_code),
        address,
        sockets,
        Limits(args.max_length, 1024 * args.max_body_kib, streams=args.max_streams, waiting=args.max_waiting),
        sampling=Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed),
        grace_s=args.grace,
    )
    return 0


def read_key(file: Path | None) -> str:
    """The API key: the first line of the file, or the variable XTUNER_API_KEY, or '' for none.

    Raises:
        UsageError: the file cannot be read, or the key is empty or contains a character not allowed in a header.
    """
    if file is None:
        key, source = os.environ.get('XTUNER_API_KEY', ''), 'XTUNER_API_KEY'
        if not key:
            return ''
    else:
        source = f'--api-key-file {file}'
        try:
            key = (file.read_text(encoding='utf-8').splitlines() or [''])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f'{source}: cannot be read ({type(error).__name__})') from None
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UsageError(f'{source}: contains no API key: one line of printable ASCII characters')
    return key.strip()


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def port_number(text: str) -> int:
    """Argparse type: a port number."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f'must be from 0 to 65535, got {text}')
    return value
