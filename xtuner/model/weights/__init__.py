"""Weights on disk: read, written and quantized by blocks of rows."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
