"""Tensors remembered up to a number of bytes."""

import torch

from xtuner.kernels.last_used import LRUTensors


def test_the_last_used_stay() -> None:
    made: list[str] = []

    def get(name: str) -> torch.Tensor:
        return memory.get(name, lambda: made.append(name) or torch.zeros(10, dtype=torch.uint8))

    memory = LRUTensors(20)
    first = get('a')
    get('b')
    assert get('a') is first and made == ['a', 'b']
    get('c')  # `b` goes, which was used before `a`
    assert get('a') is first and len(memory) == 2
    get('b')
    assert made == ['a', 'b', 'c', 'b']


def test_one_that_is_too_large_stays_alone() -> None:
    memory = LRUTensors(5)
    for name in 'abc':
        assert memory.get(name, lambda: torch.zeros(10)).shape == (10,)
        assert len(memory) == 1
