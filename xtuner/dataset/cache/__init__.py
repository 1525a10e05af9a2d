"""Prepared data on disk: built once, then looked up by a hash of everything that it depends on."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
