"""Data pipeline from conversation files to packs of token ids; training calls `prepare.prepare_dataset`."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
