"""Prints versions, devices and what works here, tried for real, as Markdown to paste into an issue."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints the report on stdout; exit status 1 where something that is needed does not work."""
    from xtuner.cli.log import start_logging

    start_logging()

    from xtuner.engine.doctor import FAILED, examine, report

    checks = examine()
    print('\n'.join(report(checks)))
    return int(any(check.state == FAILED for check in checks))
