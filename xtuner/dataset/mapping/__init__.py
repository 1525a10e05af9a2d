"""Records to conversations, with a note for every field that nothing reads."""

from xtuner.aliases import former_names

__getattr__ = former_names(__name__)
