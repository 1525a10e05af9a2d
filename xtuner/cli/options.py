"""Command-line options shared by several commands."""

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
    """An option that sets a config key.

    Attributes:
        key: The config key.
        type: Converts the text of the value.
        text: Description of the value.
    """

    key: str
    type: Callable[[str], Any]
    text: str


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and the options that override its values."""
    config = parser.add_argument('config', help='the name of a shipped config (see `xtuner list-cfg`) or a config file')
    config.required = False  # `read_config` requires it, after looking for it behind `--cfg-options`
    parser.add_argument(
        '--model', type=filled, help="base model, overrides the config's: a folder, a hub id or modelscope:ID"
    )
    parser.add_argument(
        '--data',
        type=filled,
        help="data, overrides the config's: a hub id, a file or a folder; its format is detected",
    )
    for name, alias in ALIASES.items():
        parser.add_argument(name, type=alias.type, metavar='N', help=f'{alias.text}: {alias.key}')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='override config values, for example schedule.batch_size=2',
    )


def read_config(args: argparse.Namespace, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Loads the config of a command line and applies its overrides.

    argparse assigns every word after `--cfg-options` to that option, CONFIG too; here CONFIG is moved to `args.config`.

    Args:
        args: The parsed command line.
        overrides: Dotted keys and values set by the command itself; they override `--cfg-options`.

    Raises:
        UsageError: there is no CONFIG, or two options set the same key.
        ConfigError: the config does not exist or is invalid.
    """
    from xtuner.config.load import load_config, parse_options

    words = list(args.cfg_options)
    if args.config is None and words and '=' not in words[-1]:
        args.config = words.pop()
    if args.config is None:
        raise UsageError('the following arguments are required: config (`xtuner list-cfg` lists the shipped ones)')
    named: dict[str, Any] = {}
    if args.model:
        named['model.path'] = args.model
    if args.data:
        named |= {'dataset.source': args.data, 'dataset.map_fn': None}
    return load_config(args.config, named | _values_of(args, parse_options(words), overrides or {}))


def _values_of(args: argparse.Namespace, options: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Combines the values of the `ALIASES` options, of `--cfg-options` and of the command; none may be set twice."""
    values = {**options, **overrides}
    for name, alias in ALIASES.items():
        value = getattr(args, name.removeprefix('--').replace('-', '_'))
        if value is None:
            continue
        if alias.key in options:
            raise UsageError(f'{name} and --cfg-options {alias.key}=... set the same value; use only one of them')
        values[alias.key] = value
        if name == '--epochs':  # a number of steps in the config would take precedence
            if values.get('schedule.max_steps') is not None:
                raise UsageError('--epochs and a number of steps both set the length of training; use only one of them')
            values['schedule.max_steps'] = None
    return values


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the precision and device of the base model, for `chat` and `serve`."""
    parser.add_argument(
        '--bits', type=int, choices=(4, 8, 16), help='quantize the base model to 4 or 8 bits; 16: do not quantize '
        '(default: as the adapter was trained, else 16)',
    )  # fmt: skip
    parser.add_argument(
        '--dtype', default='auto', choices=('auto', 'bf16', 'fp16', 'fp32'),
        help='compute dtype (default: half precision on a GPU, fp32 on a CPU)',
    )  # fmt: skip
    parser.add_argument(
        '--device', default='auto', choices=('auto', 'cuda', 'cpu'), help='device (default: a GPU if there is one)'
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sampling options. The defaults are those of InternLM's model card."""
    parser.add_argument(
        '--max-new-tokens', type=positive_int, default=1024, help='maximum tokens per answer (default: 1024)'
    )
    parser.add_argument('--temperature', type=non_negative_float, default=0.8, help='0: greedy decoding (default: 0.8)')
    parser.add_argument('--top-p', type=share, default=0.8, help='nucleus sampling probability (default: 0.8)')
    parser.add_argument('--seed', type=int, help='random seed of sampling (default: random)')


def filled(text: str) -> str:
    """Argparse type: non-empty text. An empty text usually comes from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError('is empty; is a shell variable unset?')
    return text


def given_path(text: str) -> Path:
    """Argparse type: a non-empty path; an empty one would mean the current folder."""
    return Path(filled(text))


def finite(text: str) -> float:
    """Argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f'must be a finite number, got {text}')
    return value


def positive_int(text: str) -> int:
    """Argparse type: an integer of at least 1."""
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
    """Argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def non_negative_float(text: str) -> float:
    """Argparse type: a finite number of at least 0."""
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
    '--epochs': Alias('schedule.max_epochs', positive_float, 'epochs'),
    '--batch-size': Alias('schedule.batch_size', positive_int, 'packs per device and micro-batch'),
    '--max-length': Alias('dataset.max_length', positive_int, 'tokens per pack'),
    '--lora-rank': Alias('adapter.r', positive_int, 'rank of the adapter'),
}
"""Options for the config keys that are changed most often."""
