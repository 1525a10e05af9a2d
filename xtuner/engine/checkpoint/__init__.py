"""Checkpoints: what is saved, and how a run resumes."""
