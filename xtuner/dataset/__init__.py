"""Data: from conversation files to packs of token ids; `prepare.prepare_dataset` is the one entry training uses."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
