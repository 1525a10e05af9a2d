"""Samples to packs and batches, in the order of an epoch."""
