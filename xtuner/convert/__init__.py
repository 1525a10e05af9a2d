"""From an adapter on disk to weights that other tools load."""
