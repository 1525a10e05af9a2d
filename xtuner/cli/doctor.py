"""Prints versions, devices and the results of real tests on this machine, as Markdown for a bug report."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Prints the report to stdout; the exit status is 1 if a required component does not work."""
    from xtuner.cli.log import start_logging

    start_logging()

    from xtuner.engine.doctor import FAILED, examine, report

    checks = examine()
    print('\n'.join(report(checks)))
    return int(any(check.state == FAILED for check in checks))
