"""xtuner: parameter-efficient fine-tuning of LLMs, from a conversation file to a chat model."""

from xtuner.aliases import install

__version__ = '0.1.0'

install()
