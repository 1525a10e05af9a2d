"""Sample order of an epoch: a pure function of seed and epoch, so that a resumed run continues where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Yields the indices of one epoch, shuffled by `(seed, epoch)`.

    Ranks take turns in one global order, so that at each step they see together what one rank with a larger batch
    would see. If the items do not divide evenly, the order is extended from its beginning: ranks stay in step, nothing
    is dropped, and at most `world_size - 1` items repeat.

    Args:
        num_items: Number of items in the data set.
        seed: Seed of the order.
        shuffle: Whether to shuffle.
        rank: Rank of this process, from 0.
        world_size: Number of processes that share the data.
        lengths: Length of each item in tokens, if known. In the first epoch the longest item is swapped to the front,
            so that running out of memory shows at once and not after hours.

    Example: 5 items, unshuffled, 2 ranks: rank 0 yields 0, 2, 4 and rank 1 yields 1, 3, 0.
    """

    def __init__(
        self,
        num_items: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Selects the epoch to iterate, and how many of this rank's items to skip at its start."""
        self.epoch = epoch
        self.skip = skip

    def order(self) -> np.ndarray:
        """Returns the epoch's order over all ranks, int64 `(num_items,)`."""
        if not self.shuffle:
            return np.arange(self.num_items)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items)
        if self.lengths is not None and self.epoch == 0:
            longest = int(np.argmax(self.lengths[order]))
            order[[0, longest]] = order[[longest, 0]]
        return order

    def __iter__(self) -> Iterator[int]:
        order = np.resize(self.order(), len(self) * self.world_size)
        yield from order[self.rank :: self.world_size][self.skip :].tolist()

    def __len__(self) -> int:
        """Number of items per epoch on this rank, including skipped ones."""
        return -(-self.num_items // self.world_size)


class LengthGroupedEpochSampler(EpochSampler):
    """Like `EpochSampler`, but batches hold items of similar length to reduce padding.

    The shuffled order is split into groups of `batches_in_group` batches (over all ranks); each group is sorted by
    length and split into batches, and the batches are shuffled. The batch with the longest item comes first: if it fits
    into memory, so do the others.

    Args:
        lengths: Length of each item in tokens.
        batch_size: Items in a rank's micro-batch.
        seed: Seed of the order.
        shuffle: Whether to shuffle before grouping.
        rank: Rank of this process, from 0.
        world_size: Number of processes that share the data.
        batches_in_group: Batches per group: more batches mean less padding and less mixing.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        batches_in_group: int = 50,
    ) -> None:
        super().__init__(len(lengths), seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        self.item_lengths = np.asarray(lengths)
        self.batch = batch_size * world_size
        self.group = self.batch * batches_in_group

    def order(self) -> np.ndarray:
        """Returns the epoch's order over all ranks, int64 `(num_items,)`."""
        order = super().order()
        groups = np.arange(len(order)) // self.group
        order = order[np.lexsort((-self.item_lengths[order], groups))]  # within each group, the longest first
        # An incomplete last batch stays last, so that all batches before it are complete on every rank.
        num_batches = len(order) // self.batch
        if not num_batches:
            return order
        batches, last = order[: num_batches * self.batch].reshape(num_batches, -1), order[num_batches * self.batch :]
        batch_order = np.random.default_rng([self.seed, self.epoch, 1]).permutation(num_batches)
        longest = np.argmax(self.item_lengths[batches[:, 0]])
        batch_order = np.concatenate([[longest], batch_order[batch_order != longest]])
        return np.concatenate([batches[batch_order].reshape(-1), last])
