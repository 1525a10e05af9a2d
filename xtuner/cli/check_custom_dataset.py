"""Checks a file of conversations against a config, every record of it, and says what is wrong where. Loads no model."""

from __future__ import annotations

import argparse

from xtuner.cli.options import add_config_arguments, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--most', type=positive_int, default=20, help='how many faults to show (20)')


def run(args: argparse.Namespace) -> int:
    """Prints the faults and the counts on stdout; 1 where there is a fault or nothing to train."""
    from xtuner.cli.data import load_data_config

    config, tokenizer, template = load_data_config(args)

    from xtuner.dataset.check import TrainingPart, check_dataset
    from xtuner.dataset.show import counted
    from xtuner.engine.plan import Plan, few_steps_note

    training = TrainingPart(config.dataset)
    summary = check_dataset(
        config.dataset, tokenizer=tokenizer, template=template, most_examples=args.most, training=training
    )
    for kind in ('bad', 'too_long', 'without_target'):
        for example in summary.examples.get(kind, []):
            print(f'{kind.replace("_", " ")}: {example}')
    print(summary.lines()[-1] if not summary.counts else '\n'.join(summary.lines()[: len(summary.formats) + 1]))
    wrong = summary.counts['bad'] + summary.counts['without_target']
    records = counted(summary.records, 'record')
    good = 'every record can be used' if summary.kept else 'nothing to train'
    print(f'{wrong:,} of {records} {"is" if wrong == 1 else "are"} wrong' if wrong else good)
    if summary.kept:
        num_packs, num_conversations = training.sizes()
        note = few_steps_note(Plan(num_packs, config.schedule), num_conversations)
        if note:
            print(f'training: {note}')
    return 1 if wrong or not summary.kept else 0
