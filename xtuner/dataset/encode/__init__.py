"""Conversations to token ids and labels."""
