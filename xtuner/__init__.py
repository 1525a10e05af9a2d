"""xtuner: parameter-efficient fine-tuning, from a conversation file to a chatting model."""

__version__ = '0.1.0'
