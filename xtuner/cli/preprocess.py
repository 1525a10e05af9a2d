"""Prepares the data of a config in advance and stores it in the cache, so that training starts at once."""

from __future__ import annotations

import argparse

from xtuner.cli.options import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares the training and validation data and prints their folders to stdout."""
    from xtuner.cli.data import load_data_config

    config, tokenizer, template = load_data_config(args)

    from xtuner.dataset.prepare import prepare_dataset

    folders = []
    for part in ('train', 'val'):
        prepared = prepare_dataset(config.dataset, tokenizer=tokenizer, template=template, part=part)
        if prepared is not None and str(prepared.folder) not in folders:
            folders.append(str(prepared.folder))
    print('\n'.join(folders))
    return 0
