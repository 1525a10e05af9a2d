"""Maps records to conversations and reports every field that nothing reads."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
