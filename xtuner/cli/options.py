"""Groups of arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.errors import UsageError

if TYPE_CHECKING:
    from xtuner.config.schema import TrainConfig


@dataclass(frozen=True)
class Alias:
    """An option that is another name of a config's key.

    Attributes:
        key: The key.
        type: Reads the value.
        text: What the value is.
    """

    key: str
    type: Callable[[str], Any]
    text: str


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and what replaces parts of it."""
    config = parser.add_argument('config', help='a shipped name (see `xtuner list-cfg`) or a file')
    config.required = False  # `read_config` asks for it, once it has looked where else on the line it may stand
    parser.add_argument(
        '--model', type=filled, help="base model in place of the config's: a folder, a hub id or modelscope:ID"
    )
    parser.add_argument(
        '--data',
        type=filled,
        help="data in place of the config's: a hub id, a file or a folder; its format is detected",
    )
    for name, alias in ALIASES.items():
        parser.add_argument(name, type=alias.type, metavar='N', help=f'{alias.text}: {alias.key}')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='further values, such as schedule.batch_size=2',
    )


def read_config(args: argparse.Namespace, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Loads the config of a command line with all that `add_config_arguments` and the command put in its place.

    argparse gives every word after `--cfg-options` to it, CONFIG too; afterwards it is `args.config`.

    Args:
        args: The parsed command line.
        overrides: The command's own dotted keys and their values; `--cfg-options` go before them.

    Raises:
        UsageError: there is no CONFIG, or two options set one key.
        ConfigError: it does not exist, or something in it is wrong.
    """
    from xtuner.config.load import load_config, parse_options

    words = list(args.cfg_options)
    if args.config is None and words and '=' not in words[-1]:
        args.config = words.pop()
    if args.config is None:
        raise UsageError(
            'the following arguments are required: config (`xtuner list-cfg` lists those that are shipped)'
        )
    named: dict[str, Any] = {}
    if args.model:
        named['model.path'] = args.model
    if args.data:
        named |= {'dataset.source': args.data, 'dataset.map_fn': None}
    return load_config(args.config, named | _values_of(args, parse_options(words), overrides or {}))


def _values_of(args: argparse.Namespace, options: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the options of their own name, of `--cfg-options` and of the command, none of them twice."""
    values = {**options, **overrides}
    for name, alias in ALIASES.items():
        value = getattr(args, name.removeprefix('--').replace('-', '_'))
        if value is None:
            continue
        if alias.key in options:
            raise UsageError(f'{name} and --cfg-options {alias.key}=... set the same value; give one of them')
        values[alias.key] = value
        if name == '--epochs':  # a number of steps, in the config, would go before them
            if values.get('schedule.max_steps') is not None:
                raise UsageError('--epochs and a number of steps both say how long to train; give one of them')
            values['schedule.max_steps'] = None
    return values


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """How the base model of `chat` and `serve` is held."""
    parser.add_argument(
        '--bits', type=int, choices=(4, 8, 16), help='quantise the base to 4 or 8 bits; 16: not (as the adapter was '
        'trained, else 16)',
    )  # fmt: skip
    parser.add_argument(
        '--dtype', default='auto', choices=('auto', 'bf16', 'fp16', 'fp32'),
        help='of what is not quantised (half precision on a GPU, fp32 on a CPU)',
    )  # fmt: skip
    parser.add_argument('--device', default='auto', choices=('auto', 'cuda', 'cpu'), help='(a GPU where there is one)')


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How an answer is drawn. The defaults are those of InternLM's model card."""
    parser.add_argument('--max-new-tokens', type=positive_int, default=1024, help='tokens an answer may have (1024)')
    parser.add_argument(
        '--temperature', type=non_negative_float, default=0.8, help='0: always the likeliest token (0.8)'
    )
    parser.add_argument('--top-p', type=share, default=0.8, help='draw from the likeliest tokens of this mass (0.8)')
    parser.add_argument('--seed', type=int, help='makes the draws repeatable')


def filled(text: str) -> str:
    """Argparse type: any text but an empty one, which is what a shell variable that is not set leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError('is empty; perhaps a shell variable is not set')
    return text


def given_path(text: str) -> Path:
    """Argparse type: a path; an empty one would be the folder one stands in."""
    return Path(filled(text))


def finite(text: str) -> float:
    """Argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f'must be a finite number, got {text}')
    return value


def positive_int(text: str) -> int:
    """Argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
    return value


def non_negative_int(text: str) -> int:
    """Argparse type: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def non_negative_float(text: str) -> float:
    """Argparse type: a finite number from 0."""
    value = float(text)
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def share(text: str) -> float:
    """Argparse type: a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be above 0 and at most 1, got {text}')
    return value


ALIASES = {
    '--lr': Alias('optimizer.lr', positive_float, 'peak learning rate'),
    '--epochs': Alias('schedule.max_epochs', positive_float, 'passes over the data'),
    '--batch-size': Alias('schedule.batch_size', positive_int, 'packs a device computes at a time'),
    '--max-length': Alias('dataset.max_length', positive_int, 'tokens of a pack'),
    '--lora-rank': Alias('adapter.r', positive_int, 'rank of the adapter'),
}
"""Options of their own for the keys that are changed most."""
