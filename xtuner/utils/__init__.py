"""Helpers for every package: units, files, JSON lines, progress, processes."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
