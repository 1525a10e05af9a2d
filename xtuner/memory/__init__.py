"""Prediction of a training step's peak memory."""
