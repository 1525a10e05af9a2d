"""Prints the complete config as one flat file, with every default filled in and explained."""

from __future__ import annotations

import argparse

from xtuner.cli.early import check_objective
from xtuner.cli.options import add_config_arguments, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the source of the flat config, which is itself a config file, once the objective has been checked."""
    from xtuner.config.find import find_config
    from xtuner.config.flatten import flatten

    config = read_config(args)
    check_objective(config)
    print(flatten(config, title=f'The complete config {find_config(args.config).stem}.'), end='')
    return 0
