"""Lists the names of the shipped configs, one per line."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('-p', '--pattern', default='', help='list only names that contain this text')


def run(args: argparse.Namespace) -> int:
    """Prints the names; fails if the pattern matches none."""
    from xtuner.config.find import list_configs
    from xtuner.errors import ConfigError, nearest

    names = list_configs(args.pattern)
    if not names:
        hint = nearest(args.pattern, list_configs()) or '; `xtuner list-cfg` lists all'
        raise ConfigError(f'no config name contains {args.pattern!r}{hint}')
    print('\n'.join(names))
    return 0
