"""Encodes conversations as token ids and labels."""
