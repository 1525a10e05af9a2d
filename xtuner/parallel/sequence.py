"""Classical import path of the sampler that configs name beside `sequence_parallel_size`, which must be 1 here."""

from __future__ import annotations

from typing import Any

from torch import distributed

from xtuner.dataset.packing.sampler import EpochSampler


class SequenceParallelSampler(EpochSampler):
    """The order of an epoch; see `EpochSampler`. Rank and world size are the process group's.

    Args:
        dataset: Anything with a length.
        shuffle: Whether to shuffle.
        seed: Seed of the order; None for 0.
        round_up: Must be True: ranks stay in step.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int | None = None, round_up: bool = True) -> None:
        if not round_up:
            raise ValueError('`round_up` must be True: all ranks take as many steps')
        together = distributed.is_available() and distributed.is_initialized()
        super().__init__(
            len(dataset),
            seed=seed or 0,
            shuffle=shuffle,
            rank=distributed.get_rank() if together else 0,
            world_size=distributed.get_world_size() if together else 1,
        )


__all__ = ['SequenceParallelSampler']
