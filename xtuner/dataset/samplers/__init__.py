"""Classical import path of the length-grouped sampler."""

from __future__ import annotations

from typing import Any

from torch import distributed

from xtuner.dataset.packing.sampler import LengthGroupedEpochSampler


class LengthGroupedSampler(LengthGroupedEpochSampler):
    """Batches of similar length; see `LengthGroupedEpochSampler`. Uses the process group's rank and world size.

    Args:
        dataset: A data set with `lengths`.
        per_device_batch_size: Items of a rank's micro-batch.
        seed: Seed of the order.
        mega_batch_mult: Batches that are sorted together; None for 50.
        length_property: Must be 'length', the only one that prepared data sets have.
    """

    def __init__(
        self,
        dataset: Any,
        per_device_batch_size: int,
        length_property: str = 'length',
        mega_batch_mult: int | None = None,
        seed: int | None = None,
    ) -> None:
        if length_property != 'length':
            raise ValueError(f"`length_property` must be 'length', got {length_property!r}")
        together = distributed.is_available() and distributed.is_initialized()
        super().__init__(
            dataset.lengths,
            batch_size=per_device_batch_size,
            seed=seed or 0,
            rank=distributed.get_rank() if together else 0,
            world_size=distributed.get_world_size() if together else 1,
            batches_in_group=mega_batch_mult or 50,
        )


__all__ = ['LengthGroupedSampler']
