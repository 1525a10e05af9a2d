"""Writes a config as one flat, self-contained, commented file to edit and train with."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.cli.options import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument('config', help='a shipped name (see `xtuner list-cfg`) or a file')
    parser.add_argument('folder', type=given_path, help='folder for NAME_copy.py; created if missing')


def run(args: argparse.Namespace) -> int:
    """Writes the file and prints its path; never overwrites an existing file."""
    from xtuner.config.flatten import flatten
    from xtuner.config.load import load_config
    from xtuner.errors import ConfigError

    name = Path(args.config).stem  # the name on the command line, which tutorials refer to
    source = flatten(load_config(args.config), title=f'A copy of {name}.')
    target = args.folder / f'{name}_copy.py'
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        with target.open('x', encoding='utf-8') as file:
            try:
                file.write(source)
                file.flush()
            except OSError:
                target.unlink()  # an incomplete file would block the next attempt
                raise
    except FileExistsError as error:
        there = target if args.folder.is_dir() else args.folder
        raise ConfigError(f'{there} already exists; nothing was written: name another folder or remove it') from error
    except OSError as error:
        raise ConfigError(f'cannot write {target}: {error.strerror}') from error
    print(target)
    return 0
