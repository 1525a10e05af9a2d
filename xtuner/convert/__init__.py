"""Converts adapters and models to weights that other tools load."""
