"""One optimizer step: its checks, its result, and what names the conversations in it."""
