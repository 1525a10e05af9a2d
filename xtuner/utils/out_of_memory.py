"""Which errors say that memory has run out."""

from __future__ import annotations

import torch

_CPU_WORDS = ("can't allocate memory", 'not enough memory')  # of torch's allocator on a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device or host memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in _CPU_WORDS)
