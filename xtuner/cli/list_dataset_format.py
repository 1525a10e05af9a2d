"""Lists the data formats: the name for `dataset.map_fn`, the columns it reads, and how they are mapped."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Prints one line per format to stdout."""
    from xtuner.dataset.map_fns import formats

    map_fns = sorted(formats().items())
    width = max(len(name) for name, _ in map_fns)
    columns = {name: ', '.join(getattr(function, 'columns', ())) for name, function in map_fns}
    column_width = max(map(len, columns.values()))
    for name, function in map_fns:
        text = (function.__doc__ or '').strip().splitlines()
        print(f'{name:{width}}  {columns[name]:{column_width}}  {text[0] if text else ""}')
    return 0
