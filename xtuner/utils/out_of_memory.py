"""Detects out-of-memory errors."""

from __future__ import annotations

import torch

_CPU_WORDS = ("can't allocate memory", 'not enough memory')  # messages of torch's CPU allocator


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or host memory is exhausted."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in _CPU_WORDS)
