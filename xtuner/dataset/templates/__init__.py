"""Prompt templates: built-in ones and the chat templates of tokenizers."""
