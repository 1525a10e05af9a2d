"""xtuner: parameter-efficient fine-tuning, from a conversation file to a chatting model."""

from xtuner.aliases import install

__version__ = '0.1.0'

install()
