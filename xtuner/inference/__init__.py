"""Text generation: decoding one sequence or many, KV caches, sampling, scheduling, detokenizing."""
