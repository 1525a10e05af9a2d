"""Prepared data on disk: built once, found again by a hash of what it depends on."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
