"""Which errors say that memory has run out."""

from __future__ import annotations

import pytest
import torch

from xtuner.utils.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (torch.OutOfMemoryError('CUDA out of memory'), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError('shape mismatch'), False),
        (KeyError('not there'), False),
    ],
)
def test_errors_of_both_devices(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_error_that_torch_really_raises() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
