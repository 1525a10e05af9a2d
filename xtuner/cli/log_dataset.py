"""Shows encoded conversations with trained tokens highlighted, and a histogram of their lengths."""

from __future__ import annotations

import argparse
import os
import sys

from xtuner.cli.options import add_config_arguments, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--num', type=positive_int, default=3, help='number of conversations to show (default: 3)')
    parser.add_argument('--part', choices=('train', 'val'), default='train', help='split to show (default: train)')
    parser.add_argument(
        '--color', choices=('auto', 'always', 'never'), default='auto',
        help='trained tokens in green, others in grey; without colour, trained tokens are enclosed in « and »',
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prepares the data or loads it from the cache, and prints samples and a histogram to stdout."""
    from xtuner.cli.data import load_data_config

    config, tokenizer, template = load_data_config(args)

    from xtuner.dataset.encode.length import num_targets
    from xtuner.dataset.prepare import prepare_dataset
    from xtuner.dataset.show import histogram, show_sample
    from xtuner.errors import ConfigError
    from xtuner.utils.units import counted

    dataset = prepare_dataset(config.dataset, tokenizer=tokenizer, template=template, part=args.part)
    if dataset is None:
        raise ConfigError('the config has no validation data; set `dataset.val_ratio` or `dataset.val_file`')
    color = args.color == 'always' or (args.color == 'auto' and sys.stdout.isatty() and 'NO_COLOR' not in os.environ)
    numbers = sorted(set(dataset.sample_numbers.tolist()))
    for number in numbers[: args.num]:
        sample = dataset.sample(number)
        trained = num_targets(sample)
        print(f'--- conversation {number}: {len(sample.input_ids)} tokens, {trained} trained')
        print(show_sample(sample, tokenizer, color=color))
    fill = dataset.packing_efficiency(config.dataset.max_length)
    print(f'--- {counted(len(numbers), "conversation")} in {counted(len(dataset), "pack")}, {fill:.1%} full')
    print('\n'.join(histogram(dataset.sample_lengths[numbers])))
    return 0
