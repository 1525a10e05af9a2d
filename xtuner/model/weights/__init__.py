"""Weights on disk: read, written and quantised a block of rows at a time."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
