"""Answers from a model: decoding one text or many, sampling, scheduling."""
