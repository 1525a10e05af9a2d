"""Checks every record of a data file against a config and reports errors with file and line. Loads no model."""

from __future__ import annotations

import argparse

from xtuner.cli.options import add_config_arguments, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--most', type=positive_int, default=20, help='maximum number of errors to show (default: 20)')


def run(args: argparse.Namespace) -> int:
    """Prints errors and counts to stdout.

    Raises:
        DataError: A record is invalid, or more records would be dropped than the config allows.
    """
    from xtuner.cli.data import load_data_config

    config, tokenizer, template = load_data_config(args)

    from xtuner.dataset.check import TrainingPart, check_dataset
    from xtuner.dataset.prepare import check_dropped
    from xtuner.engine.schedule import TrainingSchedule, few_steps_note
    from xtuner.errors import DataError
    from xtuner.utils.escape import printable
    from xtuner.utils.units import counted

    data = config.dataset
    training = TrainingPart(data)
    summary = check_dataset(data, tokenizer=tokenizer, template=template, most_examples=args.most, training=training)
    for kind in ('bad', 'too_long', 'without_target'):
        for example in summary.examples.get(kind, []):
            print(f'{kind.replace("_", " ")}: {printable(example)}')
    print('\n'.join(summary.report()))
    kinds = ('bad', 'without_target', *(('too_long',) if data.on_long == 'error' else ()))
    if wrong := sum(summary.counts[kind] for kind in kinds):
        verb = 'is' if wrong == 1 else 'are'
        raise DataError(
            f'{wrong:,} of {counted(summary.records, "record")} {verb} invalid, listed above by file and line'
        )
    check_dropped(summary, data)
    num_packs, num_conversations = training.sizes()
    if note := few_steps_note(TrainingSchedule(num_packs, config.schedule), num_conversations):
        print(f'training: {note}')
    dropped = counted(summary.dropped, 'conversation')
    print(f'{dropped} would be dropped' if summary.dropped else 'all records are usable')
    return 0
