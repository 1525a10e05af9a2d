"""Sources of records: files, folders and the hub."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
