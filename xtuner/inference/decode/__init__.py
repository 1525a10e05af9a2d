"""Fast decoding of one sequence: a lean forward pass with a static KV cache, for supported architectures."""
