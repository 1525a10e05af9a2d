"""Decoding at the machine's speed: a lean forward pass with a cache of fixed place, for the models that it knows."""
