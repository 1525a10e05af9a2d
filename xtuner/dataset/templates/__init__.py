"""Prompt formats, and chat templates of tokenizers."""
