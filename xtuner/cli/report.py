"""Writes the self-contained report.html of a run, finished or not, from the files in its work directory."""

from __future__ import annotations

import argparse

from xtuner.cli.options import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        'work_dir', type=given_path, help='work directory of the run (it contains metrics.jsonl), or a checkpoint in it'
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its path to stdout."""
    from xtuner.cli.log import start_logging

    start_logging()

    from xtuner.model.run_folder import work_folder
    from xtuner.tracking.report.page import write_report

    print(write_report(work_folder(args.work_dir)))
    return 0
